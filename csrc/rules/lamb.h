// LAMB (You et al., arXiv 1904.00962): Adam with a learning rate for each tensor, as timm's and apex's classes have it.
// With p parameter, g gradient, m and v the averages of g and g^2, w weight decay:
//
//   m <- lerp(m, g, 1 - beta1)                 without grad_averaging: beta1 m + g
//   v <- lerp(v, g^2, 1 - beta2)
//   u <- a m / (sqrt(v) + e)  +  w p           the decay term where it is not decoupled
//   p <- p - (lr w p  +  lr q u)               the decay term where it is
//
// where a = sqrt(1 - beta2^t) / (1 - beta1^t) and e = eps sqrt(1 - beta2^t) fold both bias corrections, and q = |p| /
// |u| is a tensor's trust ratio; 1 if either norm is 0. Decoupled decay is taken off before |p| is measured.
#pragma once

#include "rule.h"

namespace genopt {

struct Lamb {
  static constexpr const char* kName = "lamb";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq"};
  static constexpr unsigned kMoments = 0b11;
  using Masks = StateMasks<kMoments>;
  static constexpr unsigned kSquares = 0b10;  // states that are never negative
  static constexpr int kTotals = 2;           // of p and u
  static constexpr unsigned kTotaled = kOfParam | kOfGrad | kOfFirstState * kMoments;

  struct Options {
    double lr, bias_correction, beta1, beta2, eps, weight_decay, grad_averaging, trust_clip, always_adapt,
        decoupled_decay, maximize;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"bias_correction"}, &Options::bias_correction},
                                                 {{"betas", 0}, &Options::beta1},
                                                 {{"betas", 1}, &Options::beta2},
                                                 {{"eps"}, &Options::eps},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"grad_averaging"}, &Options::grad_averaging},
                                                 {{"trust_clip"}, &Options::trust_clip},
                                                 {{"always_adapt"}, &Options::always_adapt},
                                                 {{"decoupled_decay"}, &Options::decoupled_decay},
                                                 {{"maximize"}, &Options::maximize}};

  static GENOPT_INLINE unsigned used_states(const Options&) {
    return kMoments;
  }
  static GENOPT_INLINE bool needs_totals(const Options& o) {
    return o.weight_decay != 0 || o.always_adapt != 0;
  }

  template <class T>
  struct Update {
    Lerp<T> m_lerp, v_lerp;
    T sums_by, scale, eps, rate, l2, decay, clips, sign;  // sums_by: 0: m is an average

    GENOPT_INLINE Update(const Options& o, double t) {
      const bool corrects = o.bias_correction != 0, decouples = o.decoupled_decay != 0;
      const double correction = corrects ? square_root(1.0 - power(o.beta2, t)) : 1.0;
      m_lerp = Lerp<T>(1.0 - o.beta1);
      v_lerp = Lerp<T>(1.0 - o.beta2);
      sums_by = static_cast<T>(o.grad_averaging != 0 ? 0.0 : o.beta1);
      scale = static_cast<T>(corrects ? correction / (1.0 - power(o.beta1, t)) : 1.0);
      eps = static_cast<T>(o.eps * correction);
      rate = static_cast<T>(o.lr);
      l2 = static_cast<T>(decouples ? 0.0 : o.weight_decay);
      decay = static_cast<T>(decouples ? o.lr * o.weight_decay : 0.0);
      clips = o.trust_clip != 0 ? T(1) : T(0);
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    template <class V>
    GENOPT_INLINE V direction(V p, V g, V& m, V& v) const {
      m = is_set(sums_by) ? sums_by * m + g : m_lerp(m, g);
      v = average_square(v, g, v_lerp);
      const V u = scale * m / (square_root(v) + eps);
      return is_set(l2) ? u + l2 * p : u;
    }
    template <unsigned kUsed, class V>
    GENOPT_INLINE void share(V (&shares)[kMaxTotals], V p, V g, V& m, V& v, auto&...) const {
      shares[0] = is_set(decay) ? p - decay * p : p;
      shares[1] = direction(p, g, m, v);
    }
    GENOPT_INLINE void settle(const double* totals, double /*count*/) {
      const double p = square_root(totals[0]), u = square_root(totals[1]);
      const double trust = p > 0 && u > 0 ? p / u : 1;
      rate = static_cast<T>(rate * (is_set(clips) && trust > 1 ? 1 : trust));
    }
    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& m, V& v, auto&...) const {
      const V u = direction(p, g, m, v);
      p = p - with_decay(decay, p, V(rate * u));
    }
  };
};

}  // namespace genopt
