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

  GENOPT_INLINE T operator()(T start, T end) const {
    return (from_end != T(0) ? end : start) + coefficient * (end - start);
  }
};

// Infinity becomes the largest finite number; NaN stays NaN.
template <class T>
GENOPT_INLINE T finite(T x) {
  return x > std::numeric_limits<T>::max() ? std::numeric_limits<T>::max() : x;
}

// The running average of squares. A gradient whose square overflows counts as the largest finite one:
// the average stays finite and recovers, where infinity would freeze the parameter for good.
template <class T>
GENOPT_INLINE T average_square(T average, T g, const Lerp<T>& lerp) {
  return lerp(finite(average), finite(g * g));
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
template <class T>
GENOPT_INLINE T maximum(T a, T b) {
  const T larger = a > b ? a : b;
  return a != a ? a : larger;
}

GENOPT_INLINE float square_root(float x) {
  return sqrtf(x);
}
GENOPT_INLINE double square_root(double x) {
  return sqrt(x);
}

// p - rate * u through double, so that p is rounded once, and the rate not at all.
template <class T>
GENOPT_INLINE T descend(T p, double rate, double u) {
  return static_cast<T>(static_cast<double>(p) - rate * u);
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
