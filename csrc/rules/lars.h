// LARS (You, Gitman and Ginsburg, arXiv 1708.03888): SGD with a learning rate for each tensor, as timm's class has it.
// With p parameter, g gradient, w weight decay:
//
//   g <- q (g + w p)
//   p, b <- SGD with momentum                  see sgd.h
//
// where q = trust_coeff |p| / (|g| + w |p| + eps) is a tensor's trust ratio; 1 if either norm is 0. Clipped, it is
// min(q / lr, 1).
#pragma once

#include "sgd.h"

namespace genopt {

struct Lars {
  static constexpr const char* kName = "lars";
  static constexpr bool kHasStep = false;
  static constexpr const char* kStates[] = {"momentum_buffer"};
  using Masks = Sgd::Masks;
  static constexpr unsigned kSquares = 0;  // states that are never negative
  static constexpr int kTotals = 2;        // of p and g
  static constexpr unsigned kTotaled = kOfParam | kOfGrad;

  struct Options {
    double lr, momentum, dampening, weight_decay, nesterov, trust_coeff, eps, trust_clip, always_adapt, maximize;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"momentum"}, &Options::momentum},
                                                 {{"dampening"}, &Options::dampening},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"nesterov"}, &Options::nesterov},
                                                 {{"trust_coeff"}, &Options::trust_coeff},
                                                 {{"eps"}, &Options::eps},
                                                 {{"trust_clip"}, &Options::trust_clip},
                                                 {{"always_adapt"}, &Options::always_adapt},
                                                 {{"maximize"}, &Options::maximize}};

  static GENOPT_INLINE Sgd::Options as_sgd(const Options& o) {
    return {o.lr, o.momentum, o.dampening, o.weight_decay, o.nesterov, o.maximize};
  }
  static GENOPT_INLINE unsigned used_states(const Options& o) {
    return Sgd::used_states(as_sgd(o));
  }
  static GENOPT_INLINE bool needs_totals(const Options& o) {
    return o.weight_decay != 0 || o.always_adapt != 0;
  }

  template <class T>
  struct Update : Sgd::Update<T> {
    T trust_coeff, eps, clip, ratio;  // clip: 0, or the learning rate

    GENOPT_INLINE Update(const Options& o, double t) : Sgd::Update<T>(as_sgd(o), t) {
      trust_coeff = static_cast<T>(o.trust_coeff);
      eps = static_cast<T>(o.eps);
      clip = static_cast<T>(o.trust_clip != 0 ? o.lr : 0.0);
      ratio = T(1);
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void share(V (&shares)[kMaxTotals], V p, V g, auto&...) const {
      shares[0] = p;
      shares[1] = g;
    }
    GENOPT_INLINE void settle(const double* totals, double /*count*/) {
      const double p = square_root(totals[0]), g = square_root(totals[1]);
      const double trust = p > 0 && g > 0 ? trust_coeff * p / (g + p * this->l2 + eps) : 1;
      ratio = static_cast<T>(clip > 0 ? smaller(1.0, trust / clip) : trust);  // NaN stays NaN
    }
    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& buffer, auto&...) const {
      this->template step<kUsed>(p, ratio * this->with_penalty(p, g), buffer);
    }
  };
};

}  // namespace genopt
