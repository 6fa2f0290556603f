// Norms, and what they decide: how numbers are joined, and the coefficients that clip gradients. For CPU and CUDA
// alike.
#pragma once

#include "../rules/around.h"

namespace genopt {

// How the elements of a tensor make one number, in double. torch.nn.utils' p-norms for p of 2, 1 and infinity.
enum class Norm : uint8_t { kTwo, kOne, kMax };

template <Norm kNorm>
struct Measure {
  static constexpr Norm kKind = kNorm;
  static constexpr bool kIsMax = kNorm == Norm::kMax;

  // V: double, or several.
  template <class V>
  static GENOPT_INLINE V of(V x) {
    if constexpr (kNorm == Norm::kTwo) return x * x;
    return x < 0 ? -x : x;
  }
  // of(x) * scale + y; the numbers of floats need no scale (plan/binned.h).
  static GENOPT_INLINE double plus(double x, double scale, double y) {
    return of(x) * scale + y;
  }
  static GENOPT_INLINE double plus(float narrow, double, double y) {
    const double x = narrow;
#if defined(__FMA__) || defined(__CUDA_ARCH__)
    if constexpr (kNorm == Norm::kTwo) return __builtin_fma(x, x, y);  // in either case exact but for the sum
#endif
    return of(x) + y;
  }
  template <class V>
  static GENOPT_INLINE V join(V a, V b) {
    if constexpr (kIsMax) return maximum(a, b);
    return a + b;
  }
};

// As Measure, of numbers themselves, of any sign.
struct Themselves {
  static constexpr bool kIsMax = false;

  template <class V>
  static GENOPT_INLINE V of(V x) {
    return x;
  }
  static GENOPT_INLINE double plus(double x, double scale, double y) {
    return x * scale + y;
  }
  template <class V>
  static GENOPT_INLINE V join(V a, V b) {
    return a + b;
  }
};

// How the shares of a rule's totals are added up.
template <class Rule>
using TotalOf = std::conditional_t<kAddsSquares<Rule>, Measure<Norm::kTwo>, Themselves>;

template <class Visit>
GENOPT_INLINE auto with_measure(Norm norm, Visit&& visit) {
  return norm == Norm::kTwo   ? visit(Measure<Norm::kTwo>{})
         : norm == Norm::kOne ? visit(Measure<Norm::kOne>{})
                              : visit(Measure<Norm::kMax>{});
}

GENOPT_INLINE double norm_of(Norm norm, double sum) {
  return norm == Norm::kTwo ? square_root(sum) : sum;
}

// x - x is NaN for infinity and NaN.
GENOPT_INLINE bool is_finite(double x) {
  return x - x == 0;
}

// What clipping to `bound` multiplies with, as torch.nn.utils.clip_grad_norm_; a NaN norm gives NaN.
GENOPT_INLINE double clip_coefficient(double bound, double norm) {
  if (bound < 0 || bound > std::numeric_limits<double>::max()) return 1;
  const double coefficient = bound / (norm + 1e-6);
  return coefficient > 1 ? 1 : coefficient;
}

// Whether a group's tensors are clipped by a norm of their own, and so left out of the optimizer's.
GENOPT_INLINE bool clips_alone(const double* options) {
  return options[kMaxGradNorm] >= 0 || options[kClipPerParam] >= 0 || options[kAgc] >= 0;
}
GENOPT_INLINE bool clips_by_tensor(const double* options) {
  return options[kClipPerParam] >= 0 || options[kAgc] >= 0;
}

// A group's coefficient. `own`: its norm; `shared`: that of all groups which do not clip alone.
GENOPT_INLINE double group_coefficient(const double* options, double max_norm, double own, double shared) {
  return clips_by_tensor(options)     ? 1
         : options[kMaxGradNorm] >= 0 ? clip_coefficient(options[kMaxGradNorm], own)
                                      : clip_coefficient(max_norm, shared);
}

// A tensor's coefficient in a group that clips by tensor. Adaptive clipping: Brock et al., arXiv 2102.06171.
GENOPT_INLINE double tensor_coefficient(const double* options, double norm, double weight_norm) {
  if (options[kClipPerParam] >= 0) return clip_coefficient(options[kClipPerParam], norm);
  const double bound = options[kAgc] * (weight_norm > 1e-3 ? weight_norm : 1e-3);
  return norm > bound ? bound / norm : 1;
}

}  // namespace genopt
