// NAdam (Dozat, 2016: "Incorporating Nesterov momentum into Adam"), in torch.optim.NAdam's formulation. With p
// parameter, g gradient, m and v the averages of g and g^2, w weight decay, d momentum decay:
//
//   g <- g + w p                               coupled decay only
//   m <- lerp(m, g, 1 - beta1)
//   v <- lerp(v, g^2, 1 - beta2)
//   p <- p - (lr w p  +  (a g + b m) / (sqrt(v) + e))   the decay term where it is decoupled
//
// mu(t) = beta1 (1 - 0.96^(t d) / 2) is the step's momentum, M the product of all up to mu(t), which is kept. Then
// a = lr c (1 - mu(t)) / (1 - M), b = lr c mu(t + 1) / (1 - M mu(t + 1)) and e = eps c, with c = sqrt(1 - beta2^t).
#pragma once

#include "rule.h"

namespace genopt {

struct NAdam {
  static constexpr const char* kName = "nadam";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq"};
  static constexpr const char* kRunning[] = {"mu_product"};
  static constexpr unsigned kMoments = 0b11;
  using Masks = StateMasks<kMoments>;
  static constexpr unsigned kSquares = 0b10;  // states that are never negative

  struct Options {
    double lr, beta1, beta2, eps, weight_decay, momentum_decay, maximize, decoupled_weight_decay;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"betas", 0}, &Options::beta1},
                                                 {{"betas", 1}, &Options::beta2},
                                                 {{"eps"}, &Options::eps},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"momentum_decay"}, &Options::momentum_decay},
                                                 {{"maximize"}, &Options::maximize},
                                                 {{"decoupled_weight_decay"}, &Options::decoupled_weight_decay}};

  static GENOPT_INLINE unsigned used_states(const Options&) {
    return kMoments;
  }

  template <class T>
  struct Update {
    Lerp<T> m_lerp, v_lerp;
    T of_gradient, of_average, eps, sign, l2, decay;

    GENOPT_INLINE Update(const Options& o, double t, double* running) {
      const double correction = square_root(1.0 - power(o.beta2, t));
      const double mu = momentum(o, t), next = momentum(o, t + 1.0);
      const double product = running[0] *= mu;
      m_lerp = Lerp<T>(1.0 - o.beta1);
      v_lerp = Lerp<T>(1.0 - o.beta2);
      of_gradient = static_cast<T>(o.lr * correction * (1.0 - mu) / (1.0 - product));
      of_average = static_cast<T>(o.lr * correction * next / (1.0 - product * next));
      eps = static_cast<T>(o.eps * correction);
      l2 = static_cast<T>(o.decoupled_weight_decay != 0 ? 0.0 : o.weight_decay);
      decay = static_cast<T>(o.decoupled_weight_decay != 0 ? o.lr * o.weight_decay : 0.0);
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    static GENOPT_INLINE double momentum(const Options& o, double t) {
      constexpr double kLog = -0.040821994520255166;  // of 0.96
      return o.beta1 * (1.0 - 0.5 * exponential(t * o.momentum_decay * kLog));
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& m, V& v, auto&...) const {
      g = is_set(l2) ? g + l2 * p : g;
      m = m_lerp(m, g);
      v = average_square(v, g, v_lerp);
      V u = (of_gradient * g + of_average * m) / (square_root(v) + eps);
      p = p - with_decay(decay, p, u);
    }
  };
};

}  // namespace genopt
