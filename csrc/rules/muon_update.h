// Muon after its products (muon_momentum.h): decoupled weight decay and the update. With p parameter, g the orthogonal
// matrix, which stands in the gradient's place, w weight decay, r the scale of the matrix' shape:
//
//   p <- p - (lr w p + lr r g)
#pragma once

#include <array>

#include "rule.h"

namespace genopt {

struct MuonUpdate {
  static constexpr const char* kName = "muon_update";
  static constexpr bool kHasStep = false;
  static constexpr std::array<const char*, 0> kStates{};
  using Masks = StateMasks<0b0>;
  static constexpr unsigned kSquares = 0;  // states that are never negative

  struct Options {
    double lr, shape_scale, weight_decay, cautious;
  };
  static constexpr Option<Options> kOptions[] = {{{"lr"}, &Options::lr},
                                                 {{"shape_scale"}, &Options::shape_scale},
                                                 {{"weight_decay"}, &Options::weight_decay},
                                                 {{"cautious", -1, true, {"weight_decay"}}, &Options::cautious}};

  static GENOPT_INLINE unsigned used_states(const Options&) {
    return 0b0;
  }

  template <class T>
  struct Update {
    T rate, decay, sign;

    GENOPT_INLINE Update(const Options& o, double /*t*/) {
      rate = static_cast<T>(o.lr * o.shape_scale);
      decay = static_cast<T>(decay_of(o.lr * o.weight_decay, o.cautious));
      sign = T(1);
    }

    GENOPT_INLINE bool is_cautious() const {
      return decay < 0;
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, auto&...) const {
      const V u = rate * g;
      p = p - with_decay<(kUsed & kMayBeCautious) != 0>(decay, p, u);
    }
  };
};

}  // namespace genopt
