// Adafactor (Shazeer and Stern, arXiv 1804.04235), as torch.optim has it. With p parameter, g gradient, v the average
// of g^2, r and c the averages of its means over each row and each column of a matrix, w weight decay, beta =
// t^beta2_decay:
//
//   v <- lerp(v, g^2, beta)                          of fewer than two dimensions
//   r <- lerp(r, mean of g^2 in the row, beta)       of each matrix in the last two
//   c <- lerp(c, mean of g^2 in the column, beta)
//   v  = r / max(mean(r), eps1) c
//   u  = g / sqrt(max(v, eps1^2))                    0 where that is 0
//   a  = max(eps2, rms(p)) min(lr, 1 / sqrt(t)) / max(1, rms(u) / d)
//   p <- p - (lr w p  +  a u)
//
// where rms is of the whole tensor, and eps1 of None the machine epsilon of the parameter's dtype.
#pragma once

#include "rule.h"

namespace genopt {

struct Adafactor {
  static constexpr const char* kName = "adafactor";
  static constexpr bool kHasStep = true;
  static constexpr const char* kStates[] = {"variance", "row_var", "col_var"};
  static constexpr unsigned kWhole = 0b001, kFactored = 0b110;
  using Masks = StateMasks<kWhole, kFactored>;
  static constexpr unsigned kSquares = 0b111;  // states that are never negative
  static constexpr unsigned kWeights = 0b111;  // in float for 16 bits
  static constexpr int kTotals = 2;            // p, u
  static constexpr unsigned kTotaled = kOfParam | kOfGrad | kOfFirstState * 0b111;

  struct Options {
    double lr, beta2_decay, eps1, eps2, d, weight_decay, maximize;
  };
  static constexpr Option<Options> kOptions[] = {
      {{"lr"}, &Options::lr},
      {{"beta2_decay"}, &Options::beta2_decay},
      {{.key = "eps", .item = 0, .is_optional = true, .is_eps = true}, &Options::eps1},
      {{"eps", 1}, &Options::eps2},
      {{"d"}, &Options::d},
      {{"weight_decay"}, &Options::weight_decay},
      {{"maximize"}, &Options::maximize}};

  static GENOPT_INLINE unsigned used_states(const Options&) {
    return kWhole;
  }
  static GENOPT_INLINE bool needs_totals(const Options&) {
    return true;
  }

  template <class T>
  struct Update {
    Lerp<T> v_lerp;
    T decay, eps1, sign, rate;  // as many as leave no gap before doubles
    double rho, eps2, d;        // of the whole tensor's step, which is rounded once

    GENOPT_INLINE Update(const Options& o, double t) {
      v_lerp = Lerp<T>(real_power(t, o.beta2_decay));
      rho = smaller(o.lr, 1.0 / square_root(t));
      rate = static_cast<T>(rho);
      decay = static_cast<T>(o.lr * o.weight_decay);
      eps1 = static_cast<T>(o.eps1);
      eps2 = o.eps2;
      d = o.d;
      sign = o.maximize != 0 ? T(-1) : T(1);
    }

    GENOPT_INLINE T factor(T state, double mean_square) const {
      return v_lerp(finite<T>(state), finite<T>(static_cast<T>(mean_square)));
    }
    GENOPT_INLINE T divisor(double mean) const {
      const T most = larger(eps1, static_cast<T>(mean));  // NaN stays NaN
      return most == T(0) ? T(1) : most;
    }

    // u. `v` is what it becomes; not used where there are factors: what their product is made of, then.
    template <unsigned kUsed, class V>
    GENOPT_INLINE V direction(V g, V& v, V row, V column) const {
      if constexpr ((kUsed & kFactored) != 0) {
        v = row * column;
      } else {
        v = average_square(v, g, v_lerp);
      }
      const V square = larger(V(eps1 * eps1), v);  // NaN stays NaN
      return choose(square == V(0), V(0), g / square_root(square));
    }
    template <unsigned kUsed, class V>
    GENOPT_INLINE void share(V (&shares)[kMaxTotals], V p, V g, V v, V row, V column, auto&...) const {
      shares[0] = p;
      shares[1] = direction<kUsed>(g, v, row, column);
    }
    GENOPT_INLINE void settle(const double* totals, double count) {
      const double p = square_root(totals[0] / count), u = square_root(totals[1] / count) / d;
      rate = static_cast<T>(rho * (p > eps2 ? p : eps2) / (u > 1 ? u : 1));
    }
    template <unsigned kUsed, class V>
    GENOPT_INLINE void apply(V& p, V g, V& v, V& row, V& column, auto&...) const {
      p = p - with_decay(decay, p, V(rate * direction<kUsed>(g, v, row, column)));
    }
  };
};

}  // namespace genopt
