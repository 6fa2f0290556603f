// Looks for rows that share memory: with one another, or a gradient with what a step writes. Only where memory has
// moved since it was last looked at (moves.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../overlap.h"
#include "moves.h"
#include "refusal.h"

namespace genopt {

class Overlaps {
 public:
  explicit Overlaps(Moves& moves) : moves_(moves) {
  }

  // Once all active rows are noted in `moves`.
  void check(const std::vector<Row>& rows, const Objects& objects, Refusal& refusal) {
    // With unsupported rows too: their state must not be made for a step that will be refused.
    const bool all = moves_.moved() || !refusal.rows.empty();
    if (!all && !moves_.grads_moved()) return;
    bool again = all && check_all(rows, objects, refusal);
    again = check_grads(rows, objects, refusal) || again;
    moves_.looked(again);
  }

  // Whether gradients that are written share memory among themselves, as far as check() has looked.
  bool gradients_overlap() const {
    return moves_.writes_gradients() && gradients_overlap_;
  }

 private:
  static Region region_of(const at::Tensor& t, size_t r) {
    Region region{
        static_cast<const char*>(t.const_data_ptr()), t.element_size(), t.numel(), {}, {}, static_cast<int64_t>(r)};
    if (!t.is_non_overlapping_and_dense()) {
      region.sizes = t.sizes().vec();
      region.strides = t.strides().vec();
    }
    return region;
  }

  // Looks at what all rows write, with or without a gradient now, so that it need not be done again when a gradient
  // comes. True: it has to be done at the next step too, as a pair of which one has none does no harm yet.
  bool check_all(const std::vector<Row>& rows, const Objects& objects, Refusal& refusal) {
    std::vector<Region> regions, gradients;
    for (size_t r = 0; r < objects.rows(); ++r) {
      if (!THPVariable_Check(objects.params[r])) continue;
      if (moves_.writes_gradients() && objects.has_grad[r] && rows[r].active)
        gradients.push_back(region_of(*objects.handles[r][kGrad], r));
      objects.for_each_own(r, [&](const at::Tensor& t) {
        if (is_in_memory(t) && is_backed(t)) regions.push_back(region_of(t, r));
      });
    }
    written_ = Regions(std::move(regions));
    gradients_overlap_ = !Regions(std::move(gradients)).find_overlaps().empty();
    bool again = gradients_overlap_;
    for (const auto& [a, b] : written_.find_overlaps()) {
      if (takes_part(a, rows, objects) && takes_part(b, rows, objects)) refusal.overlaps.emplace_back(a, b);
      again = true;
    }
    return again;
  }

  // Whether gradients share memory with what the step writes, or what is written to them with anything of the
  // optimizer's. True: as check_all().
  bool check_grads(const std::vector<Row>& rows, const Objects& objects, Refusal& refusal) {
    bool again = false;
    for (size_t r = 0; r < objects.rows(); ++r) {
      const at::Tensor* const grad = objects.has_grad[r] ? objects.grad(r) : nullptr;
      if (!grad || !is_in_memory(*grad) || !is_backed(*grad) || !Moves::may_be_shared(r, *grad, objects)) continue;
      for (const Region* met : written_.find_met(region_of(*grad, r))) {
        const size_t owner = static_cast<size_t>(met->owner);
        if (!moves_.writes_gradients() && owner == r && is_own(*grad, r, objects)) continue;
        again = true;
        if (moves_.writes_gradients() || takes_part(owner, rows, objects)) refusal.grad_overlaps.emplace_back(r, owner);
      }
    }
    return again;
  }

  static bool takes_part(size_t r, const std::vector<Row>& rows, const Objects& objects) {
    return objects.has_grad[r] || rows[r].active;
  }

  // Whether it is the very same elements, in the same order, as the row's parameter or one of its states: then each
  // element is read before it is written.
  static bool is_own(const at::Tensor& grad, size_t r, const Objects& objects) {
    bool found = false;
    objects.for_each_own(r, [&](const at::Tensor& t) {
      found = found ||
              (is_in_memory(t) && t.const_data_ptr() == grad.const_data_ptr() &&
               t.scalar_type() == grad.scalar_type() && t.sizes() == grad.sizes() && t.strides() == grad.strides());
    });
    return found;
  }

  Moves& moves_;
  bool gradients_overlap_ = false;
  Regions written_;  // of the last check
};

}  // namespace genopt
