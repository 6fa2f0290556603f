#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<MuonUpdate>() {
  return make_rule_kernels<MuonUpdate>();
}
}  // namespace genopt::cuda
