// Adadelta (Zeiler, arXiv 1212.5701). With p parameter, g gradient, s the average of g^2, a that of the updates'
// squares, w weight decay:
//
//   g <- g + w p
//   s <- lerp(s, g^2, 1 - rho)
//   d <- sqrt(a + eps) / sqrt(s + eps)  g
//   a <- lerp(a, d^2, 1 - rho)
//   p <- p - lr d
#pragma once

#include "rule.h"

namespace genopt {

struct Adadelta {
  static constexpr const char* kName = "adadelta";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"square_avg", "acc_delta"};
  static constexpr unsigned kBoth = 0b11;
  using Masks = StateMasks<kBoth>;
  static constexpr unsigned kSquares = 0b11;  // states that are never negative

  struct Options {
    double lr, rho, eps, weight_decay, maximize;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"rho"}, &Options::rho},
                                                 {{"eps"}, &Options::eps},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"maximize"}, &Options::maximize}};

  static GENOPT_INLINE unsigned used_states(const Options&) {
    return kBoth;
  }

  template <class T>
  struct Update {
    Lerp<T> lerp;
    T rate, eps, sign, l2;

    GENOPT_INLINE Update(const Options& o, double /*t*/) {
      lerp = Lerp<T>(1.0 - o.rho);
      rate = static_cast<T>(o.lr);
      eps = static_cast<T>(o.eps);
      l2 = static_cast<T>(o.weight_decay);
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& s, V& a, auto&...) const {
      g = is_set(l2) ? g + l2 * p : g;
      s = average_square(s, g, lerp);
      const V d = square_root(a + eps) / square_root(s + eps) * g;
      a = average_square(a, d, lerp);
      p = p - rate * d;
    }
  };
};

}  // namespace genopt
