// RMSprop (Tieleman and Hinton, lecture 6.5, 2012), centered (Graves, arXiv 1308.0850) and with momentum.
// With p parameter, g gradient, w weight decay, s the average of g^2, c that of g, b the momentum buffer:
//
//   g <- g + w p
//   s <- lerp(s, g^2, 1 - alpha)
//   c <- lerp(c, g, 1 - alpha)                 centered only; then s - c^2 stands for s below
//   b <- momentum b + g / (sqrt(s) + eps)      without momentum: b = g / (sqrt(s) + eps)
//   p <- p - lr b
//
// s - c^2 is known only to one rounding of s: it is kept at or above that, so that a constant gradient
// does not end in the square root of a negative number.
#pragma once

#include "rule.h"

namespace genopt {

struct RMSprop {
  static constexpr const char* kName = "rmsprop";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"square_avg", "momentum_buffer", "grad_avg"};
  static constexpr unsigned kSquare = 0b001, kMomentum = 0b010, kCentered = 0b100;
  using Masks = StateMasks<kSquare, kSquare | kMomentum, kSquare | kCentered, kSquare | kMomentum | kCentered>;
  static constexpr unsigned kSquares = 0b001;  // states that are never negative

  struct Options {
    double lr, alpha, eps, weight_decay, momentum, centered, maximize;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"alpha"}, &Options::alpha},
                                                 {{"eps"}, &Options::eps},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"momentum"}, &Options::momentum},
                                                 {{"centered"}, &Options::centered},
                                                 {{"maximize"}, &Options::maximize}};

  static GENOPT_INLINE unsigned used_states(const Options& o) {
    return kSquare | (o.momentum > 0 ? kMomentum : 0) | (o.centered != 0 ? kCentered : 0);
  }

  template <class T>
  struct Update {
    Lerp<T> lerp;
    T rate, eps, sign, l2, momentum;

    GENOPT_INLINE Update(const Options& o, double /*t*/) {
      rate = static_cast<T>(o.lr);
      lerp = Lerp<T>(1.0 - o.alpha);
      eps = static_cast<T>(o.eps);
      l2 = static_cast<T>(o.weight_decay);
      momentum = static_cast<T>(o.momentum);
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& s, V& b, V& c, auto&...) const {
      g = is_set(l2) ? g + l2 * p : g;
      s = average_square(s, g, lerp);
      V variance = s;
      if constexpr ((kUsed & kCentered) != 0) {
        c = lerp(c, g);
        variance = maximum(s - c * c, std::numeric_limits<T>::epsilon() * s);
      }
      const V u = g / (square_root(variance) + eps);
      if constexpr ((kUsed & kMomentum) != 0) {
        b = momentum * b + u;
        p = multiply_add(V(-rate), b, p);
      } else {
        p = p - rate * u;
      }
    }
  };
};

}  // namespace genopt
