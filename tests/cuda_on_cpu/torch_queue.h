// The twin of csrc/cuda/torch_queue.h that runs CUDA kernels on CPU tensors: they are on device 0.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdlib>

#include "cuda/device_plan.h"

namespace genopt::cuda {

inline int kernel_device(const at::Tensor&) {
  return 0;
}

inline bool has_kernels(const at::Tensor&) {
  return kernels_run_here();
}

// 1-element tensors with a dimension are read by the kernels, those without by the host: both are tested.
inline int option_device(const at::Tensor& t) {
  return t.dim() ? 0 : kHost;
}

template <class Visit>
void with_queue(int, Visit visit) {
  visit(Queue{nullptr, false, [](size_t bytes) { return std::shared_ptr<void>(std::malloc(bytes), std::free); }});
}

}  // namespace genopt::cuda
