#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<Adadelta>() {
  return make_rule_kernels<Adadelta>();
}
}  // namespace genopt::cuda
