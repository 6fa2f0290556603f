#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<RMSprop>() {
  return make_rule_kernels<RMSprop>();
}
}  // namespace genopt::cuda
