// Elements of an operand where they lie, as several values at once: found, loaded, stored. Included (through assembly.h
// or operand.h) by walk.h, once for each GENOPT_CAPABILITY.
#pragma once

#include <array>
#include <type_traits>

#include "../math/random.h"
#include "../plan/row.h"
#include "vectors.h"

namespace genopt::GENOPT_CAPABILITY {

// How values of the compute type are stored as they are.
template <class T>
using Values = std::conditional_t<sizeof(T) == 8, Float64, Float32>;

// Elements at a time, of a row that computes in T: a vector of floats, or one double, which the compiler joins.
template <class T>
using ValuesOf = std::conditional_t<sizeof(T) == 8, double, Floats>;
template <class T>
constexpr int kAtOnce = sizeof(T) == 8 ? 1 : kWidth;

// Element i of an operand that the row has, contiguous and stored with a codec.
template <class Codec>
typename Codec::Stored* element(const Row& row, int operand, int64_t i) {
  return static_cast<typename Codec::Stored*>(row.data[operand]) + i;
}

// Whether an operand is contiguous and aligned, stored with a codec.
template <class Codec>
bool is_direct(const Row& row, int operand) {
  return !row.layout && row.dtype[operand] == Codec::kDType &&
         reinterpret_cast<uintptr_t>(row.data[operand]) % sizeof(typename Codec::Stored) == 0;
}

template <class Codec>
GENOPT_INLINE auto load_values(const typename Codec::Stored* from) {
  if constexpr (std::is_same_v<Codec, BFloat16>) {
    return float_of(load_ints(from) << 16);
  } else if constexpr (sizeof *from == 8) {
    return *from;
  } else {
    return load<Floats>(from);
  }
}
// A vector of them in double.
template <class Codec>
GENOPT_INLINE void load_in_double(const typename Codec::Stored* from, HalfOfDoubles (&halves)[2]) {
  if constexpr (std::is_same_v<Codec, Float32>) {
    for (int k = 0; k < 2; ++k) halves[k] = half_in_double(from + k * kWidth / 2);
  } else if constexpr (std::is_same_v<Codec, Float64>) {
    for (int k = 0; k < 2; ++k) std::memcpy(&halves[k], from + k * kWidth / 2, sizeof halves[k]);
  } else {
    const Floats values = load_values<Codec>(from);
    halves[0] = half_in_double<0>(values);
    halves[1] = half_in_double<1>(values);
  }
}
// Returns what is stored.
template <class Codec, class V>
GENOPT_INLINE V store_values(typename Codec::Stored* to, V x) {
  if constexpr (std::is_same_v<Codec, BFloat16>) {
    const Words bits = BFloat16::encode_bits(x);
    store_ints(to, as_signed(bits));
    return float_of(bits << 16);
  } else if constexpr (sizeof *to == 8) {
    return *to = x;
  } else {
    store(to, x);
    return x;
  }
}

// 0, 1, 2, ...
GENOPT_INLINE Words count_up() {
  alignas(GENOPT_VECTOR_BYTES) static constexpr auto kFirst = [] {
    std::array<uint32_t, kWidth> numbers{};
    for (int j = 0; j < kWidth; ++j) numbers[j] = j;
    return numbers;
  }();
  return load<Words>(kFirst.data());
}

// The rounding thresholds of a tile's elements from i on.
GENOPT_INLINE Words thresholds_from(uint32_t tile_phase, uint32_t i) {
  return threshold_of(threshold_of(tile_phase, i), count_up());
}

}  // namespace genopt::GENOPT_CAPABILITY
