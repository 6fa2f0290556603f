#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<None>() {
  return make_rule_kernels<None>();
}
}  // namespace genopt::cuda
