#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<AdEMAMix>() {
  return make_rule_kernels<AdEMAMix>();
}
}  // namespace genopt::cuda
