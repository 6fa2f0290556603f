// What a step does around an optimizer's rule: to the gradient before it, and to the average of the weights after it.
//
//   g <- factor g                          unscaled, averaged, clipped by a norm, negated to maximize: one factor
//   g <- min(max(g, -limit), limit)
//   (the rule)
//   e <- lerp(e, p, 1 - decay)             as torch's AveragedModel: the first average is p itself
//
// A factor is the product of 1 / loss scale, 1 / micro-batches and a clip's coefficient, formed in double, and of the
// rule's sign. With p parameter, g gradient, e the average.
#pragma once

#include <cstring>
#include <iterator>

#include "../math/random.h"
#include "rule.h"

namespace genopt {

constexpr int kMaxOptions = 13;  // of a rule

// Options that every rule has, after its own; kUnset where a group does not have one (rule.h).
enum CommonOption { kMaxGradNorm = kMaxOptions, kClipPerParam, kAgc, kClipGradValue, kEmaDecay, kSeed, kAllOptions };
constexpr OptionName kCommonOptions[] = {{"max_grad_norm"},   {"clip_per_param"}, {"agc"},
                                         {"clip_grad_value"}, {"ema_decay"},      {"rounding_seed"}};
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

// All that a row's elements share. `options`: kAllOptions numbers; t: the step count; `running`: as update_of() has it.
template <class Rule, class T>
struct Scalars {
  typename Rule::template Update<T> update;
  Around<T> around;
  uint32_t random, phase;  // of the step: math/random.h

  GENOPT_INLINE Scalars(const double* options, double t, double* running)
      : update(update_of<Rule, T>(options, t, running)),
        around(update.sign, options[kClipGradValue], options[kEmaDecay]),
        random(step_key(options[kSeed], t)),
        phase(step_phase(t)) {
  }
};

}  // namespace genopt
