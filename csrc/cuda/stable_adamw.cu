#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<StableAdamW>() {
  return make_rule_kernels<StableAdamW>();
}
}  // namespace genopt::cuda
