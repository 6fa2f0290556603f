// Adam (Kingma and Ba, arXiv 1412.6980), AdamW (Loshchilov and Hutter, arXiv 1711.05101) and AMSGrad
// (Reddi et al., 2018). With p parameter, g gradient, m and v the averages of g and g^2, w weight decay:
//
//   g <- g + w p                               Adam only
//   m <- lerp(m, g, 1 - beta1)
//   v <- lerp(v, g^2, 1 - beta2)               then with amsgrad: v' = max(v', v)
//   p <- p - (lr w p  +  a m / (sqrt(v) + e))  the decay term in AdamW only
//
// where a = lr sqrt(1 - beta2^t) / (1 - beta1^t) and e = eps sqrt(1 - beta2^t) fold both bias
// corrections. Decay and update leave p in one subtraction: p is rounded once a step. Cautious: kCautious (rule.h).
#pragma once

#include "rule.h"

namespace genopt {

struct Adam {
  static constexpr const char* kName = "adam";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr unsigned kMoments = 0b011, kWithMaximum = 0b111;
  using Masks = StateMasks<kMoments, kWithMaximum>;
  static constexpr unsigned kSquares = 0b110;  // states that are never negative
  static constexpr int kTotals = 1;            // how many elements a cautious update moves
  static constexpr unsigned kTotaled = kOfGrad | kOfFirstState;

  struct Options {
    double lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay, cautious;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"betas", 0}, &Options::beta1},
                                                 {{"betas", 1}, &Options::beta2},
                                                 {{"eps"}, &Options::eps},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"amsgrad"}, &Options::amsgrad},
                                                 {{"maximize"}, &Options::maximize},
                                                 {{"decoupled_weight_decay"}, &Options::decoupled_weight_decay},
                                                 {kCautious, &Options::cautious}};

  static GENOPT_INLINE unsigned used_states(const Options& o) {
    return o.amsgrad != 0 ? kWithMaximum : kMoments;
  }
  static GENOPT_INLINE bool needs_totals(const Options& o) {
    return o.cautious == kCautiousUpdate;
  }
  static bool allows(const Options& o) {
    return o.cautious <= 0 || o.decoupled_weight_decay != 0;
  }

  template <class T>
  struct Update {
    Lerp<T> m_lerp, v_lerp;
    T rate, eps, sign, l2, decay, gain;

    GENOPT_INLINE Update(const Options& o, double t) {
      const double correction = square_root(1.0 - power(o.beta2, t));
      m_lerp = Lerp<T>(1.0 - o.beta1);
      v_lerp = Lerp<T>(1.0 - o.beta2);
      rate = static_cast<T>(o.lr * correction / (1.0 - power(o.beta1, t)));
      eps = static_cast<T>(o.eps * correction);
      l2 = static_cast<T>(o.decoupled_weight_decay != 0 ? 0.0 : o.weight_decay);
      decay = static_cast<T>(o.decoupled_weight_decay != 0 ? decay_of(o.lr * o.weight_decay, o.cautious) : 0.0);
      gain = needs_totals(o) ? T(1) : T(0);
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    GENOPT_INLINE bool is_cautious() const {
      return decay < 0 || is_set(gain);
    }
    template <unsigned kUsed, class V>
    GENOPT_INLINE void share(V (&shares)[kMaxTotals], V /*p*/, V g, V& m, auto&...) const {
      shares[0] = choose(along(m_lerp(m, g), g) > V(0), V(1), V(0));
    }
    GENOPT_INLINE void settle(const double* totals, double count) {
      gain = static_cast<T>(cautious_gain(totals[0], count));
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& m, V& v, V& v_max, auto&...) const {
      g = is_set(l2) ? g + l2 * p : g;
      m = m_lerp(m, g);
      v = average_square(v, g, v_lerp);
      constexpr bool kHasMaximum = (kUsed & kWithMaximum) == kWithMaximum;
      if constexpr (kHasMaximum) v_max = maximum(v_max, v);
      V u = rate * m / (square_root(kHasMaximum ? v_max : v) + eps);
      if constexpr ((kUsed & kMayBeCautious) != 0) u = with_caution(gain, u, m, g);
      p = p - with_decay<(kUsed & kMayBeCautious) != 0>(decay, p, u);
    }
  };
};

}  // namespace genopt
