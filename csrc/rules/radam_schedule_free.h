// RAdam without a schedule (Defazio et al., arXiv 2405.15682), in the formulation of its authors' RAdamScheduleFree.
// With p parameter, g gradient, v the average of g^2, w weight decay, z and C as in schedule_free.h:
//
//   v <- lerp(v, g^2, 1 - beta2)
//   u <- g c / (sqrt(v) + eps c) + w p         c = sqrt(1 - beta2^t); g + w p where not rectified
//   p <- lerp(p, z, C) - a lr (1 - beta1 (1 - C)) u
//   z <- z - a lr u
//
// a rectifies the learning rate where the average has a length above 4, as in radam.h; before, it is 0 in a silent
// phase, else 1.
#pragma once

#include "schedule_free.h"

namespace genopt {

struct RAdamScheduleFree {
  static constexpr const char* kName = "radam_schedule_free";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"z", "exp_avg_sq"};
  static constexpr const char* kRunning[] = {"weight_sum", "lr_max"};
  static constexpr unsigned kAll = 0b11;
  using Masks = StateMasks<kAll>;
  static constexpr unsigned kSquares = 0b10;  // states that are never negative
  static constexpr unsigned kWeights = 0b01;  // states that are weights

  struct Options {
    double lr, beta1, beta2, eps, weight_decay, r, weight_lr_power, silent_sgd_phase, maximize;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"betas", 0}, &Options::beta1},
                                                 {{"betas", 1}, &Options::beta2},
                                                 {{"eps"}, &Options::eps},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"r"}, &Options::r},
                                                 {{"weight_lr_power"}, &Options::weight_lr_power},
                                                 {{"silent_sgd_phase"}, &Options::silent_sgd_phase},
                                                 {{"maximize"}, &Options::maximize}};

  static GENOPT_INLINE unsigned used_states(const Options&) {
    return kAll;
  }

  template <class T>
  struct Update {
    ScheduleFree<T> average;
    Lerp<T> v_lerp;
    T factor, eps, l2, sign, rectified;

    GENOPT_INLINE Update(const Options& o, double t, double* running) {
      const double beta2_t = power(o.beta2, t), correction2 = 1.0 - beta2_t, correction = square_root(correction2);
      const double longest = 2.0 / (1.0 - o.beta2) - 1.0, length = longest - 2.0 * t * beta2_t / correction2;
      double lr = o.silent_sgd_phase != 0 ? 0.0 : o.lr;
      if (length > 4.0)
        lr = o.lr *
             square_root((length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length));
      average = ScheduleFree<T>(lr, o.beta1, t, o.r, o.weight_lr_power, running);
      v_lerp = Lerp<T>(1.0 - o.beta2);
      factor = static_cast<T>(correction);
      eps = static_cast<T>(o.eps * correction);
      rectified = length > 4.0 ? T(1) : T(0);
      l2 = static_cast<T>(o.weight_decay);
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& z, V& v, auto&...) const {
      v = average_square(v, g, v_lerp);
      V u = is_set(rectified) ? factor * g / (square_root(v) + eps) : g;
      u = is_set(l2) ? u + l2 * p : u;
      average(p, z, u);
    }
  };
};

}  // namespace genopt
