// The scalar operations that rules share, written once for CPU and CUDA.
// Each is a fixed sequence of IEEE operations (the build forbids contraction), so that every backend
// and the plain-torch reference (genopt_ext/reference.py spells the same sequences) give the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__CUDACC__)
#define GENOPT_INLINE __host__ __device__ __forceinline__
#else
// Always inlined: a CPU unit compiled for AVX-512 must never lend its copy to one compiled without.
#define GENOPT_INLINE inline __attribute__((always_inline))
#endif

namespace genopt {

// What follows takes numbers, or several at once (cpu/vectors.h), as V: those bring spellings of their own of
// these functions, of is_unset and of square_root.

template <class T>
GENOPT_INLINE T choose(bool condition, T a, T b) {
  return condition ? a : b;
}

template <class T>
GENOPT_INLINE T larger(T a, T b) {
  return a > b ? a : b;
}
template <class T>
GENOPT_INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
GENOPT_INLINE T absolute(T x) {
  return x < 0 ? -x : x;
}

// As double, and back.
template <class T>
GENOPT_INLINE double widened(T x) {
  return static_cast<double>(x);
}
template <class T>
GENOPT_INLINE T narrowed(T, double x) {
  return static_cast<T>(x);
}

// start + weight * (end - start), from the nearer end, so that weight = 1 gives `end` exactly.
// More accurate than beta * start + (1 - beta) * end: its fixed point does not move with the rounding
// of beta, and it rounds once at the size of the result.
template <class T>
struct Lerp {
  T coefficient, from_end;  // a flag as a number: compilers vectorize a choice by it, and not by a bool

  Lerp() = default;
  GENOPT_INLINE explicit Lerp(double weight)
      : coefficient(static_cast<T>(weight)), from_end(coefficient < T(0.5) ? T(0) : T(1)) {
    coefficient = coefficient - from_end;
  }

  template <class V>
  GENOPT_INLINE V operator()(V start, V end) const {
    return choose(from_end != T(0), end, start) + coefficient * (end - start);
  }
};

// Infinity becomes the largest finite number; NaN stays NaN.
template <class T, class V>
GENOPT_INLINE V finite(V x) {
  const V most(std::numeric_limits<T>::max());
  return choose(x > most, most, x);
}

// The running average of squares. A gradient whose square overflows counts as the largest finite one:
// the average stays finite and recovers, where infinity would freeze the parameter for good.
template <class T, class V>
GENOPT_INLINE V average_square(V average, V g, const Lerp<T>& lerp) {
  return lerp(finite<T>(average), finite<T>(g * g));
}

// States that a first gradient sets rather than changes begin as -0.0, which no update leaves: it adds +0.0 to what it
// stores. So "not yet set" lasts through skipped steps, checkpoints and CUDA graphs without a flag beside the state.
template <class T>
GENOPT_INLINE bool is_unset(T x) {
  if constexpr (sizeof(T) == 8) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits == uint64_t{1} << 63;
  } else {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits == uint32_t{1} << 31;
  }
}

// The larger one; NaN in either argument gives NaN (a plain maximum may lose it).
template <class V>
GENOPT_INLINE V maximum(V a, V b) {
  return choose(a != a, a, larger(a, b));
}

GENOPT_INLINE float square_root(float x) {
  return sqrtf(x);
}
GENOPT_INLINE double square_root(double x) {
  return sqrt(x);
}

// p - rate * u through double, so that p is rounded once, and the rate not at all.
template <class V, class Wide>
GENOPT_INLINE V descend(V p, double rate, Wide u) {
  return narrowed(p, widened(p) - rate * u);
}

// base^n by repeated squaring: unlike pow, the same bits in every maths library.
GENOPT_INLINE double power(double base, double n) {
  double result = 1.0;
  for (uint64_t k = n > 0.0 ? static_cast<uint64_t>(n) : 0; k != 0; k >>= 1) {
    if (k & 1) result *= base;
    base *= base;
  }
  return result;
}

// A hyperparameter as param_groups has it: a number under `key`, or item `item` of a tuple there.
struct OptionName {
  const char* key;
  int item = -1;
};

// The sets of states, as bit masks, that a rule can be asked to run with; each is compiled on its own.
template <unsigned... kMasks>
using StateMasks = std::integer_sequence<unsigned, kMasks...>;

}  // namespace genopt
