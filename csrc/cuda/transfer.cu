#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<Transfer>() {
  return make_rule_kernels<Transfer>();
}
}  // namespace genopt::cuda
