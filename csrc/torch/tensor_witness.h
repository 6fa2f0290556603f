// Where a tensor was: compared without a look at what may be gone.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/COWDeleter.h>

#include "../math/numbers.h"

namespace genopt {

// Null where a tensor has none, as a sparse one.
inline const c10::StorageImpl* storage_of(const c10::TensorImpl& impl) {
  return impl.unsafe_storage().unsafeGetStorageImpl();
}
inline const c10::StorageImpl* storage_of(const at::Tensor& t) {
  return storage_of(*t.unsafeGetTensorImpl());
}
// Whether it is to be copied when it is written.
inline bool is_lazy_copy(const c10::StorageImpl& storage) {
  return storage.data_ptr().get_deleter() == c10::impl::cow::cow_deleter;
}

inline void prefetch_bytes(const void* address, int bytes) {
  for (int byte = 0; byte < bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(address) + byte);
}

// Where the parts of a tensor are.
struct TensorWitness {
  const at::Tensor* handle = nullptr;
  const c10::TensorImpl* impl = nullptr;
  const c10::StorageImpl* storage = nullptr;
  void* counter = nullptr;  // of the tensor's version
  const void* memory = nullptr;
  int64_t offset = 0;  // in memory, in elements
  size_t bytes = 0;    // of memory, to the last element

  TensorWitness() = default;
  explicit TensorWitness(const at::Tensor& t)
      : handle(&t),
        impl(t.unsafeGetTensorImpl()),
        storage(storage_of(t)),
        counter(counter_of(*impl)),
        memory(storage->data_ptr().get()),
        offset(t.storage_offset()),
        bytes((offset + t.numel()) * t.itemsize()) {  // there are no gaps
  }

  // Whether they are so still.
  GENOPT_INLINE bool holds() const {
    const c10::TensorImpl& now = *handle->unsafeGetTensorImpl();
    return storage_of(now) == storage && counter_of(now) == counter && storage->data_ptr().get() == memory &&
           handle->storage_offset() == offset && bytes <= storage->nbytes() && !is_lazy_copy(*storage);
  }

  // Where it holds. Tensors made in inference mode have no version.
  void bump() const {
    if (counter) reinterpret_cast<c10::VariableVersion*>(const_cast<void**>(&counter))->bump();
  }

  // Prefetches what holds() will read. What is named may be gone: it is prefetched, not followed.
  void prefetch() const {
    prefetch_bytes(handle, sizeof(at::Tensor));
    prefetch_bytes(impl, sizeof(c10::TensorImpl));
    prefetch_bytes(storage, 64);
  }

  // VariableVersion is one pointer to a counter.
  static void* counter_of(const c10::TensorImpl& impl) {
    static_assert(sizeof(c10::VariableVersion) == sizeof(void*));
    return *reinterpret_cast<void* const*>(&impl.version_counter());
  }
};

}  // namespace genopt
