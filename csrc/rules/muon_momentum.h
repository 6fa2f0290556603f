// Muon before its products (Jordan et al., kellerjordan.github.io/posts/muon): momentum, as torch.optim.Muon has it.
// The parameter operand is the matrix that is made orthogonal next, which is written and not read. With u that matrix,
// g gradient, b the momentum buffer:
//
//   b <- lerp(b, g, 1 - momentum)
//   u <- nesterov ? lerp(g, b, momentum) : b
#pragma once

#include "rule.h"

namespace genopt {

struct MuonMomentum {
  static constexpr const char* kName = "muon_momentum";
  static constexpr bool kHasStep = false;
  static constexpr const char* kStates[] = {"momentum_buffer"};
  static constexpr unsigned kMomentum = 0b1;
  using Masks = StateMasks<kMomentum>;
  static constexpr unsigned kSquares = 0;  // states that are never negative

  struct Options {
    double momentum, nesterov;
  };
  static constexpr Option<Options> kOptions[] = {{{"momentum"}, &Options::momentum},
                                                 {{"nesterov"}, &Options::nesterov}};

  static GENOPT_INLINE unsigned used_states(const Options&) {
    return kMomentum;
  }

  template <class T>
  struct Update {
    Lerp<T> b_lerp, u_lerp;
    T nesterov, sign;  // nesterov: 0 or 1

    GENOPT_INLINE Update(const Options& o, double /*t*/) {
      b_lerp = Lerp<T>(1.0 - o.momentum);
      u_lerp = Lerp<T>(o.momentum);
      nesterov = o.nesterov != 0 ? T(1) : T(0);
      sign = T(1);
    }

    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& u, V g, V& b, auto&...) const {
      b = b_lerp(b, g);
      u = is_set(nesterov) ? u_lerp(g, b) : b;
    }
  };
};

}  // namespace genopt
