// What a tensor is to the kernels: its dtype, and whether memory alone tells its values.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <optional>

#include "devices.h"

namespace genopt {

// Of a tensor that holds floating-point numbers.
inline std::optional<DType> plain_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
    case at::kComplexFloat:
      return DType::kFloat32;
    case at::kDouble:
    case at::kComplexDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      return std::nullopt;
  }
}

// Of an operand: floating-point numbers, or a state's codes.
inline DType stored_dtype(at::ScalarType type) {
  return type == at::kChar ? DType::kInt8 : type == at::kByte ? DType::kUInt8 : *plain_dtype(type);
}

// The dtypes that parameters, gradients and states may mix.
inline bool may_mix(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

// Whether a dispatch mode or a functorch transform sees every torch operation, and would not see a kernel.
inline bool is_watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::PreDispatch) ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Whether memory alone tells the tensor's values: a strided tensor where there are kernels, neither lazily
// conjugated or negated, nor of a subclass or transform with a dispatch of its own.
inline bool is_in_memory(const at::Tensor& t) {
  constexpr c10::DispatchKeySet kOthers(
      {c10::DispatchKey::Conjugate, c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor, c10::DispatchKey::Python,
       c10::DispatchKey::Functionalize, c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched});
  const c10::DispatchKeySet keys = t.key_set();
  const bool served = keys.has(c10::DispatchKey::CPU) || (keys.has(c10::DispatchKey::CUDA) && has_kernels(t));
  return served && !keys.has_any(kOthers);
}
// Inference tensors may only be changed in inference mode.
inline bool may_be_written(const at::Tensor& t) {
  return !t.is_inference() || c10::InferenceMode::is_enabled();
}
// Whether its storage holds all of its elements: it may have been resized since.
inline bool is_backed(const at::Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t last = t.storage_offset() + t.numel() - 1;
  if (!t.is_contiguous()) {
    last = t.storage_offset();
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  }
  const size_t bytes = t.unsafeGetTensorImpl()->unsafe_storage().nbytes();
  return static_cast<size_t>(last + 1) * t.element_size() <= bytes;
}
// Whether it is in memory, and holds floating-point numbers.
inline bool is_plain(const at::Tensor& t) {
  return is_in_memory(t) && plain_dtype(t.scalar_type()).has_value();
}

template <class Slot>
bool is_held_by_tensor_alone(const Slot& slot) {
  if constexpr (requires { slot.load_pyobj(); }) {
    PyObject* const object = slot.load_pyobj();
    return object && Py_REFCNT(object) == 1;
  } else {
    return false;
  }
}
// Whether no other tensor can share its memory, as with most gradients that backward() makes: nobody else holds it or
// its storage, and that is torch's own.
inline bool is_alone(const at::Tensor& t) {
  const c10::Storage& storage = t.unsafeGetTensorImpl()->unsafe_storage();
  static const c10::DeleterFnPtr host_deleter = c10::GetAllocator(c10::kCPU)->raw_deleter();
  const c10::DeleterFnPtr deleter = storage.data_ptr().get_deleter();
  const bool owned =
      t.is_cpu() ? deleter == host_deleter : deleter == c10::GetAllocator(t.device().type())->raw_deleter();
  if (!owned || storage.use_count() != 1) return false;
  // Its own Python object counts as one.
  return t.use_count() == 1 || (t.use_count() == 2 && is_held_by_tensor_alone(*t.unsafeGetTensorImpl()->pyobj_slot()));
}

}  // namespace genopt
