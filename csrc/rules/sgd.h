// SGD with momentum, dampening and Nesterov momentum, in torch.optim.SGD's formulation
// (Sutskever et al., 2013, with lr outside of the buffer). With b the momentum buffer:
//
//   g <- g + w p
//   b <- momentum b + (1 - dampening) g        b <- g where b is not yet set (-0.0: see math.h)
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
  static constexpr unsigned kSquares = 0;  // states that are never negative

  static constexpr OptionName kOptions[] = {{"lr"},           {"momentum"}, {"dampening"},
                                            {"weight_decay"}, {"nesterov"}, {"maximize"}};
  struct Options {
    double lr, momentum, dampening, weight_decay, nesterov, maximize;
  };

  static GENOPT_INLINE unsigned used_states(const Options& o) {
    return o.momentum != 0 ? kWithMomentum : kPlain;
  }

  // In double throughout, so that p and b are rounded once each: with momentum 0.9, rounding the 0.9
  // alone would cost more accuracy than all else together.
  template <class T>
  struct Update {
    double rate, momentum, g_weight, l2, nesterov;  // the last: 0 or 1, see Lerp
    T sign;

    GENOPT_INLINE Update(const Options& o, double /*t*/) {
      rate = o.lr;
      momentum = o.momentum;
      g_weight = 1.0 - o.dampening;
      sign = o.maximize != 0 ? T(-1) : T(1);
      l2 = o.weight_decay;
      nesterov = o.nesterov != 0 ? 1.0 : 0.0;
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V grad, V& buffer, V&, V&) const {
      auto g = widened(grad);
      g = l2 != 0.0 ? g + l2 * widened(p) : g;
      if constexpr (kUsed == kWithMomentum) {
        const auto old = widened(buffer);
        const auto b = choose(is_unset(old), g, momentum * old + g_weight * g);
        buffer = narrowed(buffer, b) + T(0);
        g = nesterov != 0.0 ? g + momentum * b : b;
      }
      p = descend(p, rate, g);
    }
  };
};

}  // namespace genopt
