#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<Adamax>() {
  return make_rule_kernels<Adamax>();
}
}  // namespace genopt::cuda
