// What quantization does to one number: scale of a range, number to code, code to number. The formulas stand in
// genopt_ext/reference/quantize.py, which gives the same bits. Host and device alike; what is walked where:
// quantization.h.
#pragma once

#include <algorithm>

#include "../codecs/plain.h"
#include "../math/random.h"

namespace genopt::quant {

// What numbers of a codec are computed in.
template <class Codec>
using Compute = std::conditional_t<Codec::kDType == DType::kFloat64, double, float>;

// Codes are -highest (one less if asymmetric) to highest.
struct CodeRange {
  int lowest, highest;
  bool symmetric;

  GENOPT_INLINE CodeRange(int bits, bool symmetric)
      : lowest(-(1 << (bits - 1)) + symmetric), highest((1 << (bits - 1)) - 1), symmetric(symmetric) {
  }
};

// How far numbers go above and below 0, as the bits of non-negative numbers: these are ordered as the numbers are, with
// infinity and then NaN on top, so a maximum of integers loses no NaN. Symmetric codes need the larger one alone.
template <class T>
using Key = std::make_signed_t<Bits<T>>;

template <class T>
GENOPT_INLINE Key<T> key_of(T x) {
  return static_cast<Key<T>>(bits_of(x));
}
template <class T>
GENOPT_INLINE T number_of(Key<T> key) {
  T x;
  memcpy(&x, &key, sizeof x);
  return x;
}

template <class T>
struct Reach {
  static constexpr Key<T> kSign = std::numeric_limits<Key<T>>::min();
  Key<T> high = 0, low = 0;

  template <bool kSymmetric>
  GENOPT_INLINE void add(T x) {
    const Key<T> key = key_of(x);
    if constexpr (kSymmetric) {
      const Key<T> magnitude = key & ~kSign;
      high = high > magnitude ? high : magnitude;
    } else {
      const Key<T> negated = key ^ kSign;
      high = high > key ? high : key;
      low = low > negated ? low : negated;
    }
  }
  GENOPT_INLINE void join(const Reach& other) {
    high = high > other.high ? high : other.high;
    low = low > other.low ? low : other.low;
  }
};

constexpr float kSmallestScale = 0x1p-126f;

GENOPT_INLINE bool is_valid(float scale) {
  return scale - scale == 0;
}

// NaN where it would not be finite. At least the smallest normal number: its reciprocal is finite, and numbers below
// keep an error of half of it at most.
template <class T>
GENOPT_INLINE float scale_of(const Reach<T>& reach, CodeRange codes) {
  const T high = number_of<T>(reach.high);
  const T wide = codes.symmetric ? high / static_cast<T>(codes.highest)
                                 : high / static_cast<T>(codes.highest - codes.lowest) +
                                       number_of<T>(reach.low) / static_cast<T>(codes.highest - codes.lowest);
  const float scale = static_cast<float>(wide);
  if (!is_valid(scale)) return std::numeric_limits<float>::quiet_NaN();
  return scale > kSmallestScale ? scale : kSmallestScale;
}

// The nearest integer, ties to even, for numbers of a few digits: adding this puts integers at the last place.
template <class T>
constexpr T kShift = sizeof(T) == 8 ? T(0x1.8p52) : T(0x1.8p23);

template <class T>
GENOPT_INLINE T round_small(T x) {
  return (x + kShift<T>)-kShift<T>;
}

template <class T>
GENOPT_INLINE int zero_point_of(const Reach<T>& reach, float scale, CodeRange codes) {
  if (codes.symmetric || !is_valid(scale)) return 0;
  const T steps = number_of<T>(reach.low) * (T(1) / static_cast<T>(scale));
  const int point = static_cast<int>(round_small(steps)) + codes.lowest;
  return point < codes.highest ? point : codes.highest;
}

// What elements share whose index has the same upper half.
GENOPT_INLINE uint32_t random_key(uint64_t seed, uint64_t index) {
  return mix(mix(mix(static_cast<uint32_t>(seed)) ^ static_cast<uint32_t>(seed >> 32)) ^
             static_cast<uint32_t>(index >> 32));
}

// In [0, 1): a function of key and index alone, so that it does not matter who asks.
GENOPT_INLINE float random_number(uint32_t key, uint32_t index) {
  return static_cast<float>(static_cast<int32_t>(mix(index * 0x9e3779b1u ^ key) >> 8)) * 0x1p-24f;
}

// What encoding needs to know of a unit, the elements that share a scale. Without a valid scale all codes are 0.
template <class T>
struct Encoder {
  T inverse, lowest, highest;  // limits before the zero point is added
  int zero_point;

  GENOPT_INLINE Encoder(T inverse, T lowest, T highest, int zero_point)
      : inverse(inverse), lowest(lowest), highest(highest), zero_point(zero_point) {
  }
  GENOPT_INLINE Encoder(float scale, int zero_point, CodeRange codes) : zero_point(zero_point) {
    const bool valid = is_valid(scale);
    inverse = valid ? T(1) / static_cast<T>(scale) : T(0);
    lowest = static_cast<T>(valid ? codes.lowest - zero_point : 0);
    highest = static_cast<T>(valid ? codes.highest - zero_point : 0);
  }

  // `random` is used if stochastic.
  template <bool kStochastic>
  GENOPT_INLINE int8_t operator()(T x, float random) const {
    T y = x * inverse;
    y = y > lowest ? y : lowest;  // NaN too
    y = y < highest ? y : highest;
    if constexpr (kStochastic) {
      const T nearest = round_small(y), rest = y - nearest;
      const T fraction = rest < T(0) ? rest + T(1) : rest;
      const T floor = rest < T(0) ? nearest - T(1) : nearest;
      y = static_cast<T>(random) < fraction ? floor + T(1) : floor;
    }
    // The last byte of the shifted number is the integer in two's complement.
    return static_cast<int8_t>(static_cast<int8_t>(key_of(y + kShift<T>)) + zero_point);
  }
};

// The number behind a code, within the finite ones up to `largest`; NaN with a NaN scale.
template <class T>
GENOPT_INLINE T number_behind(int code, int zero_point, float scale, T largest) {
  T x = static_cast<T>(code - zero_point) * static_cast<T>(scale);
  x = x > largest ? largest : x;
  return x < -largest ? -largest : x;
}

template <class T>
GENOPT_INLINE T largest_of(DType type) {
  switch (type) {
    case DType::kFloat64:
      return static_cast<T>(sizeof(T) == 8 ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max());
    case DType::kBFloat16:
      return T(0x1.fep127);
    case DType::kFloat16:
      return T(65504);
    default:
      return static_cast<T>(std::numeric_limits<float>::max());
  }
}

// Two codes of 4 bits a byte, the first in the low half.
GENOPT_INLINE uint8_t pack(int first, int second) {
  return static_cast<uint8_t>((first & 15) | (second & 15) << 4);
}
GENOPT_INLINE int unpack(uint8_t byte, int half) {
  return ((byte >> (4 * half) & 15) ^ 8) - 8;
}

}  // namespace genopt::quant
