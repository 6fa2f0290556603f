#include "rule_kernels.cuh"

namespace genopt::cuda {
template <>
RuleKernels rule_kernels<Adagrad>() {
  return make_rule_kernels<Adagrad>();
}
}  // namespace genopt::cuda
