#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<Adafactor>() {
  return make_rule_kernels<Adafactor>();
}
}  // namespace genopt::cuda
