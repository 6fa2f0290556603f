// Lion (Chen et al., arXiv 2302.06675): the sign of an interpolation of momentum and gradient, decay as AdamW's.
// With p parameter, g gradient, m the momentum, w weight decay:
//
//   u <- sign(lerp(m, g, 1 - beta1))           NaN stays NaN
//   p <- p - (lr w p + lr u)
//   m <- lerp(m, g, 1 - beta2)
//
// Cautious: kCautious (rule.h).
#pragma once

#include "rule.h"

namespace genopt {

struct Lion {
  static constexpr const char* kName = "lion";
  static constexpr bool kHasStep = false;
  static constexpr const char* kStates[] = {"exp_avg"};
  static constexpr unsigned kMomentum = 0b1;
  using Masks = StateMasks<kMomentum>;
  static constexpr unsigned kSquares = 0;  // states that are never negative
  static constexpr int kTotals = 1;        // how many elements a cautious update moves
  static constexpr unsigned kTotaled = kOfGrad | kOfFirstState;

  struct Options {
    double lr, beta1, beta2, weight_decay, maximize, cautious;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"betas", 0}, &Options::beta1},
                                                 {{"betas", 1}, &Options::beta2},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"maximize"}, &Options::maximize},
                                                 {kCautious, &Options::cautious}};

  static GENOPT_INLINE unsigned used_states(const Options&) {
    return kMomentum;
  }
  static GENOPT_INLINE bool needs_totals(const Options& o) {
    return o.cautious == kCautiousUpdate;
  }

  template <class T>
  struct Update {
    Lerp<T> u_lerp, m_lerp;
    T rate, sign, decay, gain;

    GENOPT_INLINE Update(const Options& o, double /*t*/) {
      u_lerp = Lerp<T>(1.0 - o.beta1);
      m_lerp = Lerp<T>(1.0 - o.beta2);
      rate = static_cast<T>(o.lr);
      decay = static_cast<T>(decay_of(o.lr * o.weight_decay, o.cautious));
      gain = needs_totals(o) ? T(1) : T(0);
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    GENOPT_INLINE bool is_cautious() const {
      return decay < 0 || is_set(gain);
    }
    template <unsigned kUsed, class V>
    GENOPT_INLINE void share(V (&shares)[kMaxTotals], V /*p*/, V g, V& m, auto&...) const {
      shares[0] = choose(along(u_lerp(m, g), g) > V(0), V(1), V(0));
    }
    GENOPT_INLINE void settle(const double* totals, double count) {
      gain = static_cast<T>(cautious_gain(totals[0], count));
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& m, auto&...) const {
      const V u = u_lerp(m, g);
      V step = choose(u > V(0), V(rate), choose(u < V(0), V(-rate), u));
      if constexpr ((kUsed & kMayBeCautious) != 0) step = with_caution(gain, step, u, g);
      p = p - with_decay<(kUsed & kMayBeCautious) != 0>(decay, p, step);
      m = m_lerp(m, g);
    }
  };
};

}  // namespace genopt
