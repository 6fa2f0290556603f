// ASGD: SGD with averaged weights (Polyak and Juditsky, 1992), in torch.optim.ASGD's formulation. With p parameter, g
// gradient, a the averaged weights, w weight decay:
//
//   g <- g + w p
//   p <- p - (lambd eta p + eta g)
//   a <- lerp(a, p, mu)                        p itself with mu = 1
//   eta <- lr / (1 + lambd lr t)^alpha         for the next step, as is mu; they begin as lr and 1
//   mu <- 1 / max(1, t - t0)
#pragma once

#include "rule.h"

namespace genopt {

struct Asgd {
  static constexpr const char* kName = "asgd";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"ax"};
  static constexpr const char* kRunning[] = {"eta", "mu"};
  static constexpr unsigned kAveraged = 0b1;
  using Masks = StateMasks<kAveraged>;
  static constexpr unsigned kSquares = 0;  // states that are never negative

  struct Options {
    double lr, lambd, alpha, t0, weight_decay, maximize;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"lambd"}, &Options::lambd},
                                                 {{"alpha"}, &Options::alpha},
                                                 {{"t0"}, &Options::t0},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"maximize"}, &Options::maximize}};

  static GENOPT_INLINE unsigned used_states(const Options&) {
    return kAveraged;
  }

  template <class T>
  struct Update {
    Lerp<T> to_average;
    T eta, decay, sign, l2, is_whole;

    GENOPT_INLINE Update(const Options& o, double t, double* running) {
      eta = static_cast<T>(running[0]);
      decay = static_cast<T>(o.lambd * running[0]);
      to_average = Lerp<T>(running[1]);
      is_whole = running[1] == 1.0 ? T(1) : T(0);
      l2 = static_cast<T>(o.weight_decay);
      sign = o.maximize != 0 ? T(-1) : T(1);
      running[0] = o.lr * exponential(-o.alpha * logarithm(1.0 + o.lambd * o.lr * t));
      const double since = t - o.t0;
      running[1] = 1.0 / (since > 1.0 ? since : 1.0);
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& a, auto&...) const {
      g = is_set(l2) ? g + l2 * p : g;
      const V u = eta * g;
      p = p - with_decay(decay, p, u);
      a = is_set(is_whole) ? p : to_average(a, p);
    }
  };
};

}  // namespace genopt
