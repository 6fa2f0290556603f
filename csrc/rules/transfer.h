// No optimizer's rule: a gradient is moved through what every step does around one (around.h), as clipping alone and
// accumulation want it. With p the target and g the gradient, `add` 0 or 1:
//
//   p <- add p + g
#pragma once

#include <array>

#include "rule.h"

namespace genopt {

struct Transfer {
  static constexpr const char* kName = "transfer";
  static constexpr bool kHasStep = false;
  static constexpr std::array<const char*, 0> kStates{};
  using Masks = StateMasks<0b0>;
  static constexpr unsigned kSquares = 0;  // states that are never negative

  struct Options {
    double add;
  };
  static constexpr Option<Options> kOptions[] = {{{"add"}, &Options::add}};

  static GENOPT_INLINE unsigned used_states(const Options&) {
    return 0b0;
  }

  template <class T>
  struct Update {
    T add, sign;

    GENOPT_INLINE Update(const Options& o, double /*t*/) : add(static_cast<T>(o.add)), sign(1) {
    }

    // Whether an element would stay as it is, where p is g: clipping leaves it alone then.
    template <class Around>
    GENOPT_INLINE bool is_idle(const Around& around) const {
      return !is_set(add) && around.is_plain();
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, auto&...) const {
      p = is_set(add) ? p + g : g;
    }
  };
};

}  // namespace genopt
