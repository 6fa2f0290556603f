// Adan (Xie et al., arXiv 2208.06677), in its authors' formulation. With p parameter, g gradient, q the last one
// negated, m, d and v the averages of g, of differences of gradients and of squares, w weight decay:
//
//   m <- lerp(m, g, 1 - beta1)
//   d <- lerp(d, g + q, 1 - beta2)             g + q is 0 at a parameter's first step
//   v <- lerp(v, (g + beta2 (g + q))^2, 1 - beta3)
//   u <- (a m + b d) / (sqrt(v) + e)
//   p <- (p - u) / (1 + lr w)                  with no_prox: p - (lr w p + u)
//   q <- -g
//
// where a = lr c / (1 - beta1^t), b = lr beta2 c / (1 - beta2^t) and e = eps c, with c = sqrt(1 - beta3^t).
#pragma once

#include "rule.h"

namespace genopt {

struct Adan {
  static constexpr const char* kName = "adan";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad"};
  static constexpr unsigned kAll = 0b1111;
  using Masks = StateMasks<kAll>;
  static constexpr unsigned kSquares = 0b10;  // states that are never negative

  struct Options {
    double lr, beta1, beta2, beta3, eps, weight_decay, no_prox, maximize;
  };
  static constexpr Option<Options> kOptions[] = {
      {{"lr"}, &Options::lr},           {{"betas", 0}, &Options::beta1},   {{"betas", 1}, &Options::beta2},
      {{"betas", 2}, &Options::beta3},  {{"eps"}, &Options::eps},          {{"weight_decay"}, &Options::weight_decay},
      {{"no_prox"}, &Options::no_prox}, {{"maximize"}, &Options::maximize}};

  static GENOPT_INLINE unsigned used_states(const Options&) {
    return kAll;
  }

  template <class T>
  struct Update {
    Lerp<T> m_lerp, d_lerp, v_lerp;
    T m_rate, d_rate, beta2, eps, sign, decay, decays_less;

    GENOPT_INLINE Update(const Options& o, double t) {
      const double correction = square_root(1.0 - power(o.beta3, t)), decayed = o.lr * o.weight_decay;
      m_lerp = Lerp<T>(1.0 - o.beta1);
      d_lerp = Lerp<T>(1.0 - o.beta2);
      v_lerp = Lerp<T>(1.0 - o.beta3);
      m_rate = static_cast<T>(o.lr * correction / (1.0 - power(o.beta1, t)));
      d_rate = static_cast<T>(o.lr * o.beta2 * correction / (1.0 - power(o.beta2, t)));
      beta2 = static_cast<T>(o.beta2);
      eps = static_cast<T>(o.eps * correction);
      decay = static_cast<T>(o.no_prox != 0 ? decayed : decayed / (1.0 + decayed));  // of p, or of p - u
      decays_less = o.no_prox != 0 ? T(0) : T(1);
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& m, V& v, V& d, V& q, auto&...) const {
      const V difference = choose(is_unset(q), V(0), g + q);
      m = m_lerp(m, g);
      d = d_lerp(d, difference);
      v = average_square(v, g + beta2 * difference, v_lerp);
      V u = (m_rate * m + d_rate * d) / (square_root(v) + eps);
      u = is_set(decay) ? decay * (is_set(decays_less) ? p - u : p) + u : u;
      p = p - u;
      q = V(0) - g;
    }
  };
};

}  // namespace genopt
