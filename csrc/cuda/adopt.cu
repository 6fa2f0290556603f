#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<Adopt>() {
  return make_rule_kernels<Adopt>();
}
}  // namespace genopt::cuda
