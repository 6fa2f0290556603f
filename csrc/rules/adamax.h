// Adamax (Kingma and Ba, arXiv 1412.6980, section 7.1), in torch.optim.Adamax's formulation. With p parameter, g
// gradient, m the average of g, u its decayed largest magnitude, w weight decay:
//
//   g <- g + w p
//   m <- lerp(m, g, 1 - beta1)
//   u <- max(beta2 u, |g| + eps)               NaN stays NaN
//   p <- p - lr / (1 - beta1^t)  m / u
#pragma once

#include "rule.h"

namespace genopt {

struct Adamax {
  static constexpr const char* kName = "adamax";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"exp_avg", "exp_inf"};
  static constexpr unsigned kBoth = 0b11;
  using Masks = StateMasks<kBoth>;
  static constexpr unsigned kSquares = 0b10;  // states that are never negative

  struct Options {
    double lr, beta1, beta2, eps, weight_decay, maximize;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"betas", 0}, &Options::beta1},
                                                 {{"betas", 1}, &Options::beta2},
                                                 {{"eps"}, &Options::eps},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"maximize"}, &Options::maximize}};

  static GENOPT_INLINE unsigned used_states(const Options&) {
    return kBoth;
  }

  template <class T>
  struct Update {
    Lerp<T> m_lerp;
    T beta2, rate, eps, sign, l2;

    GENOPT_INLINE Update(const Options& o, double t) {
      m_lerp = Lerp<T>(1.0 - o.beta1);
      beta2 = static_cast<T>(o.beta2);
      rate = static_cast<T>(o.lr / (1.0 - power(o.beta1, t)));
      eps = static_cast<T>(o.eps);
      l2 = static_cast<T>(o.weight_decay);
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& m, V& u, auto&...) const {
      g = is_set(l2) ? g + l2 * p : g;
      m = m_lerp(m, g);
      u = maximum(beta2 * u, absolute(g) + eps);
      p = p - rate * m / u;
    }
  };
};

}  // namespace genopt
