// What every rule is made of, beside the arithmetic of math/numbers.h: the names of its options, its sets of states.
#pragma once

#include <cstddef>
#include <iterator>
#include <type_traits>
#include <utility>

#include "../math/numbers.h"

namespace genopt {

// A hyperparameter as param_groups has it: a number under `key`, or item `item` of a tuple there.
struct OptionName {
  const char* key;
  int item = -1;
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

// The sets of states, as bit masks, that a rule can be asked to run with; each is compiled on its own.
template <unsigned... kMasks>
using StateMasks = std::integer_sequence<unsigned, kMasks...>;

}  // namespace genopt
