#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<NAdam>() {
  return make_rule_kernels<NAdam>();
}
}  // namespace genopt::cuda
