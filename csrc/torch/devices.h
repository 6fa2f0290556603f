// Which device's kernels serve a tensor, and an optimizer's plans on CUDA devices; without CUDA, that there are none.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <vector>

#include "../plan/plan.h"
#ifdef GENOPT_CUDA
#include <torch_queue.h>
#endif

namespace genopt {

#ifdef GENOPT_CUDA
constexpr bool kHasCuda = true;
using cuda::has_kernels;
using cuda::kernel_device;
using cuda::option_device;

class CudaDevices {
 public:
  explicit CudaDevices(const RuleInfo& rule) : rule_(rule) {
  }

  void step(int device, const Plan& plan, const std::vector<Sources>& sources, const DeviceTensors& tensors) {
    auto& there = plans_.try_emplace(device, rule_, device).first->second;
    cuda::with_queue(device, [&](const cuda::Queue& queue) { there.step(plan, sources, tensors, queue); });
  }

  int64_t launches() const {
    int64_t sum = 0;
    for (const auto& [device, plan] : plans_) sum += plan.launches();
    return sum;
  }

 private:
  const RuleInfo& rule_;
  std::map<int, cuda::DevicePlan> plans_;
};
#else
constexpr bool kHasCuda = false;

inline bool has_kernels(const at::Tensor& t) {
  return t.is_cpu();
}
inline int kernel_device(const at::Tensor&) {
  return kHost;
}
inline int option_device(const at::Tensor&) {
  return kHost;
}

class CudaDevices {
 public:
  explicit CudaDevices(const RuleInfo&) {
  }
  void step(int, const Plan&, const std::vector<Sources>&, const DeviceTensors&) {
  }
  int64_t launches() const {
    return 0;
  }
};
#endif

}  // namespace genopt
