// How a tile of 256 moments is stored in a byte each: as floats of 8 bits that count down from the tile's scale.
//
//   scale   the tile's largest magnitude, rounded up to 2 fraction bits, as float32
//   code c  the float32 with the bits  bits(scale) - d, where e = L - |c|, d = max(e << 19, (e << 21) - (36 or 18 <<
//   23));
//           c = 0 is zero
//
//                L     octaves with 16 codes each   octaves with 4 below them
//   Int8, signed 127   6                            7.75
//   UInt8        255   12                           15.75
//
// Both ways are integer shifts. What was read is stored as the same code again, and between two codes a value is linear
// in its bits, so that rounding by evenly spread numbers (rules/random.h) is unbiased. It has to be: a moment moves by
// a tenth or a thousandth of itself at a step, codes stand 4 to 25 % apart, and what is rounded to the nearest stays
// where it was. bench/mappings.py compares this map with others on real gradients. A scale that is not positive is the
// value of all, and all codes are 0: 0, -0 ("not yet set": rules/math.h), NaN (one was not finite). The format is a
// contract with checkpoints: README.md, "8-bit state".
#pragma once

#include <type_traits>

#include "../rules/random.h"
#include "plain.h"

namespace genopt {

template <bool kSigned>
struct Int8Block {
  using Stored = std::conditional_t<kSigned, int8_t, uint8_t>;
  static constexpr DType kDType = kSigned ? DType::kInt8 : DType::kUInt8;
  static constexpr int32_t kLargest = kSigned ? 127 : 255;
  static constexpr int32_t kOctaves = kSigned ? 6 : 12;               // with 16 codes each
  static constexpr int kFine = 19, kCoarse = 21;                      // bits below a code's last one, there and below
  static constexpr uint32_t kLowest = kSigned ? 15 << 23 : 29 << 23;  // a scale whose codes are all normal numbers
  static constexpr uint32_t kHighest = 0x7f600000u;
  static constexpr uint32_t kNearest = 1u << 31;

  uint32_t top;          // the scale's bits
  int32_t fine, coarse;  // codes, less the bits of their values >> kFine and kCoarse
  float fill;            // the value of code 0
  int32_t limit;         // the largest code that the scale allows

  GENOPT_INLINE explicit Int8Block(float scale)
      : top(bits_of(scale)),
        fine(kLargest - static_cast<int32_t>(top >> kFine)),
        coarse(kLargest - 12 * kOctaves - static_cast<int32_t>(top >> kCoarse)),
        fill(scale > 0.0f ? 0.0f : scale),
        limit(scale > 0.0f ? kLargest : 0) {
  }

  static GENOPT_INLINE uint32_t magnitude(float x) {
    return bits_of(x) & 0x7fffffffu;
  }

  // For a tile whose largest magnitude, as bits, this is.
  static GENOPT_INLINE float scale_for(uint32_t largest) {
    if (largest == 0) return 0.0f;
    if (largest >= 0x7f800000u) return float_of(0x7fc00000u);
    const uint32_t rounded = (largest + 0x1fffffu) & ~0x1fffffu;
    return float_of(rounded < kLowest ? kLowest : rounded < kHighest ? rounded : kHighest);
  }

  GENOPT_INLINE float decode(int32_t number) const {
    const int32_t below = kLargest - (kSigned && number < 0 ? -number : number);
    const int32_t near = below << kFine, far = (below << kCoarse) - (3 * kOctaves << 23);
    const int32_t distance = near > far ? near : far;
    const uint32_t bits = top - static_cast<uint32_t>(distance);
    const uint32_t value = kSigned ? bits | (static_cast<uint32_t>(number) & 0x80000000u) : bits;
    const uint32_t is_zero = -static_cast<uint32_t>(number == 0);  // as arithmetic, loops over it vectorize better
    return float_of((value & ~is_zero) | (bits_of(fill) & is_zero));
  }

  // `turn`: 32 bits that decide which way to round, or kNearest. An average of squares that is not zero stays so.
  GENOPT_INLINE int32_t encode(float x, uint32_t turn) const {
    const uint32_t size = magnitude(x);
    const int32_t near = static_cast<int32_t>((size + (turn >> (32 - kFine))) >> kFine) + fine;
    const int32_t far = static_cast<int32_t>((size + (turn >> (32 - kCoarse))) >> kCoarse) + coarse;
    const int32_t least = kSigned ? 0 : static_cast<int32_t>(size < 1 ? size : 1);
    int32_t code = near > far ? near : far;
    code = code < least ? least : code;
    code = code > limit ? limit : code;
    return kSigned && static_cast<int32_t>(bits_of(x)) < 0 ? -code : code;
  }
};

using Int8 = Int8Block<true>;
using UInt8 = Int8Block<false>;

// Calls visit(codec) with the codec of a tile's codes.
template <class Visit>
GENOPT_INLINE auto with_block(DType type, float scale, Visit&& visit) {
  return type == DType::kInt8 ? visit(Int8(scale)) : visit(UInt8(scale));
}

}  // namespace genopt
