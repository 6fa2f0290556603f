// RAdam (Liu et al., arXiv 1908.03265). With p parameter, g gradient, m and v the averages of g and g^2, w weight
// decay:
//
//   g <- g + w p                               coupled decay only
//   m <- lerp(m, g, 1 - beta1)
//   v <- lerp(v, g^2, 1 - beta2)
//   p <- p - (lr w p  +  a m / (sqrt(v) + eps))   with r > 5; else  a m.  The decay term where it is decoupled
//
// r = r' - 2 t beta2^t / (1 - beta2^t), with r' = 2 / (1 - beta2) - 1, is for how many gradients v stands. And
// a = lr / (1 - beta1^t), with r > 5 times sqrt(1 - beta2^t) and the rectification
// sqrt((r - 4) (r - 2) r' / ((r' - 4) (r' - 2) r)).
#pragma once

#include "rule.h"

namespace genopt {

struct RAdam {
  static constexpr const char* kName = "radam";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq"};
  static constexpr unsigned kMoments = 0b11;
  using Masks = StateMasks<kMoments>;
  static constexpr unsigned kSquares = 0b10;  // states that are never negative

  struct Options {
    double lr, beta1, beta2, eps, weight_decay, maximize, decoupled_weight_decay;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"betas", 0}, &Options::beta1},
                                                 {{"betas", 1}, &Options::beta2},
                                                 {{"eps"}, &Options::eps},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"maximize"}, &Options::maximize},
                                                 {{"decoupled_weight_decay"}, &Options::decoupled_weight_decay}};

  static GENOPT_INLINE unsigned used_states(const Options&) {
    return kMoments;
  }

  template <class T>
  struct Update {
    Lerp<T> m_lerp, v_lerp;
    T rate, eps, sign, l2, decay, rectified;

    GENOPT_INLINE Update(const Options& o, double t) {
      const double beta2_t = power(o.beta2, t), correction2 = 1.0 - beta2_t;
      const double longest = 2.0 / (1.0 - o.beta2) - 1.0, length = longest - 2.0 * t * beta2_t / correction2;
      double a = o.lr / (1.0 - power(o.beta1, t));
      if (length > 5.0) {
        const double ratio = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length);
        a *= square_root(correction2) * square_root(ratio);
      }
      m_lerp = Lerp<T>(1.0 - o.beta1);
      v_lerp = Lerp<T>(1.0 - o.beta2);
      rate = static_cast<T>(a);
      rectified = length > 5.0 ? T(1) : T(0);
      eps = static_cast<T>(o.eps);
      l2 = static_cast<T>(o.decoupled_weight_decay != 0 ? 0.0 : o.weight_decay);
      decay = static_cast<T>(o.decoupled_weight_decay != 0 ? o.lr * o.weight_decay : 0.0);
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& m, V& v, auto&...) const {
      g = is_set(l2) ? g + l2 * p : g;
      m = m_lerp(m, g);
      v = average_square(v, g, v_lerp);
      V u = rate * m;
      u = is_set(rectified) ? u / (square_root(v) + eps) : u;
      p = p - with_decay(decay, p, u);
    }
  };
};

}  // namespace genopt
