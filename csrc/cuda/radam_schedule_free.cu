#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<RAdamScheduleFree>() {
  return make_rule_kernels<RAdamScheduleFree>();
}
}  // namespace genopt::cuda
