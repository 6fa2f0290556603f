// What the plan asks torch for on CUDA. Its twin in tests/cuda_on_cpu serves CPU tensors instead.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <atomic>

#include "device_plan.h"

namespace genopt::cuda {

// The device whose kernels serve a tensor: kHost on the CPU.
inline int kernel_device(const at::Tensor& t) {
  return t.is_cuda() ? t.get_device() : kHost;
}

// Whether this build has code for the tensor's device; asked once a device.
inline bool has_kernels(const at::Tensor& t) {
  if (!t.is_cuda()) return true;
  static std::array<std::atomic<signed char>, 256> known{};  // 0: not asked
  std::atomic<signed char>& answer = known.at(t.get_device());
  if (!answer) {
    const c10::cuda::CUDAGuard guard(t.device());
    answer = kernels_run_here() ? 1 : -1;
  }
  return answer > 0;
}

// The device on which kernels read an option: kHost where the host reads it.
inline int option_device(const at::Tensor& t) {
  return kernel_device(t);
}

// Calls visit(queue) with the current stream of a device, which is the current device meanwhile.
template <class Visit>
void with_queue(int device, Visit visit) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  const bool capturing = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  visit(Queue{stream, capturing, [stream](size_t bytes) {
                namespace allocator = c10::cuda::CUDACachingAllocator;
                return std::shared_ptr<void>(allocator::raw_alloc_with_stream(bytes, stream), allocator::raw_delete);
              }});
}

}  // namespace genopt::cuda
