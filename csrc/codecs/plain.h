// How a value is stored as a plain number: fp32, fp64, bf16, fp16. decode gives the value in the
// compute type T (float or double); encode rounds to nearest even, as torch does.
// Integer arithmetic without branches, so that loops over these vectorize on any machine; a GPU has
// instructions for the same conversions.
#pragma once

#include <cstdint>
#include <cstring>

#include "../math/numbers.h"

namespace genopt {

// The last two are codes with a scale for each tile: int8_block.h.
enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kInt8, kUInt8 };

GENOPT_INLINE constexpr bool is_block(DType type) {
  return type >= DType::kInt8;
}

// The distance from 1 to the next number, of numbers.
GENOPT_INLINE constexpr double epsilon_of(DType type) {
  return type == DType::kFloat64    ? 0x1p-52
         : type == DType::kFloat32  ? 0x1p-23
         : type == DType::kBFloat16 ? 0x1p-7
                                    : 0x1p-10;
}

GENOPT_INLINE int32_t signed_bits(float x) {
  return static_cast<int32_t>(bits_of(x));
}
GENOPT_INLINE int32_t as_signed(uint32_t x) {
  return static_cast<int32_t>(x);
}

GENOPT_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Of less than 2^31.
GENOPT_INLINE float number_of(uint32_t x) {
  return static_cast<float>(static_cast<int32_t>(x));
}
GENOPT_INLINE float truncated(float x) {
  return static_cast<float>(static_cast<int32_t>(x));
}

// Codec::encode(x) of no NaN, for which a GPU's conversion to 16 bits has bits of its own.
template <class Codec, class T>
GENOPT_INLINE typename Codec::Stored encode_number(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(typename Codec::Stored) == 2) {
    uint16_t stored;
    if constexpr (Codec::kDType == DType::kBFloat16) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(stored) : "f"(static_cast<float>(x)));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(stored) : "f"(static_cast<float>(x)));
    }
    return stored;
  }
#endif
  return Codec::encode(x);
}

template <class Number, DType kType>
struct Native {
  using Stored = Number;
  static constexpr DType kDType = kType;
  template <class T>
  static GENOPT_INLINE T decode(Stored x) {
    return static_cast<T>(x);
  }
  template <class T>
  static GENOPT_INLINE Stored encode(T x) {
    return static_cast<Stored>(x);
  }
};

using Float32 = Native<float, DType::kFloat32>;
using Float64 = Native<double, DType::kFloat64>;

struct BFloat16 {
  using Stored = uint16_t;
  static constexpr DType kDType = DType::kBFloat16;
  template <class T>
  static GENOPT_INLINE T decode(Stored x) {
    return static_cast<T>(float_of(static_cast<uint32_t>(x) << 16));
  }
  template <class T>
  static GENOPT_INLINE Stored encode(T x) {
#if defined(__CUDA_ARCH__)
    return x == x ? encode_number<BFloat16>(x) : Stored{0x7fc0};
#endif
    return static_cast<Stored>(encode_bits(static_cast<float>(x)));
  }
  template <class V>
  static GENOPT_INLINE auto encode_bits(V x) {
    const auto bits = bits_of(x);
    const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return choose(x == x, rounded, decltype(rounded + 0u)(0x7fc0u));
  }
  // The nearest number that is stored exactly: decode(encode(x)).
  template <class V>
  static GENOPT_INLINE V nearest(V x) {
    return float_of(encode_bits(x) << 16);
  }
  // One of the two neighbours of x: the upper one where 32 `bits`, as a fraction, reach up to it. Their mean is x.
  template <class V, class U>
  static GENOPT_INLINE V round_by(V x, U bits) {
    return choose(x == x, float_of((bits_of(x) + (bits >> 16)) & 0xffff0000u), x);
  }
};

struct Float16 {
  using Stored = uint16_t;
  static constexpr DType kDType = DType::kFloat16;
  template <class T>
  static GENOPT_INLINE T decode(Stored x) {
#if defined(__CUDA_ARCH__)
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x));
    return static_cast<T>(f);
#endif
    const uint32_t magnitude = x & 0x7fff, sign = static_cast<uint32_t>(x & 0x8000) << 16;
    const uint32_t rebias = magnitude < 0x7c00 ? (127u - 15u) << 23 : (255u - 31u) << 23;
    const uint32_t normal = (magnitude << 13) + rebias;
    const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    return static_cast<T>(float_of(sign | (magnitude < 0x400 ? subnormal : normal)));
  }
  template <class T>
  static GENOPT_INLINE Stored encode(T x) {
    const uint32_t bits = bits_of(static_cast<float>(x));
#if defined(__CUDA_ARCH__)
    return x == x ? encode_number<Float16>(x) : static_cast<Stored>((bits >> 16 & 0x8000) | 0x7e00);
#endif
    const uint32_t magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
    // 0.5 has its last place where the smallest fp16 subnormal stands: adding it rounds there.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const uint32_t beyond = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t in_range = magnitude < (113u << 23) ? subnormal : normal;
    return static_cast<Stored>(sign | (magnitude >= 0x477ff000 ? beyond : in_range));
  }
  // The nearest number that is stored exactly: decode(encode(x)).
  template <class V>
  static GENOPT_INLINE V nearest(V x) {
    const auto bits = bits_of(x), magnitude = bits & 0x7fffffffu, sign = bits & 0x80000000u;
    const auto subnormal = bits_of((float_of(magnitude) + V(0.5f)) - V(0.5f));
    const auto normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u)) & ~0x1fffu;
    const auto in_range = choose(magnitude < 113u << 23, subnormal, normal);
    const auto beyond = choose(magnitude > 0x7f800000u, decltype(normal)(0x7fc00000u), decltype(normal)(0x7f800000u));
    return float_of(sign | choose(magnitude < 0x477ff000u, in_range, beyond));
  }
  // As BFloat16's.
  template <class V, class U>
  static GENOPT_INLINE V round_by(V x, U bits) {
    const U magnitude = bits_of(x) & 0x7fffffffu, sign = bits_of(x) & 0x80000000u;
    const U normal = (magnitude + (bits >> 19)) & ~0x1fffu;
    const V places = float_of(magnitude) * V(0x1p24f);  // subnormals are whole multiples of 2^-24
    const V within = smaller(places, V(1024.0f)) + number_of(bits >> 19) * V(0x1p-13f);  // exact: 11 and 13 bits
    const U subnormal = bits_of(truncated(within) * V(0x1p-24f));
    return choose(x == x, float_of(sign | choose(magnitude < 113u << 23, subnormal, normal)), x);
  }
};

GENOPT_INLINE constexpr int size_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : is_block(type) ? 1 : 2;
}

// One of the two neighbours of x that a 16-bit dtype has: its codec's round_by().
template <class V, class U>
GENOPT_INLINE V round_by(DType type, V x, U bits) {
  return type == DType::kBFloat16 ? BFloat16::round_by(x, bits) : Float16::round_by(x, bits);
}

// Calls visit(codec) with the codec of a dtype that is not is_block().
template <class Visit>
GENOPT_INLINE auto with_codec(DType type, Visit&& visit) {
  switch (type) {
    case DType::kFloat64:
      return visit(Float64{});
    case DType::kBFloat16:
      return visit(BFloat16{});
    case DType::kFloat16:
      return visit(Float16{});
    default:
      return visit(Float32{});
  }
}

}  // namespace genopt
