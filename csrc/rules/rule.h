// What every rule is made of. A rule is a struct, adam.h for one, that has no data and is only named, as Rule:
//
//   kName, kHasStep, kStates   its name; whether it counts steps; the keys of its states, in the order of apply()
//   kSquares                   states that are never negative, as a mask
//   kRunning                   the keys of states that are one number each; without it: none
//   kWeights                   states that are weights and not moments, as a mask; without it: none. They are kept as
//                              weights are, in float for 16 bits, whatever is asked of moments
//   Masks                      the sets of states that it can be asked to run with
//   Options, kOptions          its hyperparameters, each a double, and where param_groups has them
//   used_states(options)       which of the Masks these options ask for
//   Update<T>(options, t)      what step t's options come to, derived in double and rounded to T
//                              with kRunning: Update<T>(options, t, running), which advances them
//     .apply<kUsed>(p, g, ...)   the element's arithmetic, on T or on several at once, with the states in kUsed; of all
//                              kMaxStates it names its own
//     .sign                      -1 to maximize: Around applies it
//     .is_cautious()             if an option is kCautious: whether kernels are needed that ask for it
//   allows(options)            without it: all; else others are refused
//
// A rule may need to know something of a whole row before it steps the first element, as LAMB does the norm of its
// update. It then has, beside these:
//
//   kTotals, kTotaled          how many numbers; the operands that they are made of, as a mask: kOfParam, ...
//   needs_totals(options)      whether these options ask for them
//     .share<kUsed>(shares, p, g, ...)   an element's kTotals numbers, whose squares are added up, in double;
//                              with kPlainTotals they themselves
//     .settle(totals, count)     takes what all `count` elements come to
//
// Or, before that, something of each row and each column of the matrices that a tensor's last two dimensions make, as
// Adafactor how large its gradients are. It then has states that are factors:
//
//   kFactored                  two states next to one another, as a mask, which tensors of two dimensions and more have
//                              in the place of all others: a number for each row, and one for each column. An element
//                              is given that of its row, divided by its matrix' divisor, and that of its column
//     .factor(state, mean_square)   what one becomes, of the mean square of its gradients, in double
//     .divisor(mean)           of a matrix, of the mean of what its rows have become
//
// Or of all rows together, as Prodigy the distance from where training began. It then has numbers that all rows share:
//
//   kShared                    how many; Update<T>(options, t, shared) reads them
//     .settle(options, totals, shared)   takes what all rows come to, and advances them
#pragma once

#include <bit>
#include <cstddef>
#include <iterator>
#include <type_traits>
#include <utility>

#include "../math/numbers.h"

