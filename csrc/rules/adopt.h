// ADOPT (Taniguchi et al., arXiv 2411.02853, algorithm 2). With p parameter, g gradient, v the average of g^2, m that
// of the normalized gradient n, w weight decay:
//
//   g <- g + w p                               coupled decay only
//   n <- clamp(g / max(sqrt(v), eps), -c, c)   v as it was before this step; c = (t - 1)^clip_exponent
//   m <- lerp(m, n, 1 - beta1)
//   p <- p - (lr w p  +  lr m)                 the decay term where it is decoupled
//   v <- lerp(v, g^2, 1 - beta2)
//
// The first step only sets v to g^2: there c is 0, and so are m and the decay.
#pragma once

#include "rule.h"

namespace genopt {

struct Adopt {
  static constexpr const char* kName = "adopt";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq"};
  static constexpr unsigned kMoments = 0b11;
  using Masks = StateMasks<kMoments>;
  static constexpr unsigned kSquares = 0b10;  // states that are never negative

  struct Options {
    double lr, beta1, beta2, eps, weight_decay, decouple, clip_exponent, maximize;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"betas", 0}, &Options::beta1},
                                                 {{"betas", 1}, &Options::beta2},
                                                 {{"eps"}, &Options::eps},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"decouple"}, &Options::decouple},
                                                 {{"clip_exponent", -1, true}, &Options::clip_exponent},
                                                 {{"maximize"}, &Options::maximize}};

  static GENOPT_INLINE unsigned used_states(const Options&) {
    return kMoments;
  }

  template <class T>
  struct Update {
    Lerp<T> m_lerp, v_lerp;
    T rate, eps, limit, sign, l2, decay;

    GENOPT_INLINE Update(const Options& o, double t) {
      const bool begins = t <= 1.0, decouples = o.decouple != 0;
      m_lerp = Lerp<T>(1.0 - o.beta1);
      v_lerp = Lerp<T>(begins ? 1.0 : 1.0 - o.beta2);
      rate = static_cast<T>(o.lr);
      eps = static_cast<T>(o.eps);
      limit = begins                ? T(0)
              : o.clip_exponent < 0 ? std::numeric_limits<T>::infinity()
                                    : static_cast<T>(exponential(o.clip_exponent * logarithm(t - 1.0)));
      l2 = static_cast<T>(decouples ? 0.0 : o.weight_decay);
      decay = static_cast<T>(decouples && !begins ? o.lr * o.weight_decay : 0.0);
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& m, V& v, auto&...) const {
      g = is_set(l2) ? g + l2 * p : g;
      const V n = g / maximum(square_root(v), V(eps));
      m = m_lerp(m, larger(V(-limit), smaller(V(limit), n)));  // NaN stays NaN
      v = average_square(v, g, v_lerp);
      V u = rate * m;
      p = p - with_decay(decay, p, u);
    }
  };
};

}  // namespace genopt
