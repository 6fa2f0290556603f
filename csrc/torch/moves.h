// Where the tensors of rows lie, so that rows that share memory are looked for (overlaps.h) only where it has moved.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <vector>

#include "objects.h"
#include "tensors.h"

namespace genopt {

class Moves {
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

  // Once all active rows are noted: whether what rows write has moved since it was last looked at.
  bool moved() const {
    return moved_;
  }
  // Whether a gradient that may share memory with others has.
  bool grads_moved() const {
    return grads_moved_;
  }
  bool writes_gradients() const {
    return writes_gradients_;
  }
  // Whether others may have the memory of a row's gradient.
  static bool may_be_shared(size_t r, const at::Tensor& grad, const Objects& objects) {
    return objects.grads || is_spread(objects.params[r]) || !is_alone(grad);
  }
  // All that was noted has been looked at. `again`: has to be at the next step too.
  void looked(bool again) {
    recheck_ = again;
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
    if (const at::Tensor* const grad = objects.handles[r][kGrad]; grad && may_be_shared(r, *grad, objects))
      now = of_place(*grad);
    const bool moved = now && now != grad_fingerprints_[r];
    grad_fingerprints_[r] = now;
    return moved;
  }

  static constexpr uint64_t kSeedOfHash = 0x9e3779b97f4a7c15u;

  bool writes_gradients_ = false;                          // in the step that is read now
  std::atomic<bool> moved_ = false, grads_moved_ = false;  // in it
  std::atomic<bool> recheck_ = false;
  std::vector<uint64_t> own_;                // of rows but for their gradients
  std::vector<uint64_t> fingerprints_;       // of what rows wrote when they were last noted
  std::vector<uint64_t> grad_fingerprints_;  // of gradients that may share memory with others; 0: of none
};

}  // namespace genopt
