// Several numbers at once, as the widest vectors of the instruction set that this copy of the walk is compiled for.
// Arithmetic is the compiler's own (GNU vectors); rules and codecs that are templates take these in place of a number.
// Included (through values.h) by walk.h, once for each GENOPT_CAPABILITY.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../codecs/plain.h"

namespace genopt::GENOPT_CAPABILITY {

constexpr int kWidth = GENOPT_VECTOR_BYTES / 4;  // numbers in a vector, whatever their type

// The compiler's vectors; spelled out, as GCC 12 takes no vector_size that depends on a template's parameter.
template <class T>
struct RawVector;
#define GENOPT_RAW_VECTOR(T)                                         \
  template <>                                                        \
  struct RawVector<T> {                                              \
    typedef T Type __attribute__((vector_size(sizeof(T) * kWidth))); \
  };
GENOPT_RAW_VECTOR(int8_t)
GENOPT_RAW_VECTOR(uint8_t)
GENOPT_RAW_VECTOR(uint16_t)
GENOPT_RAW_VECTOR(int32_t)
GENOPT_RAW_VECTOR(uint32_t)
GENOPT_RAW_VECTOR(float)
#undef GENOPT_RAW_VECTOR

template <class T>
struct Vector {
  using Raw = typename RawVector<T>::Type;
  Raw raw;

  Vector() = default;
  GENOPT_INLINE Vector(Raw values) : raw(values) {
  }
  GENOPT_INLINE Vector(T x) : raw(x - Raw{}) {  // x - 0 keeps the sign of a zero
  }

  friend GENOPT_INLINE Vector operator-(Vector a) {
    return -a.raw;
  }
  friend GENOPT_INLINE Vector operator<<(Vector a, int places) {
    return a.raw << places;
  }
  friend GENOPT_INLINE Vector operator>>(Vector a, int places) {
    return a.raw >> places;
  }

  using Mask = decltype(Raw{} < Raw{});  // of a comparison: all ones where true
#define GENOPT_OPERATOR(sign, Result)                             \
  friend GENOPT_INLINE Result operator sign(Vector a, Vector b) { \
    return a.raw sign b.raw;                                      \
  }
  GENOPT_OPERATOR(+, Vector)
  GENOPT_OPERATOR(-, Vector)
  GENOPT_OPERATOR(*, Vector)
  GENOPT_OPERATOR(/, Vector)
  GENOPT_OPERATOR(&, Vector)
  GENOPT_OPERATOR(|, Vector)
  GENOPT_OPERATOR(^, Vector)
  GENOPT_OPERATOR(<, Mask)
  GENOPT_OPERATOR(>, Mask)
  GENOPT_OPERATOR(==, Mask)
  GENOPT_OPERATOR(!=, Mask)
#undef GENOPT_OPERATOR

  friend GENOPT_INLINE Vector choose(Mask condition, Vector a, Vector b) {
    return condition ? a.raw : b.raw;
  }
  friend GENOPT_INLINE Vector choose(bool condition, Vector a, Vector b) {
    return condition ? a.raw : b.raw;
  }
  // The processor's maximum and minimum are these choices, also of NaN; GCC 12 does not see it where one side is
  // constant.
  friend GENOPT_INLINE Vector larger(Vector a, Vector b) {
#if GENOPT_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, float>) return _mm512_maskz_max_ps(0xffff, a.raw, b.raw);
    if constexpr (std::is_same_v<T, uint32_t>)
      return (Raw)_mm512_maskz_max_epu32(0xffff, (__m512i)a.raw, (__m512i)b.raw);
#elif GENOPT_VECTOR_BYTES == 32
    if constexpr (std::is_same_v<T, float>) return _mm256_max_ps(a.raw, b.raw);
    if constexpr (std::is_same_v<T, uint32_t>) return (Raw)_mm256_max_epu32((__m256i)a.raw, (__m256i)b.raw);
#endif
    return a.raw > b.raw ? a.raw : b.raw;
  }
  friend GENOPT_INLINE Vector smaller(Vector a, Vector b) {
#if GENOPT_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, float>) return _mm512_maskz_min_ps(0xffff, a.raw, b.raw);
#elif GENOPT_VECTOR_BYTES == 32
    if constexpr (std::is_same_v<T, float>) return _mm256_min_ps(a.raw, b.raw);
#endif
    return a.raw < b.raw ? a.raw : b.raw;
  }
  friend GENOPT_INLINE Vector absolute(Vector a) {
    return a.raw < 0 ? -a.raw : a.raw;
  }
};

using Floats = Vector<float>;
using Ints = Vector<int32_t>;
using Words = Vector<uint32_t>;

template <class V>
GENOPT_INLINE V load(const void* from) {
  V values;
  std::memcpy(&values.raw, from, sizeof values.raw);
  return values;
}
template <class T>
GENOPT_INLINE void store(void* to, Vector<T> values) {
  std::memcpy(to, &values.raw, sizeof values.raw);
}

// The first half of the values or the second, in double. GCC 12 takes what it makes of __builtin_convertvector()
// through memory.
typedef double HalfOfDoubles __attribute__((vector_size(4 * kWidth)));
template <int kHalf>
GENOPT_INLINE HalfOfDoubles half_in_double(Floats x) {
#if GENOPT_VECTOR_BYTES == 64
  return _mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, x.raw, kHalf));
