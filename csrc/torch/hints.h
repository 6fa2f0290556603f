// Where a row's objects were at the last step: prefetched, never followed.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "objects.h"

namespace genopt {

// A row's objects lie scattered in memory, and reading them waits for the cache.
class Hints {
 public:
  void resize(size_t rows) {
    hints_.resize(rows);
  }

  // `owners`: the Python objects of the handles.
  void note(size_t r, const Objects& objects, const std::array<PyObject*, kHandles>& owners) {
    RowHints& hints = hints_[r];
    hints.count = 0;
    objects.for_each_present(r, objects.handles[r], [&](int k, const at::Tensor& t) {
      if (k != kGrad) hints.of[hints.count++] = hint_of(t, owners[k]);
    });
  }

  // Prefetches what the rows after `r` will read, in the order in which one thing leads to the next.
  void prefetch(size_t r, const Objects& objects) const {
    const size_t rows = objects.rows();
    if (r + kAhead < rows) {
      fetch(objects.states[r + kAhead], 64);
      const RowHints& hints = hints_[r + kAhead];
      for (int i = 0; i < hints.count; ++i) {
        const Hint& hint = hints.of[i];
        fetch(hint.object, 64);
        fetch(hint.impl, sizeof(c10::TensorImpl));
        fetch(hint.storage, 128);
        fetch(hint.version, 16);
      }
    }
    // The gradient is another tensor at every step: only the parameter leads to it.
    if (r + kNear < rows) {
      PyObject* const entries = objects.states[r + kNear];
      if (entries && PyDict_Check(entries)) fetch(reinterpret_cast<PyDictObject*>(entries)->ma_keys, 192);
      if (const c10::TensorImpl* grad = grad_of(r + kNear, objects)) fetch(grad, sizeof(c10::TensorImpl));
    }
    if (r + kNext < rows)
      if (const c10::TensorImpl* grad = grad_of(r + kNext, objects))
        fetch(grad->unsafe_storage().unsafeGetStorageImpl(), 128);
  }

  // Prefetches version counters of rows after `r`.
  void prefetch_versions(size_t r) const {
    if (r + kAhead >= hints_.size()) return;
    const RowHints& hints = hints_[r + kAhead];
    for (int i = 0; i < hints.count; ++i) {
      __builtin_prefetch(static_cast<const char*>(hints.of[i].impl) + 40);  // where it points to its version
      __builtin_prefetch(hints.of[i].version, 1);
    }
  }

 private:
  struct Hint {
    const void* object;
    const void* impl;
    const void* storage;
    const void* version;
  };
  struct RowHints {
    int count = 0;
    std::array<Hint, kHandles> of;
  };
  static constexpr size_t kAhead = 12, kNear = 6, kNext = 3;  // rows

  static Hint hint_of(const at::Tensor& t, const void* object) {
    const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
    // VariableVersion is one pointer to a counter.
    const void* version = *reinterpret_cast<void* const*>(&impl->version_counter());
    return {object, impl, impl->unsafe_storage().unsafeGetStorageImpl(), version};
  }

  static void fetch(const void* address, int bytes) {
    for (int byte = 0; byte < bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(address) + byte);
  }

  static const c10::TensorImpl* grad_of(size_t r, const Objects& objects) {
    if (!THPVariable_CheckExact(objects.params[r]) || objects.grads) return nullptr;
    const at::Tensor& grad = THPVariable_Unpack(objects.params[r]).unsafeGetTensorImpl()->grad();
    return grad.defined() ? grad.unsafeGetTensorImpl() : nullptr;
  }

  std::vector<RowHints> hints_;
};

}  // namespace genopt
