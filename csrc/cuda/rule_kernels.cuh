// The kernels of one rule. Included once by each rule's .cu.
#pragma once

#include "factor.cuh"
#include "lean.cuh"
#include "prologue.cuh"
#include "total.cuh"
#include "update.cuh"

namespace genopt::cuda {

// All lean kernels of an optimizer's rule: one for each of its sets of states and each way that these can be stored,
// and of these again for what is cautious, if the rule may be.
template <class Rule>
std::vector<LeanKernel> lean_kernels() {
  std::vector<LeanKernel> kernels;
  const auto add = [&]<unsigned kUsed, int kWay>() {
    constexpr bool kInFloat = kWays[kWay].state == Form::kFloat;
    // Where there are factors, states are float whatever is asked.
    if constexpr (!std::is_same_v<Rule, Transfer> && (kInFloat || (kUsed && kFactorsOf<Rule> == 0))) {
      TotalKernel total = nullptr;
      if constexpr (kTotalsOf<Rule> > 0) total = lean_total<Rule, kUsed, kWay>;
      kernels.push_back({kUsed, kWay, false, lean_update<Rule, kUsed, kWay, false>, total});
      if constexpr (kAnyDecay<Rule>)
        kernels.push_back({kUsed, kWay, true, lean_update<Rule, kUsed, kWay, true>, total});
    }
  };
  [&]<unsigned... kMasks>(StateMasks<kMasks...>) {
    const auto add_ways = [&]<unsigned kUsed, int... kWay>(std::integer_sequence<int, kWay...>) {
      (add.template operator()<kUsed, kWay>(), ...);
    };
    (add_ways.template operator()<kMasks>(std::make_integer_sequence<int, kWayCount>{}), ...);
  }(typename Rule::Masks{});
  return kernels;
}

template <class Rule>
RuleKernels make_rule_kernels() {
  RuleKernels kernels{prologue<Rule, kSmallPayload>, prologue<Rule, kLargePayload>, update<Rule, float>,
                      update<Rule, double>, lean_kernels<Rule>()};
  if constexpr (kTotalsOf<Rule> > 0) {
    kernels.total_float = total<Rule, float>;
    kernels.total_double = total<Rule, double>;
    if constexpr (kSharedOf<Rule> > 0) kernels.settle = settle<Rule>;
  }
  if constexpr (kFactorsOf<Rule> != 0) {
    kernels.squares[0] = add_squares<Rule, float>;
    kernels.squares[1] = add_squares<Rule, double>;
    kernels.factors[0] = renew_factors<Rule, float>;
    kernels.factors[1] = renew_factors<Rule, double>;
  }
  return kernels;
}

}  // namespace genopt::cuda
