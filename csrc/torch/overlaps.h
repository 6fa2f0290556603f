// Looks for rows that share memory: with one another, or a gradient with what a step writes. Only where memory has
// moved since it was last looked at.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <vector>

#include "../overlap.h"
#include "objects.h"
#include "refusal.h"
#include "tensors.h"

namespace genopt {

class Overlaps {
 public:
  // Before the rows of a step are noted. `writes_gradients`: as Control::may_write_gradients().
  void begin(size_t rows, bool writes_gradients) {
    own_.resize(rows);
    fingerprints_.resize(rows);
    grad_fingerprints_.resize(rows);
    writes_gradients_ = writes_gradients;
    moved_ = recheck_.load();
    grads_moved_ = false;
  }

  // Notes where an active row's tensors are. `holds`: all but the gradient is where it was. Several threads may note a
  // row each.
  void note(size_t r, const Row& row, bool holds, const Objects& objects) {
    if (!holds) own_[r] = fingerprint(r, objects);
    const uint64_t now = writes_gradients_ ? mixed(own_[r], reinterpret_cast<uintptr_t>(row.data[kGrad])) : own_[r];
    if (now != fingerprints_[r]) moved_ = recheck_ = true;  // should check() not be reached
    fingerprints_[r] = now;
    if (has_moved_grad(r, objects)) grads_moved_ = recheck_ = true;
  }

  // Of a row that may be another by the time it is noted again: what the others were compared with since was not this.
  void forget(size_t r) {
    fingerprints_[r] = 0;
  }

  // Once all active rows are noted.
  void check(const std::vector<Row>& rows, const Objects& objects, Refusal& refusal) {
    // With unsupported rows too: their state must not be made for a step that will be refused.
    if (moved_ || !refusal.rows.empty()) {
      check_all(rows, objects, refusal);
    } else if (grads_moved_) {
      recheck_ = false;
      check_grads(rows, objects, refusal);
    }
  }

  // Whether gradients that are written share memory among themselves, as far as check() has looked.
  bool gradients_overlap() const {
    return writes_gradients_ && gradients_overlap_;
  }

 private:
  static uint64_t mixed(uint64_t hash, uint64_t value) {
    return (hash ^ value) * 0xff51afd7ed558ccdu + (hash >> 29);
  }

  // Where a row's own tensors lie, as one number.
  static uint64_t fingerprint(size_t r, const Objects& objects) {
    uint64_t hash = kSeedOfHash;
    objects.for_each_own(r, [&hash](const at::Tensor& t) {
      if (is_in_memory(t)) hash = mixed(hash, is_backed(t) ? of_place(t) : 0);
    });
    return hash;
  }
  static uint64_t of_place(const at::Tensor& t) {
    uint64_t hash = mixed(kSeedOfHash, reinterpret_cast<uintptr_t>(t.const_data_ptr()));
    for (const int64_t size : t.sizes()) hash = mixed(hash, size);
    for (const int64_t stride : t.strides()) hash = mixed(hash, stride);
    return mixed(hash, static_cast<uint64_t>(t.scalar_type()));
  }

  // Whether the gradient of an active row has to be looked at again.
  bool has_moved_grad(size_t r, const Objects& objects) {
    uint64_t now = 0;  // none is looked for
    if (const at::Tensor* const grad = objects.handles[r][kGrad]; grad && (objects.grads || !is_alone(*grad)))
      now = of_place(*grad);
    const bool moved = now && now != grad_fingerprints_[r];
    grad_fingerprints_[r] = now;
    return moved;
  }

  static Region region_of(const at::Tensor& t, size_t r) {
    Region region{
        static_cast<const char*>(t.const_data_ptr()), t.element_size(), t.numel(), {}, {}, static_cast<int64_t>(r)};
    if (!t.is_non_overlapping_and_dense()) {
      region.sizes = t.sizes().vec();
      region.strides = t.strides().vec();
    }
    return region;
  }

