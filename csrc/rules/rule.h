// What every rule is made of, beside the arithmetic of math/numbers.h: the names of its options, its sets of states.
#pragma once

#include <utility>

#include "../math/numbers.h"

namespace genopt {

// A hyperparameter as param_groups has it: a number under `key`, or item `item` of a tuple there.
struct OptionName {
  const char* key;
  int item = -1;
};

// The sets of states, as bit masks, that a rule can be asked to run with; each is compiled on its own.
template <unsigned... kMasks>
using StateMasks = std::integer_sequence<unsigned, kMasks...>;

}  // namespace genopt
