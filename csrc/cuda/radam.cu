#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<RAdam>() {
  return make_rule_kernels<RAdam>();
}
}  // namespace genopt::cuda