namespace genopt {

constexpr double kUnset = -1;  // of an option: None

// A hyperparameter as param_groups has it: a number under `key`, or item `item` of a tuple there; or None or no key at
// all, if it may be; or one of two words, which stand for 1 and 2.
struct OptionName {
  const char* key;
  int item = -1;
  bool is_optional = false;
  const char* words[2] = {};
  bool may_be_infinite = false;
  bool is_eps = false;  // None is the machine epsilon of the parameter's dtype
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

template <class Rule>
constexpr unsigned kWeightsOf = [] {
  if constexpr (requires { Rule::kWeights; }) {
    return Rule::kWeights;
  } else {
    return 0u;
  }
}();

template <class Rule>
constexpr unsigned kFactorsOf = [] {
  if constexpr (requires { Rule::kFactored; }) {
    return Rule::kFactored;
  } else {
    return 0u;
  }
}();

template <class Rule>
constexpr int kFirstFactor = std::countr_zero(kFactorsOf<Rule>);

// Of a rule's options: the one of which None is an epsilon; -1: there is none.
template <class Rule>
constexpr int kEpsOf = [] {
  for (size_t i = 0; i < std::size(Rule::kOptions); ++i)
    if (Rule::kOptions[i].name.is_eps) return static_cast<int>(i);
  return -1;
}();

constexpr int kMaxShared = 4;  // of a rule

template <class Rule>
constexpr int kSharedOf = [] {
  if constexpr (requires { Rule::kShared; }) {
    return Rule::kShared;
  } else {
    return 0;
  }
}();

// What step t of a rule comes to. `running`: kRunningOf<Rule> numbers, which are advanced, or kSharedOf<Rule>.
template <class Rule, class T>
GENOPT_INLINE typename Rule::template Update<T> update_of(const double* options, double t, double* running) {
  if constexpr (kRunningOf<Rule> + kSharedOf<Rule> > 0) {
    return {options_of<Rule>(options), t, running};
  } else {
    return {options_of<Rule>(options), t};
  }
}

constexpr int kMaxTotals = 2;  // of a rule

// Operands that totals are made of; states follow.
constexpr unsigned kOfParam = 0b1, kOfGrad = 0b10, kOfFirstState = 0b100;

template <class Rule>
constexpr int kTotalsOf = [] {
  if constexpr (requires { Rule::kTotals; }) {
    return Rule::kTotals;
  } else {
    return 0;
  }
}();

// The operands that totals are made of, of rows with the states in kUsed.
template <class Rule, unsigned kUsed>
constexpr unsigned kTotaledOf = [] {
  if constexpr (kTotalsOf<Rule> > 0) {
    return Rule::kTotaled & (kOfParam | kOfGrad | kUsed * kOfFirstState);
  } else {
    return 0u;
  }
}();

// Whether the squares of what elements share are added up, or they themselves.
template <class Rule>
constexpr bool kAddsSquares = [] {
  if constexpr (requires { Rule::kPlainTotals; }) {
    return !Rule::kPlainTotals;
  } else {
    return true;
  }
}();

// What is cautious: decay, which then spares what the update moves away from 0 (Chen et al., arXiv 2510.12402); or the
// update, which is then 0 where the gradient has not its sign (Liang et al., arXiv 2411.16085).
constexpr OptionName kCautious = {"cautious", -1, true, {"weight_decay", "update"}};
constexpr double kCautiousDecay = 1, kCautiousUpdate = 2;

// Decoupled decay of p, added to its update u. A negative one is cautious.
GENOPT_INLINE double decay_of(double decay, double cautious) {
  return cautious == kCautiousDecay ? -decay : decay;
}
template <bool kMayBeCautious = false, class T, class V>
GENOPT_INLINE V with_decay(T decay, V p, V u) {
  if constexpr (kMayBeCautious)
    if (decay < 0) return choose(u * p < V(0), u, V(-decay) * p + u);
  return is_set(decay) ? decay * p + u : u;
}

// What a cautious update is multiplied with, so that a row moves as far as all of its update would; 0: it is not
// cautious. Of a row's total, the count of what moves.
GENOPT_INLINE double cautious_gain(double moving, double count) {
  return 1.0 / larger(moving / count, 1e-3);
}
// Above 0 where x and g have the same sign. Their product may underflow.
template <class V>
GENOPT_INLINE V along(V x, V g) {
  return choose(g > V(0), x, choose(g < V(0), -x, V(0)));
}
template <class T, class V>
GENOPT_INLINE V with_caution(T gain, V u, V x, V g) {
  return is_set(gain) ? choose(along(x, g) > V(0), V(gain), V(0)) * u : u;  // NaN stays NaN
}

// Beside states in a rule's kUsed: it may be cautious. Kernels that never are so are spared the question.
constexpr unsigned kMayBeCautious = 1u << 31;
// Of a rule that has the option, with which kernels that take any row ask for it.
template <class Rule>
constexpr unsigned kAnyDecay = [] {
  for (const auto& option : Rule::kOptions)
    if (option.name.words[0]) return kMayBeCautious;
  return 0u;
}();

// The sets of states, as bit masks, that a rule can be asked to run with; each is compiled on its own.
template <unsigned... kMasks>
using StateMasks = std::integer_sequence<unsigned, kMasks...>;

}  // namespace genopt
