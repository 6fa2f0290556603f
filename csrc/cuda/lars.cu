#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<Lars>() {
  return make_rule_kernels<Lars>();
}
}  // namespace genopt::cuda
