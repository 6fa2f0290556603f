// What rules without a schedule share (Defazio et al., "The Road Less Scheduled", arXiv 2405.15682). Three sequences of
// weights: z, which an optimizer's updates move; their average x, which is what training is for; and y between them,
// where gradients are taken. The parameter holds y, of which x follows: x = y + (1 - 1 / beta) (z - y).
//
//   lr_max <- max(lr_max, lr)                  lr with its warmup; begins as -1
//   weight_sum <- weight_sum + t^r lr_max^k    this step's weight in the average, k the weight_lr_power; begins as 0
//   y <- lerp(y, z, C) - lr (1 - beta (1 - C)) u    C: this weight divided by the sum, 0 where that is 0
//   z <- z - lr u                              begins as the parameter
#pragma once

#include "rule.h"

namespace genopt {

template <class T>
struct ScheduleFree {
  Lerp<T> to_z;
  T rate, z_rate;

  ScheduleFree() = default;
  GENOPT_INLINE ScheduleFree(double lr, double beta, double t, double r, double lr_power, double* running) {
    running[1] = larger(lr, running[1]);
    const double weight = real_power(t, r) * real_power(running[1], lr_power);
    running[0] += weight;
    const double part = running[0] != 0 ? weight / running[0] : 0.0;
    to_z = Lerp<T>(part);
    rate = static_cast<T>(lr * (1.0 - beta * (1.0 - part)));
    z_rate = static_cast<T>(lr);
  }

  // The learning rate of step t, of which the first `steps` warm up.
  static GENOPT_INLINE double warmed_up(double lr, double t, double steps) {
    return t <= steps ? lr * (t / steps) : lr;
  }

  template <class V>
  GENOPT_INLINE void operator()(V& y, V& z, V u) const {
    y = multiply_add(V(-rate), u, to_z(y, z));
    z = multiply_add(V(-z_rate), u, z);
  }
};

}  // namespace genopt
