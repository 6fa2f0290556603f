// How kernels are launched.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "device_plan.h"

namespace genopt::cuda {

// At least so many threads, in blocks of kThreads. Throws std::runtime_error.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t threads, const Queue& queue, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads));
  config.blockDim = dim3(kThreads);
  config.stream = queue.stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // told here: torch must not meet it again
  throw std::runtime_error(std::string("genopt_ext: launching a kernel failed: ") + cudaGetErrorString(error));
}

}  // namespace genopt::cuda
