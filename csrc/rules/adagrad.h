// Adagrad (Duchi, Hazan and Singer, JMLR 12, 2011). With p parameter, g gradient, w weight decay,
// s the sum of g^2:
//
//   g <- g + w p
//   s <- s + g^2
//   p <- p - lr / (1 + (t - 1) lr_decay)  g / (sqrt(s) + eps)
#pragma once

#include "rule.h"

namespace genopt {

struct Adagrad {
  static constexpr const char* kName = "adagrad";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"sum"};
  static constexpr unsigned kSum = 0b1;
  using Masks = StateMasks<kSum>;
  static constexpr unsigned kSquares = 0b1;  // states that are never negative

  struct Options {
    double lr, lr_decay, eps, weight_decay, maximize;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"lr_decay"}, &Options::lr_decay},
                                                 {{"eps"}, &Options::eps},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"maximize"}, &Options::maximize}};

  static GENOPT_INLINE unsigned used_states(const Options&) {
    return kSum;
  }

  template <class T>
  struct Update {
    T rate, eps, sign, l2;

    GENOPT_INLINE Update(const Options& o, double t) {
      rate = static_cast<T>(o.lr / (1.0 + (t - 1.0) * o.lr_decay));
      eps = static_cast<T>(o.eps);
      l2 = static_cast<T>(o.weight_decay);
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& s, auto&...) const {
      g = is_set(l2) ? g + l2 * p : g;
      s = s + g * g;
      p = p - rate * (g / (square_root(s) + eps));
    }
  };
};

}  // namespace genopt
