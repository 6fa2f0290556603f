#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<SgdScheduleFree>() {
  return make_rule_kernels<SgdScheduleFree>();
}
}  // namespace genopt::cuda
