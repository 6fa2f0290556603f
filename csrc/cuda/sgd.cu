#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<Sgd>() {
  return make_rule_kernels<Sgd>();
}
}  // namespace genopt::cuda
