// The stand-in of tests/cuda_on_cpu, which also tells of every launch before it runs it: see launches.cpp.
#pragma once

#define cudaLaunchKernelEx run_launch
#include_next <cuda_runtime.h>
#undef cudaLaunchKernelEx

#include <vector>

// `arguments`: as they lie in a kernel's parameter space.
void record_launch(const void* kernel, const cudaLaunchConfig_t& config, const std::vector<unsigned char>& arguments);

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  std::vector<unsigned char> space;
  const auto append = [&space]<class Parameter>(const Parameter& parameter) {
    const size_t at = (space.size() + alignof(Parameter) - 1) / alignof(Parameter) * alignof(Parameter);
    space.resize(at + sizeof parameter);
    std::memcpy(&space[at], &parameter, sizeof parameter);
  };
  (append(static_cast<Parameters>(arguments)), ...);
  record_launch(reinterpret_cast<const void*>(kernel), *config, space);
  return run_launch(config, kernel, arguments...);
}
