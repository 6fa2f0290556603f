#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<Adan>() {
  return make_rule_kernels<Adan>();
}
}  // namespace genopt::cuda
