// Prodigy (Mishchenko and Defazio, arXiv 2306.06101): Adam that estimates its learning rate, in its authors'
// formulation. With p parameter, g gradient, p0 where p began, w weight decay:
//
//   g <- g + w p                               coupled decay only
//   n <- beta3 n + d / d0 c sum(g (p0 - p))
//   s <- beta3 s + d / d0 c g                  with safeguard_warmup d for c
//   d_hat = d_coef n / sum(|s|)
//   d_max <- max(d_max, d_hat)
//   m <- lerp(m, d g, 1 - beta1)
//   v <- lerp(v, (d g)^2, 1 - beta2)
//   d <- min(d_max, growth_rate d)             of max(d, d_hat) where d is still d0
//   p <- p - (c w p  +  c m / (sqrt(v) + d eps))   the decay term where it is decoupled; d g for m where beta1 is 0
//
// d is the estimate of the distance to the solution, and c = d lr as d was before this step, with bias correction times
// sqrt(1 - beta2^k) / (1 - beta1^k) at step k. Sums are over all elements of all rows. While sum(|s|) is 0, there has
// been no gradient yet: nothing but averages moves. Rows with an lr of 0 rest.
#pragma once

#include "rule.h"

namespace genopt {

struct Prodigy {
  static constexpr const char* kName = "prodigy";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"s", "p0", "exp_avg_sq", "exp_avg"};
  static constexpr unsigned kWithoutMomentum = 0b0111, kWithMomentum = 0b1111;
  using Masks = StateMasks<kWithoutMomentum, kWithMomentum>;
  static constexpr unsigned kSquares = 0b0100;  // states that are never negative
  static constexpr unsigned kWeights = 0b0010;  // states that are weights
  static constexpr int kShared = 4;             // d, d_max, n, k
  static constexpr int kTotals = 2;             // d / d0 c g (p0 - p), |s|
  static constexpr bool kPlainTotals = true;
  static constexpr unsigned kTotaled = kOfParam | kOfGrad | kOfFirstState * 0b11;

  struct Options {
    double lr, beta1, beta2, beta3, eps, weight_decay, decouple, use_bias_correction, safeguard_warmup, d0, d_coef,
        growth_rate, maximize;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"betas", 0}, &Options::beta1},
                                                 {{"betas", 1}, &Options::beta2},
                                                 {{"beta3", -1, true}, &Options::beta3},
                                                 {{"eps"}, &Options::eps},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"decouple"}, &Options::decouple},
                                                 {{"use_bias_correction"}, &Options::use_bias_correction},
                                                 {{"safeguard_warmup"}, &Options::safeguard_warmup},
                                                 {{"d0"}, &Options::d0},
                                                 {{"d_coef"}, &Options::d_coef},
                                                 {{"growth_rate", -1, false, {}, true}, &Options::growth_rate},
                                                 {{"maximize"}, &Options::maximize}};

  static GENOPT_INLINE unsigned used_states(const Options& o) {
    return o.beta1 != 0 ? kWithMomentum : kWithoutMomentum;
  }
  static GENOPT_INLINE bool needs_totals(const Options&) {
    return true;
  }
  static GENOPT_INLINE double beta3_of(const Options& o) {
    return o.beta3 < 0 ? square_root(o.beta2) : o.beta3;
  }

  template <class T>
  struct Update {
    Lerp<T> m_lerp, v_lerp;
    T d, beta3, s_rate, n_rate, rate, eps, l2, decay, sign;  // n_rate: 0: the row rests

    GENOPT_INLINE Update(const Options& o, double /*t*/, const double* shared) {
      const double estimate = shared[0], k = shared[3] + 1.0;
      double correction = 1.0;
      if (o.use_bias_correction != 0) correction = square_root(1.0 - power(o.beta2, k)) / (1.0 - power(o.beta1, k));
      const double c = estimate * o.lr * correction, ratio = estimate / o.d0;
      m_lerp = Lerp<T>(1.0 - o.beta1);
      v_lerp = Lerp<T>(1.0 - o.beta2);
      d = static_cast<T>(estimate);
      beta3 = static_cast<T>(beta3_of(o));
      s_rate = static_cast<T>(ratio * (o.safeguard_warmup != 0 ? estimate : c));
      n_rate = static_cast<T>(ratio * c);
      rate = static_cast<T>(c);
      eps = static_cast<T>(estimate * o.eps);
      l2 = static_cast<T>(o.decouple != 0 ? 0.0 : o.weight_decay);
      decay = static_cast<T>(o.decouple != 0 ? c * o.weight_decay : 0.0);
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    template <class V>
    GENOPT_INLINE V next(V s, V g) const {
      return beta3 * s + s_rate * g;
    }
    template <unsigned kUsed, class V>
    GENOPT_INLINE void share(V (&shares)[kMaxTotals], V p, V g, V& s, V& p0, auto&...) const {
      const bool rests = !is_set(n_rate);
      g = is_set(l2) ? g + l2 * p : g;
      shares[0] = choose(rests, V(0), n_rate * g * (p0 - p));
      shares[1] = choose(rests, V(0), absolute(next(s, g)));
    }
    GENOPT_INLINE void settle(const Options& o, const double* totals, double* shared) {
      if (totals[1] == 0) {
        rate = decay = 0;
        return;
      }
      const double n = beta3_of(o) * shared[2] + totals[0], estimate = o.d_coef * n / totals[1];
      const double from = shared[0] == o.d0 ? larger(estimate, shared[0]) : shared[0];
      shared[1] = larger(estimate, shared[1]);
      shared[0] = smaller(from * o.growth_rate, shared[1]);
      shared[2] = n;
      shared[3] += 1.0;
      eps = static_cast<T>(shared[0] * o.eps);
      if (o.beta1 == 0) rate = static_cast<T>(rate * shared[0]);
    }
    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& s, V& /*p0*/, V& v, V& m, auto&...) const {
      const bool rests = !is_set(n_rate);
      g = is_set(l2) ? g + l2 * p : g;
      const V scaled = d * g;
      s = choose(rests, s, next(s, g));
      v = choose(rests, v, average_square(v, scaled, v_lerp));
      V u = g;
      if constexpr ((kUsed & kWithMomentum) == kWithMomentum) u = m = choose(rests, m, m_lerp(m, scaled));
      u = rate * u / (square_root(v) + eps);
      p = choose(rests, p, p - with_decay(decay, p, u));
    }
  };
};

}  // namespace genopt
