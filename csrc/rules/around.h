// What a step does around an optimizer's rule: to the gradient before it, and to the average of the weights after it.
//
//   g <- factor g                          unscaled, averaged, clipped by a norm, ascending: all in one factor
//   g <- min(max(g, -limit), limit)
//   (the rule)
//   e <- lerp(e, p, 1 - decay)             as torch's AveragedModel: the first average is p itself
//
// A factor is the product of 1 / loss scale, 1 / micro-batches and a clip's coefficient, formed in double.
#pragma once

#include <cstring>
#include <iterator>

#include "../math/random.h"
#include "rule.h"

namespace genopt {

constexpr int kMaxOptions = 8;  // of a rule

// Options that every rule has, after its own; kUnset where a group does not have one.
enum CommonOption { kMaxGradNorm = kMaxOptions, kClipPerParam, kAgc, kClipGradValue, kEmaDecay, kSeed, kAllOptions };
constexpr OptionName kCommonOptions[] = {{"max_grad_norm"},   {"clip_per_param"}, {"agc"},
                                         {"clip_grad_value"}, {"ema_decay"},      {"rounding_seed"}};
constexpr double kUnset = -1;

template <class T>
struct Around {
  T factor, limit;
  Lerp<T> to_average;

  Around() = default;
  GENOPT_INLINE Around(T sign, double clip_value, double ema_decay)
      : factor(sign),
        limit(clip_value < 0 ? std::numeric_limits<T>::infinity() : static_cast<T>(clip_value)),
        to_average(1.0 - ema_decay) {
  }

  // Whether a gradient is left as it is.
  GENOPT_INLINE bool is_plain() const {
    return factor == T(1) && limit == std::numeric_limits<T>::infinity();
  }
  // NaN stays NaN.
  template <class V>
  GENOPT_INLINE V gradient(V g) const {
    const V most(limit), least(-limit);
    return larger(least, smaller(most, V(factor * g)));
  }
  template <class V>
  GENOPT_INLINE V average(V e, V p) const {
    return choose(is_unset(e), p, to_average(e, p)) + T(0);
  }
};

// All that a row's elements share. `options`: kAllOptions numbers; t: the step count.
template <class Rule, class T>
struct Scalars {
  typename Rule::template Update<T> update;
  Around<T> around;
  uint32_t random, phase;  // of the step: math/random.h

  GENOPT_INLINE Scalars(const double* options, double t)
      : update(own(options), t),
        around(update.sign, options[kClipGradValue], options[kEmaDecay]),
        random(step_key(options[kSeed], t)),
        phase(step_phase(t)) {
  }

 private:
  static GENOPT_INLINE typename Rule::Options own(const double* options) {
    static_assert(sizeof(typename Rule::Options) == std::size(Rule::kOptions) * sizeof(double));
    typename Rule::Options typed;
    memcpy(&typed, options, sizeof typed);
    return typed;
  }
};

// How the elements of a tensor make one number, in double. torch.nn.utils' p-norms for p of 2, 1 and infinity.
enum class Norm : uint8_t { kTwo, kOne, kMax };

template <Norm kNorm>
struct Measure {
  static GENOPT_INLINE double of(double x) {
    return kNorm == Norm::kTwo ? x * x : x < 0 ? -x : x;
  }
  static GENOPT_INLINE double join(double a, double b) {
    return kNorm == Norm::kMax ? maximum(a, b) : a + b;
  }
};

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
