// StableAdamW (Wortsman et al., arXiv 2304.13013): AdamW that steps a tensor less far where its gradient is larger than
// the average of squares knows. With p parameter, g gradient, m and v the averages of g and g^2, w weight decay:
//
//   m <- lerp(m, g, (1 - beta1) / (1 - beta1^t))      so both averages need no correction
//   v <- lerp(v, g^2, (1 - beta2) / (1 - beta2^t))
//   r <- lr / max(1, sqrt(mean(g^2 / max(v, eps^2))))  of the tensor
//   p <- p - (r w p  +  r m / (sqrt(v) + eps))
#pragma once

#include "rule.h"

namespace genopt {

struct StableAdamW {
  static constexpr const char* kName = "stable_adamw";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq"};
  static constexpr unsigned kMoments = 0b11, kSecond = 0b10;
  using Masks = StateMasks<kMoments>;
  static constexpr unsigned kSquares = kSecond;  // states that are never negative
  static constexpr int kTotals = 1;
  static constexpr bool kPlainTotals = true;
  static constexpr unsigned kTotaled = kOfGrad | kOfFirstState * kSecond;

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
    return kMoments;
  }
  static GENOPT_INLINE bool needs_totals(const Options&) {
    return true;
  }

  template <class T>
  struct Update {
    Lerp<T> m_lerp, v_lerp;
    T rate, eps, eps_square, decay, sign;

    GENOPT_INLINE Update(const Options& o, double t) {
      m_lerp = Lerp<T>((1.0 - o.beta1) / (1.0 - power(o.beta1, t)));
      v_lerp = Lerp<T>((1.0 - o.beta2) / (1.0 - power(o.beta2, t)));
      rate = static_cast<T>(o.lr);
      eps = static_cast<T>(o.eps);
      eps_square = static_cast<T>(o.eps * o.eps);
      decay = static_cast<T>(o.lr * o.weight_decay);
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void share(V (&shares)[kMaxTotals], V /*p*/, V g, V& /*m*/, V& v, auto&...) const {
      const V square = larger(average_square(v, g, v_lerp), V(eps_square));
      shares[0] = choose(square > V(0), g * g / square, V(0));
    }
    GENOPT_INLINE void settle(const double* totals, double count) {
      const double r = square_root(totals[0] / count);
      if (!(r > 1)) return;
      rate = static_cast<T>(rate / r);
      decay = static_cast<T>(decay / r);
    }
    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& m, V& v, auto&...) const {
      m = m_lerp(m, g);
      v = average_square(v, g, v_lerp);
      const V u = rate * m / (square_root(v) + eps);
      p = p - with_decay(decay, p, u);
    }
  };
};

}  // namespace genopt
