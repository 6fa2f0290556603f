// SGD with momentum, dampening and Nesterov momentum, in torch.optim.SGD's formulation
// (Sutskever et al., 2013, with lr outside of the buffer). With p parameter, g gradient, w weight decay, b the momentum
// buffer:
//
//   g <- g + w p
//   b <- momentum b + (1 - dampening) g        b <- g where b is not yet set (-0.0: see math/numbers.h)
//   p <- p - lr (nesterov ? g + momentum b : b)
#pragma once

#include "rule.h"

namespace genopt {

struct Sgd {
  static constexpr const char* kName = "sgd";
  static constexpr bool kHasStep = false;
  static constexpr const char* kStates[] = {"momentum_buffer"};
  static constexpr unsigned kPlain = 0b0, kWithMomentum = 0b1;
  using Masks = StateMasks<kPlain, kWithMomentum>;
  static constexpr unsigned kSquares = 0;  // states that are never negative

  struct Options {
    double lr, momentum, dampening, weight_decay, nesterov, maximize;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"momentum"}, &Options::momentum},
                                                 {{"dampening"}, &Options::dampening},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"nesterov"}, &Options::nesterov},
                                                 {{"maximize"}, &Options::maximize}};

  static GENOPT_INLINE unsigned used_states(const Options& o) {
    return o.momentum != 0 ? kWithMomentum : kPlain;
  }

  // p is rounded once, b little more. With momentum 0.9, rounding the 0.9 alone would cost more accuracy than all else
  // together.
  template <class T>
  struct Update {
    T rate;
    Factor<T> momentum;
    T g_weight, l2, nesterov, sign;  // nesterov: 0 or 1

    GENOPT_INLINE Update(const Options& o, double /*t*/) {
      rate = static_cast<T>(o.lr);
      momentum = Factor<T>(o.momentum);
      g_weight = static_cast<T>(1.0 - o.dampening);
      sign = o.maximize != 0 ? T(-1) : T(1);
      l2 = static_cast<T>(o.weight_decay);
      nesterov = o.nesterov != 0 ? T(1) : T(0);
    }

    template <class V>
    GENOPT_INLINE V with_penalty(V p, V g) const {
      return is_set(l2) ? multiply_add(V(l2), p, g) : g;
    }
    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& buffer, auto&...) const {
      step<kUsed>(p, with_penalty(p, g), buffer);
    }
    template <unsigned kUsed, class V>
    GENOPT_INLINE void step(V& p, V g, V& buffer) const {
      if constexpr (kUsed == kWithMomentum) {
        buffer = choose(is_unset(buffer), g, momentum(buffer, g_weight * g)) + T(0);
        g = is_set(nesterov) ? multiply_add(V(momentum.most), buffer, g) : buffer;
      }
      p = multiply_add(V(-rate), g, p);
    }
  };
};

}  // namespace genopt
