// Rprop (Riedmiller and Braun, 1993), in torch.optim.Rprop's formulation. With p parameter, g gradient, q the last one,
// s how far each element moves:
//
//   s <- clamp(s * (etaplus where g q > 0, etaminus where g q < 0, else 1), least, most)
//   g <- 0 where g q < 0
//   p <- p - sign(g) s
//   q <- g
//
// g q underflows where both are small, which counts as 0. So does NaN, as torch's sign has it.
#pragma once

#include "rule.h"

namespace genopt {

struct Rprop {
  static constexpr const char* kName = "rprop";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"prev", "step_size"};
  static constexpr unsigned kBoth = 0b11;
  using Masks = StateMasks<kBoth>;
  static constexpr unsigned kSquares = 0b10;  // states that are never negative

  struct Options {
    double etaminus, etaplus, step_size_min, step_size_max, maximize;
  };
  static constexpr Option<Options> kOptions[] = {{{"etas", 0}, &Options::etaminus},
                                                 {{"etas", 1}, &Options::etaplus},
                                                 {{"step_sizes", 0}, &Options::step_size_min},
                                                 {{"step_sizes", 1}, &Options::step_size_max},
                                                 {{"maximize"}, &Options::maximize}};

  static GENOPT_INLINE unsigned used_states(const Options&) {
    return kBoth;
  }

  template <class T>
  struct Update {
    T etaminus, etaplus, least, most, sign;

    GENOPT_INLINE Update(const Options& o, double /*t*/) {
      etaminus = static_cast<T>(o.etaminus);
      etaplus = static_cast<T>(o.etaplus);
      least = static_cast<T>(o.step_size_min);
      most = static_cast<T>(o.step_size_max);
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& q, V& s, auto&...) const {
      const V agreement = g * q;
      s = s * choose(agreement > V(0), V(etaplus), choose(agreement < V(0), V(etaminus), V(1)));
      s = larger(V(least), smaller(V(most), s));
      g = choose(agreement < V(0), V(0), g);
      p = p - sign_of(g) * s;
      q = g;
    }
  };
};

}  // namespace genopt