  // Looks at what all rows write, with or without a gradient now, so that it need not be done again
  // when a gradient comes. A pair of which one has none does no harm yet: it is looked at every time.
  void check_all(const std::vector<Row>& rows, const Objects& objects, Refusal& refusal) {
    std::vector<Region> regions, gradients;
    for (size_t r = 0; r < objects.rows(); ++r) {
      if (!THPVariable_Check(objects.params[r])) continue;
      if (writes_gradients_ && objects.has_grad[r] && rows[r].active)
        gradients.push_back(region_of(*objects.handles[r][kGrad], r));
      objects.for_each_own(r, [&](const at::Tensor& t) {
        if (is_in_memory(t) && is_backed(t)) regions.push_back(region_of(t, r));
      });
    }
    written_ = Regions(std::move(regions));
    gradients_overlap_ = !Regions(std::move(gradients)).find_overlaps().empty();
    recheck_ = gradients_overlap_;
    for (const auto& [a, b] : written_.find_overlaps()) {
      if (takes_part(a, rows, objects) && takes_part(b, rows, objects)) refusal.overlaps.emplace_back(a, b);
      recheck_ = true;
    }
    check_grads(rows, objects, refusal);
  }

  // Whether gradients share memory with what the step writes, or what is written to them with anything of the
  // optimizer's.
  void check_grads(const std::vector<Row>& rows, const Objects& objects, Refusal& refusal) {
    for (size_t r = 0; r < objects.rows(); ++r) {
      const at::Tensor* const grad = objects.has_grad[r] ? objects.grad(r) : nullptr;
      if (!grad || !is_in_memory(*grad) || !is_backed(*grad) || (!objects.grads && is_alone(*grad))) continue;
      for (const Region* met : written_.find_met(region_of(*grad, r))) {
        const size_t owner = static_cast<size_t>(met->owner);
        if (!writes_gradients_ && owner == r && is_own(*grad, r, objects)) continue;
        recheck_ = true;
        if (writes_gradients_ || takes_part(owner, rows, objects)) refusal.grad_overlaps.emplace_back(r, owner);
      }
    }
  }

  static bool takes_part(size_t r, const std::vector<Row>& rows, const Objects& objects) {
    return objects.has_grad[r] || rows[r].active;
  }

  // Whether no other tensor can share its memory, as with most gradients that backward() makes: nobody else holds it or
  // its storage, and that is torch's own.
  static bool is_alone(const at::Tensor& t) {
    const c10::Storage& storage = t.unsafeGetTensorImpl()->unsafe_storage();
    static const c10::DeleterFnPtr host_deleter = c10::GetAllocator(c10::kCPU)->raw_deleter();
    const c10::DeleterFnPtr deleter = storage.data_ptr().get_deleter();
    const bool owned =
        t.is_cpu() ? deleter == host_deleter : deleter == c10::GetAllocator(t.device().type())->raw_deleter();
    if (!owned || storage.use_count() != 1) return false;
    // Its own Python object counts as one.
    return t.use_count() == 1 ||
           (t.use_count() == 2 && is_held_by_tensor_alone(*t.unsafeGetTensorImpl()->pyobj_slot()));
  }
  template <class Slot>
  static bool is_held_by_tensor_alone(const Slot& slot) {
    if constexpr (requires { slot.load_pyobj(); }) {
      PyObject* const object = slot.load_pyobj();
      return object && Py_REFCNT(object) == 1;
    } else {
      return false;
    }
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

  static constexpr uint64_t kSeedOfHash = 0x9e3779b97f4a7c15u;

  bool writes_gradients_ = false;                          // in the step that is read now
  std::atomic<bool> moved_ = false, grads_moved_ = false;  // in it
  std::atomic<bool> recheck_ = false;
  bool gradients_overlap_ = false;
  Regions written_;                          // of the last check
  std::vector<uint64_t> own_;                // of rows but for their gradients
  std::vector<uint64_t> fingerprints_;       // of what rows wrote when they were last noted
  std::vector<uint64_t> grad_fingerprints_;  // of gradients that may share memory with others; 0: of none
};

}  // namespace genopt
