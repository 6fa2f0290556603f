#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<AdamWScheduleFree>() {
  return make_rule_kernels<AdamWScheduleFree>();
}
}  // namespace genopt::cuda
