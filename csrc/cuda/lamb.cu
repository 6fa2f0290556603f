#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<Lamb>() {
  return make_rule_kernels<Lamb>();
}
}  // namespace genopt::cuda
