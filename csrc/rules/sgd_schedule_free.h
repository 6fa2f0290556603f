// SGD without a schedule (Defazio et al., arXiv 2405.15682), in the formulation of its authors' SGDScheduleFree. With p
// parameter, g gradient, w weight decay, beta the momentum, z and C as in schedule_free.h:
//
//   g <- g + w p
//   p <- lerp(p, z, C) - lr (1 - beta (1 - C)) g
//   z <- z - lr g
#pragma once

#include "schedule_free.h"

namespace genopt {

struct SgdScheduleFree {
  static constexpr const char* kName = "sgd_schedule_free";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"z"};
  static constexpr const char* kRunning[] = {"weight_sum", "lr_max"};
  static constexpr unsigned kAll = 0b1;
  using Masks = StateMasks<kAll>;
  static constexpr unsigned kSquares = 0;    // states that are never negative
  static constexpr unsigned kWeights = 0b1;  // states that are weights

  struct Options {
    double lr, momentum, weight_decay, warmup_steps, r, weight_lr_power, maximize;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"momentum"}, &Options::momentum},
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
    T l2, sign;

    GENOPT_INLINE Update(const Options& o, double t, double* running)
        : average(ScheduleFree<T>::warmed_up(o.lr, t, o.warmup_steps), o.momentum, t, o.r, o.weight_lr_power, running),
          l2(static_cast<T>(o.weight_decay)),
          sign(o.maximize != 0 ? T(-1) : T(1)) {
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& z, auto&...) const {
      g = is_set(l2) ? multiply_add(V(l2), p, g) : g;
      average(p, z, g);
    }
  };
};

}  // namespace genopt
