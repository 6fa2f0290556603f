#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<MuonMomentum>() {
  return make_rule_kernels<MuonMomentum>();
}
}  // namespace genopt::cuda
