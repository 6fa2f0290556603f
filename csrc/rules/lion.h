// Lion (Chen et al., arXiv 2302.06675): the sign of an interpolation of momentum and gradient, decay as AdamW's.
// With p parameter, g gradient, m the momentum, w weight decay:
//
//   u <- sign(lerp(m, g, 1 - beta1))           NaN stays NaN
//   p <- p - (lr w p + lr u)
//   m <- lerp(m, g, 1 - beta2)
#pragma once

#include "rule.h"

namespace genopt {

struct Lion {
  static constexpr const char* kName = "lion";
  static constexpr bool kHasStep = false;
  static constexpr const char* kStates[] = {"exp_avg"};
  static constexpr unsigned kMomentum = 0b1;
  using Masks = StateMasks<kMomentum>;
  static constexpr unsigned kSquares = 0;  // states that are never negative

  struct Options {
    double lr, beta1, beta2, weight_decay, maximize, cautious;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"betas", 0}, &Options::beta1},
                                                 {{"betas", 1}, &Options::beta2},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"maximize"}, &Options::maximize},
                                                 {kCautious, &Options::cautious}};

  static GENOPT_INLINE unsigned used_states(const Options&) {
    return kMomentum;
  }

  template <class T>
  struct Update {
    Lerp<T> u_lerp, m_lerp;
    T rate, sign, decay;

    GENOPT_INLINE Update(const Options& o, double /*t*/) {
      u_lerp = Lerp<T>(1.0 - o.beta1);
      m_lerp = Lerp<T>(1.0 - o.beta2);
      rate = static_cast<T>(o.lr);
      decay = static_cast<T>(decay_of(o.lr * o.weight_decay, o.cautious));
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& m, auto&...) const {
      const V u = u_lerp(m, g);
      const V step = choose(u > V(0), V(rate), choose(u < V(0), V(-rate), u));
      p = p - with_decay<(kUsed & kMayBeCautious) != 0>(decay, p, step);
      m = m_lerp(m, g);
    }
  };
};

}  // namespace genopt
