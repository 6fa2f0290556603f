// The kernels of one rule. Included once by each rule's .cu.
#pragma once

#include "lean.cuh"
#include "prologue.cuh"
#include "update.cuh"

namespace genopt::cuda {

template <class Rule>
RuleKernels make_rule_kernels() {
  return {prologue<Rule, kSmallPayload>, prologue<Rule, kLargePayload>, update<Rule, float>, update<Rule, double>,
          lean_kernels<Rule>()};
}

}  // namespace genopt::cuda
