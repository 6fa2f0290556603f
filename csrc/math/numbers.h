// The operations on numbers that rules and codecs share, written once for CPU and CUDA.
// Each is a fixed sequence of IEEE operations (the build forbids contraction: what is fused says so), so that every
// backend and the plain-torch reference (genopt_ext/reference spells the same sequences) give the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define GENOPT_INLINE __host__ __device__ __forceinline__
#else
// Always inlined: a CPU unit compiled for AVX-512 must never lend its copy to one compiled without.
#define GENOPT_INLINE inline __attribute__((always_inline))
#endif

namespace genopt {

// V: a number, or several at once (cpu/vectors.h). Vectors have overloads of their own of choose, larger, smaller,
// absolute, bits_of, is_unset, square_root and multiply_add; all else is written once for both.

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

// -1, 0 or 1; of NaN 0, as torch.sign.
template <class V>
GENOPT_INLINE V sign_of(V x) {
  return choose(x > V(0), V(1), choose(x < V(0), V(-1), V(0)));
}

// The bits of a number, as an integer of its size.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
template <class T>
GENOPT_INLINE Bits<T> bits_of(T x) {
  Bits<T> bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// The number that has these bits.
GENOPT_INLINE double as_double(uint64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Whether an option, which all elements share, is not zero. By its bits: comparing floats takes the port that a
// processor computes vectors on. Flags are options too: compilers vectorize a choice by a number of the elements' size,
// and not by a bool.
template <class T>
GENOPT_INLINE bool is_set(T option) {
  return bits_of(option) << 1 != 0;
}

// States that a first gradient sets rather than changes begin as -0.0, which no update leaves: it adds +0.0 to what it
// stores. So "not yet set" lasts through skipped steps, checkpoints and CUDA graphs without a flag beside the state.
template <class T>
GENOPT_INLINE bool is_unset(T x) {
  return bits_of(x) == Bits<T>(1) << (8 * sizeof(T) - 1);
}

// start + weight * (end - start), from the nearer end, so that weight = 1 gives `end` exactly.
// More accurate than beta * start + (1 - beta) * end: its fixed point does not move with the rounding
// of beta, and it rounds once at the size of the result.
template <class T>
struct Lerp {
  T coefficient, from_end;

  Lerp() = default;
  GENOPT_INLINE explicit Lerp(double weight)
      : coefficient(static_cast<T>(weight)), from_end(coefficient < T(0.5) ? T(0) : T(1)) {
    coefficient = coefficient - from_end;
  }

  template <class V>
  GENOPT_INLINE V operator()(V start, V end) const {
    return choose(is_set(from_end), end, start) + coefficient * (end - start);
  }
};

// Infinity becomes the largest finite number; NaN stays NaN.
template <class T, class V>
GENOPT_INLINE V finite(V x) {
  return smaller(V(std::numeric_limits<T>::max()), x);
}

// The running average of squares. A gradient whose square overflows counts as the largest finite one:
// the average stays finite and recovers, where infinity would freeze the parameter for good.
template <class T, class V>
GENOPT_INLINE V average_square(V average, V g, const Lerp<T>& lerp) {
  return lerp(finite<T>(average), finite<T>(g * g));
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

// a x + b: rounded once in float; in double, which needs no such care, after each operation.
GENOPT_INLINE float multiply_add(float a, float x, float b) {
  return fmaf(a, x, b);
}
GENOPT_INLINE double multiply_add(double a, double x, double b) {
  return a * x + b;
}

// A factor for which T is too coarse, in two parts: the nearest T, and the rest.
template <class T>
struct Factor {
  T most, rest;

  Factor() = default;
  GENOPT_INLINE explicit Factor(double factor)
      : most(static_cast<T>(factor)), rest(static_cast<T>(factor - static_cast<double>(most))) {
  }

  // factor x + b, to little more than one rounding. Infinity stays one, whatever the signs of the two parts.
  template <class V>
  GENOPT_INLINE V operator()(V x, V b) const {
    const V limit(std::numeric_limits<T>::max());
    return multiply_add(V(most), x, multiply_add(V(rest), smaller(larger(x, -limit), limit), b));
  }
};

// The natural logarithm of a positive, normal number and, below, the exponential function, in double: to some units in
// the last place, and with the same bits everywhere.
GENOPT_INLINE double logarithm(double x) {
  constexpr uint64_t kFraction = (uint64_t{1} << 52) - 1, kOne = uint64_t{1023} << 52;
  const uint64_t bits = bits_of(x);
  double exponent = static_cast<int>(bits >> 52) - 1023, fraction;
  const uint64_t as_one = (bits & kFraction) | kOne;
  memcpy(&fraction, &as_one, sizeof fraction);
  if (fraction > 1.4142135623730951) {
    fraction *= 0.5;
    exponent += 1.0;
  }
  const double f = (fraction - 1.0) / (fraction + 1.0), square = f * f;
  double series = 0.0;  // of atanh(f) / f, as f^2 is below 0.03
  for (int k = 25; k > 0; k -= 2) series = series * square + 1.0 / k;
  return exponent * 0.6931471805599453 + 2.0 * f * series;
}
GENOPT_INLINE double exponential(double x) {
  if (!(x > -708.0)) return x != x ? x : 0.0;
  if (x > 709.0) return std::numeric_limits<double>::infinity();
  const int exponent = static_cast<int>(x * 1.4426950408889634 + (x < 0.0 ? -0.5 : 0.5));
  const double rest = (x - exponent * 0.693147180369123816490) - exponent * 1.90821492927058770002e-10;
  double series = 1.0;
  for (int k = 14; k > 0; --k) series = series * (rest * (1.0 / k)) + 1.0;
  const uint64_t scale_bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double scale;
  memcpy(&scale, &scale_bits, sizeof scale);
  return series * scale;
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

// base^exponent of a base that is not negative: whole exponents, as 2, to the last bit.
GENOPT_INLINE double real_power(double base, double exponent) {
  constexpr double kSmallest = 2.2250738585072014e-308;  // a normal number
  if (exponent >= 0.0 && exponent < 65536.0 && static_cast<double>(static_cast<uint64_t>(exponent)) == exponent)
    return power(base, exponent);
  if (!(base >= kSmallest)) return exponent > 0.0 ? 0.0 : std::numeric_limits<double>::infinity();
  return exponential(exponent * logarithm(base));
}

}  // namespace genopt
