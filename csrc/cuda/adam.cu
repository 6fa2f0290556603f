#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<Adam>() {
  return make_rule_kernels<Adam>();
}
}  // namespace genopt::cuda
