// Where a row's objects were at the last step: prefetched, never followed.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "objects.h"
#include "witness.h"

namespace genopt {

// A row's objects lie scattered in memory, and reading them waits for the cache.
class Hints {
 public:
  void resize(size_t rows) {
    hints_.resize(rows);
  }

  void note(size_t r, const Objects& objects) {
    Hint* hint = hints_[r].data();
    each_own(r, objects, [&](const at::Tensor& t) { *hint++ = hint_of(t); });
  }

  // Prefetches what the rows after `r` will read, in the order in which one thing leads to the next.
  void prefetch(size_t r, const Objects& objects) const {
    const size_t rows = objects.rows(), ahead = r + kAhead, near = r + kNear;
    if (ahead < rows) {
      fetch(objects.states[ahead], sizeof(PyDictObject));
      fetch(objects.handles[ahead][kGrad], sizeof(at::Tensor));
      const Hint* hint = hints_[ahead].data();
      each_own(ahead, objects, [&](const at::Tensor& t) {
        fetch(&t, sizeof(at::Tensor));
        fetch(hint->impl, sizeof(c10::TensorImpl));
        fetch(hint++->storage, kStorageBytes);
      });
    }
    // The gradient is another tensor at every step: only the parameter leads to it.
    if (near < rows) {
      PyObject* const entries = objects.states[near];
      if (!DictWitness::kHasVersions && entries && PyDict_Check(entries))
        fetch(reinterpret_cast<PyDictObject*>(entries)->ma_keys, 192);
      if (const c10::TensorImpl* grad = grad_of(near, objects)) fetch(grad, sizeof(c10::TensorImpl));
    }
    if (r + kNext < rows)
      if (const c10::TensorImpl* grad = grad_of(r + kNext, objects))
        fetch(grad->unsafe_storage().unsafeGetStorageImpl(), kStorageBytes);
  }

  // Prefetches version counters of rows after `r`.
  void prefetch_versions(size_t r, const Objects& objects) const {
    if (r + kAhead >= objects.rows()) return;
    const Hint* hint = hints_[r + kAhead].data();
    each_own(r + kAhead, objects, [&](const at::Tensor&) {
      __builtin_prefetch(static_cast<const char*>(hint->impl) + kVersionOffset);
      __builtin_prefetch(hint++->version, 1);
    });
  }

 private:
  struct Hint {
    const void *impl, *storage, *version;
  };
  static constexpr size_t kAhead = 12, kNear = 6, kNext = 3;     // rows
  static constexpr int kStorageBytes = 64, kVersionOffset = 40;  // what is read of a StorageImpl, a TensorImpl

  static Hint hint_of(const at::Tensor& t) {
    const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
    // VariableVersion is one pointer to a counter.
    const void* version = *reinterpret_cast<void* const*>(&impl->version_counter());
    return {impl, impl->unsafe_storage().unsafeGetStorageImpl(), version};
  }

  // Visits all handles of a row but its gradient's.
  template <class Visit>
  static void each_own(size_t r, const Objects& objects, Visit visit) {
    objects.for_each_present(r, objects.handles[r], [&](int k, const at::Tensor& t) {
      if (k != kGrad) visit(t);
    });
  }

  static void fetch(const void* address, int bytes) {
    const char* const first = static_cast<const char*>(address);
    for (int byte = 0; byte < bytes; byte += 64) __builtin_prefetch(first + byte);
    __builtin_prefetch(first + bytes - 1);  // it may begin within a line
  }

  static const c10::TensorImpl* grad_of(size_t r, const Objects& objects) {
    if (!THPVariable_CheckExact(objects.params[r]) || objects.grads) return nullptr;
    const at::Tensor& grad = THPVariable_Unpack(objects.params[r]).unsafeGetTensorImpl()->grad();
    return grad.defined() ? grad.unsafeGetTensorImpl() : nullptr;
  }

  std::vector<std::array<Hint, kHandles>> hints_;  // of a row's handles, but for its gradient's
};

}  // namespace genopt
