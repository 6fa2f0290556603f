#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<Asgd>() {
  return make_rule_kernels<Asgd>();
}
}  // namespace genopt::cuda
