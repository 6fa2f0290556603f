// How a tile of 256 moments is stored in a byte each: as floats of 8 bits that count down from the tile's scale.
//
//   scale   the tile's largest magnitude, rounded up to 2 fraction bits, as float32
//   code c  the float32 with the bits  B + min(e << 19, e << 21), where e = |c| - C; c = 0 is zero
//           B is bits(scale) - (K << 23) and C is L - 16 K, the code that stands for it
//
//                L     K: octaves with 16 codes each   octaves with 4 below them
//   Int8, signed 127   6                               7.75
//   UInt8        255   12                              15.75
//
// Both ways are integer shifts. What was read is stored as the same code again, and between two codes a value is linear
// in its bits, so that rounding by thresholds (math/random.h) is unbiased. It has to be: a moment moves by
// a tenth or a thousandth of itself at a step, codes stand 4 to 25 % apart, and what is rounded to the nearest stays
// where it was. bench/experiments/mappings.py compares this map with others on real gradients. A scale that is not
// positive is the value of all, and all codes are 0: 0, -0 ("not yet set": math/numbers.h), NaN (one was not finite).
// The format is a contract with checkpoints: docs/8-bit-format.md.
#pragma once

#include <type_traits>

#include "../math/random.h"
#include "plain.h"

namespace genopt {

template <bool kSigned>
struct Int8Block {
  using Stored = std::conditional_t<kSigned, int8_t, uint8_t>;
  static constexpr DType kDType = kSigned ? DType::kInt8 : DType::kUInt8;
  static constexpr int32_t kLargest = kSigned ? 127 : 255;
  static constexpr int32_t kOctaves = kSigned ? 6 : 12;               // with 16 codes each
  static constexpr int32_t kBorder = kLargest - 16 * kOctaves;        // the code where they begin
  static constexpr int kFine = 19;                                    // bits below a code's last one there
  static constexpr uint32_t kLowest = kSigned ? 15 << 23 : 29 << 23;  // a scale whose codes are all normal numbers
  static constexpr uint32_t kHighest = 0x7f600000u;

  int32_t border;  // the bits of the value of kBorder
  int32_t fill;    // of the value of code 0
  int32_t limit;   // the largest code that the scale allows

  GENOPT_INLINE explicit Int8Block(float scale)
      : border(as_signed(bits_of(scale) - (uint32_t{kOctaves} << 23))),
        fill(scale > 0.0f ? 0 : signed_bits(scale)),
        limit(scale > 0.0f ? kLargest : 0) {
  }

  template <class V>
  static GENOPT_INLINE auto magnitude(V x) {
    return signed_bits(x) & INT32_MAX;
  }

  // For a tile whose largest magnitude, as bits, this is.
  static GENOPT_INLINE float scale_for(uint32_t largest) {
    if (largest == 0) return 0.0f;
    if (largest >= 0x7f800000u) return float_of(0x7fc00000u);
    const uint32_t rounded = (largest + 0x1fffffu) & ~0x1fffffu;
    return float_of(rounded < kLowest ? kLowest : rounded < kHighest ? rounded : kHighest);
  }

  // Whether no code has to be looked at alone: the scale is positive, and no number is larger. Then kUsual spares the
  // test of each.
  GENOPT_INLINE bool is_usual() const {
    return limit != 0 && border < as_signed(kHighest - (uint32_t{kOctaves} << 23));
  }

  // `I`: int32_t, or several.
  template <bool kUsual = false, class I>
  GENOPT_INLINE auto decode(I code) const {
    const I size = kSigned ? absolute(code) : code;
    const I fine = (size - I(kBorder)) << kFine, coarse = fine << 2;
    I bits = smaller(fine, coarse) + border;
    if constexpr (kSigned) bits = bits | (code & INT32_MIN);
    return float_of(choose(code == 0, I(kUsual ? 0 : fill), bits));
  }

  // `threshold`: 32 bits that decide which way to round. An average of squares that is not zero stays so.
  template <bool kUsual = false, class V, class U>
  GENOPT_INLINE auto encode(V x, U threshold) const {
    const auto size = magnitude(x);
    using I = std::remove_cv_t<decltype(size)>;
    const I fine = size - I(border), coarse = fine >> 2;
    I code = ((larger(fine, coarse) + as_signed(threshold >> (32 - kFine))) >> kFine) + kBorder;
    code = larger(code, kSigned ? I(0) : smaller(size, I(1)));
    if constexpr (!kUsual) code = smaller(code, I(limit));
    return kSigned ? choose(signed_bits(x) < 0, -code, code) : code;
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