#elif GENOPT_VECTOR_BYTES == 32
  return _mm256_cvtps_pd(kHalf ? _mm256_extractf128_ps(x.raw, 1) : _mm256_castps256_ps128(x.raw));
#else
  typedef float Half __attribute__((vector_size(2 * kWidth)));
  Half halves[2];
  std::memcpy(halves, &x.raw, sizeof halves);
  return __builtin_convertvector(halves[kHalf], HalfOfDoubles);
#endif
}

// As many floats in memory.
GENOPT_INLINE HalfOfDoubles half_in_double(const float* from) {
#if GENOPT_VECTOR_BYTES == 64
  return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(from));
#elif GENOPT_VECTOR_BYTES == 32
  return _mm256_cvtps_pd(_mm_loadu_ps(from));
#else
  HalfOfDoubles result;
  for (int i = 0; i < kWidth / 2; ++i) result[i] = from[i];
  return result;
#endif
}

// Adds M::of() of each to a sum of its own, in double.
template <class M>
GENOPT_INLINE void add_up(Floats x, double* sums) {
  const auto add = [sums](HalfOfDoubles half, int at) __attribute__((always_inline)) {
    HalfOfDoubles sum;
    std::memcpy(&sum, sums + at, sizeof sum);
    sum = M::join(sum, M::of(half));
    std::memcpy(sums + at, &sum, sizeof sum);
  };
  add(half_in_double<0>(x), 0);
  add(half_in_double<1>(x), kWidth / 2);
}
template <class M>
GENOPT_INLINE void add_up(double x, double* sum) {
  *sum = M::join(*sum, M::of(x));
}

GENOPT_INLINE Ints signed_bits(Floats x) {
  return (Ints::Raw)x.raw;
}
GENOPT_INLINE Words bits_of(Floats x) {
  return (Words::Raw)x.raw;
}
GENOPT_INLINE Floats float_of(Words bits) {
  return (Floats::Raw)bits.raw;
}
GENOPT_INLINE Floats float_of(Ints bits) {
  return (Floats::Raw)bits.raw;
}
GENOPT_INLINE Ints as_signed(Words x) {
  return (Ints::Raw)x.raw;
}
GENOPT_INLINE Words as_unsigned(Ints x) {
  return (Words::Raw)x.raw;
}
GENOPT_INLINE Floats number_of(Words x) {
  return __builtin_convertvector((Ints::Raw)x.raw, Floats::Raw);
}
GENOPT_INLINE Floats truncated(Floats x) {
  return __builtin_convertvector(__builtin_convertvector(x.raw, Ints::Raw), Floats::Raw);
}
GENOPT_INLINE Floats square_root(Floats x) {
#if GENOPT_VECTOR_BYTES == 64
  return _mm512_maskz_sqrt_ps(0xffff, x.raw);
#elif GENOPT_VECTOR_BYTES == 32
  return _mm256_sqrt_ps(x.raw);
#else
  for (int i = 0; i < kWidth; ++i) x.raw[i] = sqrtf(x.raw[i]);
  return x;
#endif
}
GENOPT_INLINE Floats multiply_add(Floats a, Floats x, Floats b) {
#if GENOPT_VECTOR_BYTES == 64
  return _mm512_fmadd_ps(a.raw, x.raw, b.raw);
#elif GENOPT_VECTOR_BYTES == 32
  return _mm256_fmadd_ps(a.raw, x.raw, b.raw);
#else
  for (int i = 0; i < kWidth; ++i) x.raw[i] = fmaf(a.raw[i], x.raw[i], b.raw[i]);
  return x;
#endif
}
// Of doubles, rounded once where there is an instruction for it; else after each operation.
GENOPT_INLINE HalfOfDoubles multiply_add(HalfOfDoubles a, HalfOfDoubles x, HalfOfDoubles b) {
#if GENOPT_VECTOR_BYTES == 64
  return _mm512_fmadd_pd(a, x, b);
#elif GENOPT_VECTOR_BYTES == 32
  return _mm256_fmadd_pd(a, x, b);
#else
  return a * x + b;
#endif
}
GENOPT_INLINE Floats::Mask is_unset(Floats x) {
  return signed_bits(x).raw == INT32_MIN;
}

