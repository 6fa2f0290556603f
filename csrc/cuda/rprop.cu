#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<Rprop>() {
  return make_rule_kernels<Rprop>();
}
}  // namespace genopt::cuda
