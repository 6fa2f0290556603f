#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<Lion>() {
  return make_rule_kernels<Lion>();
}
}  // namespace genopt::cuda