// Codes of one byte, and numbers of two, as integers of four.
GENOPT_INLINE Ints load_ints(const int8_t* from) {
#if GENOPT_VECTOR_BYTES == 64
  return (Ints::Raw)_mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif GENOPT_VECTOR_BYTES == 32
  return (Ints::Raw)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  return __builtin_convertvector(load<Vector<int8_t> >(from).raw, Ints::Raw);
#endif
}
GENOPT_INLINE Ints load_ints(const uint8_t* from) {
#if GENOPT_VECTOR_BYTES == 64
  return (Ints::Raw)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif GENOPT_VECTOR_BYTES == 32
  return (Ints::Raw)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  return __builtin_convertvector(load<Vector<uint8_t> >(from).raw, Ints::Raw);
#endif
}
GENOPT_INLINE Ints load_ints(const uint16_t* from) {
#if GENOPT_VECTOR_BYTES == 64
  return (Ints::Raw)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif GENOPT_VECTOR_BYTES == 32
  return (Ints::Raw)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  return __builtin_convertvector(load<Vector<uint16_t> >(from).raw, Ints::Raw);
#endif
}
// The low bytes.
GENOPT_INLINE void store_ints(int8_t* to, Ints x) {
#if GENOPT_VECTOR_BYTES == 32  // GCC 12 would take them out one by one
  const __m256i first = _mm256_setr_epi8(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  //
                                         0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  const Ints bytes = (Ints::Raw)_mm256_shuffle_epi8((__m256i)x.raw, first);
  const int32_t halves[] = {bytes.raw[0], bytes.raw[4]};
  std::memcpy(to, halves, sizeof halves);
#else
  store(to, Vector<int8_t>(__builtin_convertvector(x.raw, Vector<int8_t>::Raw)));
#endif
}
GENOPT_INLINE void store_ints(uint8_t* to, Ints x) {
  store_ints(reinterpret_cast<int8_t*>(to), x);
}
GENOPT_INLINE void store_ints(uint16_t* to, Ints x) {
#if GENOPT_VECTOR_BYTES == 32
  const __m256i first = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 0, 0, 0, 0, 0, 0, 0, 0,  //
                                         0, 1, 4, 5, 8, 9, 12, 13, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m256i pairs = _mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)x.raw, first), 0b1000);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(pairs));
#else
  store(to, Vector<uint16_t>(__builtin_convertvector(x.raw, Vector<uint16_t>::Raw)));
#endif
}

GENOPT_INLINE uint32_t largest(Words x) {
#if GENOPT_VECTOR_BYTES >= 32
#if GENOPT_VECTOR_BYTES == 64
  __m256i halves[2];
  std::memcpy(halves, &x.raw, sizeof halves);
  const __m256i eight = _mm256_max_epu32(halves[0], halves[1]);
#else
  const __m256i eight = (__m256i)x.raw;
#endif
  __m128i most = _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0b01001110));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0b10110001));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(most));
#else
  uint32_t result = 0;
  for (int i = 0; i < kWidth; ++i) result = x.raw[i] > result ? x.raw[i] : result;
  return result;
#endif
}

}  // namespace genopt::GENOPT_CAPABILITY
