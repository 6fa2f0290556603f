// AdamW without a schedule (Defazio et al., arXiv 2405.15682), in the formulation of its authors' AdamWScheduleFree.
// With p parameter, g gradient, v the average of g^2, w weight decay, z and C as in schedule_free.h:
//
//   v <- lerp(v, g^2, 1 - beta2)
//   u <- g c / (sqrt(v) + eps c) + w p         c = sqrt(1 - beta2^t)
//   p <- lerp(p, z, C) - lr (1 - beta1 (1 - C)) u
//   z <- z - lr u
#pragma once

#include "schedule_free.h"

namespace genopt {

struct AdamWScheduleFree {
  static constexpr const char* kName = "adamw_schedule_free";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"z", "exp_avg_sq"};
  static constexpr const char* kRunning[] = {"weight_sum", "lr_max"};
  static constexpr unsigned kAll = 0b11;
  using Masks = StateMasks<kAll>;
  static constexpr unsigned kSquares = 0b10;  // states that are never negative
  static constexpr unsigned kWeights = 0b01;  // states that are weights

  struct Options {
    double lr, beta1, beta2, eps, weight_decay, warmup_steps, r, weight_lr_power, maximize;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"betas", 0}, &Options::beta1},
                                                 {{"betas", 1}, &Options::beta2},
                                                 {{"eps"}, &Options::eps},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"warmup_steps"}, &Options::warmup_steps},
                                                 {{"r"}, &Options::r},
                                                 {{"weight_lr_power"}, &Options::weight_lr_power},
                                                 {{"maximize"}, &Options::maximize}};

  static GENOPT_INLINE unsigned used_states(const Options&) {
    return kAll;
  }

  template <class T>
  struct Update {
    ScheduleFree<T> average;
    Lerp<T> v_lerp;
    T factor, eps, l2, sign;

    GENOPT_INLINE Update(const Options& o, double t, double* running)
        : average(ScheduleFree<T>::warmed_up(o.lr, t, o.warmup_steps), o.beta1, t, o.r, o.weight_lr_power, running) {
      const double correction = square_root(1.0 - power(o.beta2, t));
      v_lerp = Lerp<T>(1.0 - o.beta2);
      factor = static_cast<T>(correction);
      eps = static_cast<T>(o.eps * correction);
      l2 = static_cast<T>(o.weight_decay);
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& z, V& v, auto&...) const {
      v = average_square(v, g, v_lerp);
      V u = factor * g / (square_root(v) + eps);
      u = is_set(l2) ? u + l2 * p : u;
      average(p, z, u);
    }
  };
};

}  // namespace genopt
