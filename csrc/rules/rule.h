// What every rule is made of. A rule is a struct, adam.h for one, that has no data and is only named, as Rule:
//
//   kName, kHasStep, kStates   its name; whether it counts steps; the keys of its states, in the order of apply()
//   kSquares                   states that are never negative, as a mask
//   kRunning                   the keys of states that are one number each; without it: none
//   Masks                      the sets of states that it can be asked to run with
//   Options, kOptions          its hyperparameters, each a double, and where param_groups has them
//   used_states(options)       which of the Masks these options ask for
//   Update<T>(options, t)      what step t's options come to, derived in double and rounded to T
//                              with kRunning: Update<T>(options, t, running), which advances them
//     .apply<kUsed>(p, g, ...)   the element's arithmetic, on T or on several at once, with the states in kUsed; of all
//                              kMaxStates it names its own
//     .sign                      -1 to maximize: Around applies it
#pragma once

#include <cstddef>
#include <iterator>
#include <type_traits>
#include <utility>

#include "../math/numbers.h"

namespace genopt {

constexpr double kUnset = -1;  // of an option: None

// A hyperparameter as param_groups has it: a number under `key`, or item `item` of a tuple there; or None or no key at
// all, if it may be; or a word that stands for 1.
struct OptionName {
  const char* key;
  int item = -1;
  bool is_optional = false;
  const char* word = nullptr;
};

// One of a rule's: its name, and where the rule's struct Options holds it.
template <class Options>
struct Option {
  OptionName name;
  double Options::* member;
};

// A rule's options, from numbers in the order of its kOptions.
template <class Rule>
GENOPT_INLINE typename Rule::Options options_of(const double* numbers) {
  constexpr size_t kCount = std::size(Rule::kOptions);
  typename Rule::Options options;
  static_assert(sizeof options == kCount * sizeof(double), "kOptions has to name each option once");
  [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    ((options.*std::integral_constant<double Rule::Options::*, Rule::kOptions[kIndex].member>::value = numbers[kIndex]),
     ...);
  }(std::make_index_sequence<kCount>{});
  return options;
}

constexpr int kMaxRunning = 2;  // of a rule

template <class Rule>
constexpr int kRunningOf = [] {
  if constexpr (requires { Rule::kRunning; }) {
    return static_cast<int>(std::size(Rule::kRunning));
  } else {
    return 0;
  }
}();

// What step t of a rule comes to. `running`: kRunningOf<Rule> numbers, which are advanced.
template <class Rule, class T>
GENOPT_INLINE typename Rule::template Update<T> update_of(const double* options, double t, double* running) {
  if constexpr (kRunningOf<Rule> > 0) {
    return {options_of<Rule>(options), t, running};
  } else {
    return {options_of<Rule>(options), t};
  }
}

// Decoupled decay of p, added to its update u. A negative one is cautious: it spares what the update moves away from 0
// (Chen et al., arXiv 2510.12402).
constexpr OptionName kCautious = {"cautious", -1, true, "weight_decay"};
GENOPT_INLINE double decay_of(double decay, double cautious) {
  return cautious > 0 ? -decay : decay;
}
template <bool kMayBeCautious = false, class T, class V>
GENOPT_INLINE V with_decay(T decay, V p, V u) {
  if constexpr (kMayBeCautious)
    if (decay < 0) return choose(u * p < V(0), u, V(-decay) * p + u);
  return is_set(decay) ? decay * p + u : u;
}
// Beside states in a rule's kUsed: its decay may be cautious. Kernels that never see one are spared the question.
constexpr unsigned kMayBeCautious = 1u << 31;
// Of a rule that has the option, with which kernels that take any row ask for it.
template <class Rule>
constexpr unsigned kAnyDecay = [] {
  for (const auto& option : Rule::kOptions)
    if (option.name.word) return kMayBeCautious;
  return 0u;
}();

// The sets of states, as bit masks, that a rule can be asked to run with; each is compiled on its own.
template <unsigned... kMasks>
using StateMasks = std::integer_sequence<unsigned, kMasks...>;

}  // namespace genopt
