// SGD with momentum, dampening and Nesterov momentum, in torch.optim.SGD's formulation
// (Sutskever et al., 2013, with lr outside of the buffer). With b the momentum buffer:
//
//   g <- g + w p
//   b <- momentum b + (1 - dampening) g        at a parameter's first step: b <- g
//   p <- p - lr (nesterov ? g + momentum b : b)
#pragma once

#include "math.h"

namespace genopt {

struct Sgd {
  static constexpr const char* kName = "sgd";
  static constexpr bool kHasStep = false;
  static constexpr const char* kStates[] = {"momentum_buffer"};
  static constexpr unsigned kPlain = 0b0, kWithMomentum = 0b1;
  using Masks = StateMasks<kPlain, kWithMomentum>;

  static constexpr OptionName kOptions[] = {{"lr"},           {"momentum"}, {"dampening"},
                                            {"weight_decay"}, {"nesterov"}, {"maximize"}};
  struct Options {
    double lr, momentum, dampening, weight_decay, nesterov, maximize;
  };

  static unsigned used_states(const Options& o) {
    return o.momentum != 0 ? kWithMomentum : kPlain;
  }

  template <class T>
  struct Update {
    double rate;
    T momentum, g_weight, sign, l2, nesterov, fresh;  // the last two: 0 or 1, see Lerp

    Update(const Options& o, double /*t*/, bool is_fresh) {
      rate = o.lr;
      momentum = static_cast<T>(o.momentum);
      g_weight = static_cast<T>(1.0 - o.dampening);
      l2 = static_cast<T>(o.weight_decay);
      nesterov = o.nesterov != 0 ? T(1) : T(0);
      fresh = is_fresh ? T(1) : T(0);
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    template <unsigned kUsed>
    GENOPT_INLINE void apply(T& p, T g, T& b, T&, T&) const {
      g = sign * g;
      g = l2 != T(0) ? g + l2 * p : g;
      if constexpr (kUsed == kWithMomentum) {
        b = fresh != T(0) ? g : momentum * b + g_weight * g;
        g = nesterov != T(0) ? g + momentum * b : b;
      }
      p = descend(p, rate, g);
    }
  };
};

}  // namespace genopt
