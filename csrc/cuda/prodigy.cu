#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<Prodigy>() {
  return make_rule_kernels<Prodigy>();
}
}  // namespace genopt::cuda
