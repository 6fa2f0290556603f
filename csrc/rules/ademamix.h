// AdEMAMix (Pagliardini, Ablin and Grangier, arXiv 2409.03137): AdamW with a second, slower average of the gradient.
// With p parameter, g gradient, m1 and m2 its fast and its slow average, v the average of g^2, w weight decay:
//
//   m1 <- lerp(m1, g, 1 - beta1)               g itself where beta1 is 0
//   m2 <- lerp(m2, g, 1 - beta3)
//   v  <- lerp(v, g^2, 1 - beta2)
//   p  <- p - (lr w p  +  (a m1 + b m2) / (sqrt(v) + e))
//
// where a = lr c / (1 - beta1^t), b = lr alpha c and e = eps c fold the bias corrections, c = sqrt(1 - beta2^t). With a
// warmup alpha grows linearly from 0, and beta3 from beta1, such that its half-life grows linearly.
#pragma once

#include "rule.h"

namespace genopt {

struct AdEMAMix {
  static constexpr const char* kName = "ademamix";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"exp_avg_fast", "exp_avg_slow", "exp_avg_sq"};
  static constexpr unsigned kFast = 0b001, kOthers = 0b110;
  using Masks = StateMasks<kOthers, kFast | kOthers>;
  static constexpr unsigned kSquares = 0b100;  // states that are never negative

  struct Options {
    double lr, beta1, beta2, beta3, alpha, beta3_warmup, alpha_warmup, eps, weight_decay, maximize;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"betas", 0}, &Options::beta1},
                                                 {{"betas", 1}, &Options::beta2},
                                                 {{"betas", 2}, &Options::beta3},
                                                 {{"alpha"}, &Options::alpha},
                                                 {{.key = "beta3_warmup", .is_optional = true}, &Options::beta3_warmup},
                                                 {{.key = "alpha_warmup", .is_optional = true}, &Options::alpha_warmup},
                                                 {{"eps"}, &Options::eps},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"maximize"}, &Options::maximize}};

  static GENOPT_INLINE unsigned used_states(const Options& o) {
    return o.beta1 != 0 ? kFast | kOthers : kOthers;
  }

  // Of a decay rate: its half-life in steps. And back.
  static GENOPT_INLINE double half_life(double beta) {
    return logarithm(0.5) / logarithm(beta + 1e-8);
  }
  static GENOPT_INLINE double decay_rate(double half_life) {
    return exponential(logarithm(0.5) / half_life);
  }
  static GENOPT_INLINE double beta3_at(const Options& o, double t) {
    if (!(t < o.beta3_warmup)) return o.beta3;
    const double part = t / o.beta3_warmup;
    return decay_rate((1.0 - part) * half_life(o.beta1) + part * half_life(o.beta3));
  }

  template <class T>
  struct Update {
    Lerp<T> fast_lerp, slow_lerp, v_lerp;
    T fast_rate, slow_rate, eps, sign, decay;

    GENOPT_INLINE Update(const Options& o, double t) {
      const double correction = square_root(1.0 - power(o.beta2, t));
      const double alpha = t < o.alpha_warmup ? t / o.alpha_warmup * o.alpha : o.alpha;
      fast_lerp = Lerp<T>(1.0 - o.beta1);
      slow_lerp = Lerp<T>(1.0 - beta3_at(o, t));
      v_lerp = Lerp<T>(1.0 - o.beta2);
      fast_rate = static_cast<T>(o.lr * correction / (1.0 - power(o.beta1, t)));
      slow_rate = static_cast<T>(o.lr * alpha * correction);
      eps = static_cast<T>(o.eps * correction);
      decay = static_cast<T>(o.lr * o.weight_decay);
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& m1, V& m2, V& v, auto&...) const {
      if constexpr ((kUsed & kFast) != 0) m1 = fast_lerp(m1, g);
      m2 = slow_lerp(m2, g);
      v = average_square(v, g, v_lerp);
      const V m = fast_rate * ((kUsed & kFast) != 0 ? m1 : g) + slow_rate * m2;
      V u = m / (square_root(v) + eps);
      p = p - with_decay(decay, p, u);
    }
  };
};

}  // namespace genopt
