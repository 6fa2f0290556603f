// The inner loops of quantization on CPU: a run of numbers to its reach, numbers to codes and back, with one scale or
// one for each. Included by cpu_kernels.h, once for each GENOPT_CAPABILITY. Plain C++ that the compiler vectorizes: for
// that, each loop stands in a function of its own, not inlined.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstring>

#include "quantization.h"

namespace genopt::quant::GENOPT_CAPABILITY {

#if defined(__AVX512F__)
inline void write_line_non_temporally(char* to, const char* from) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#elif defined(__AVX__)
inline void write_line_non_temporally(char* to, const char* from) {
  for (int i = 0; i < 64; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
}
#elif defined(__x86_64__)
inline void write_line_non_temporally(char* to, const char* from) {
  for (int i = 0; i < 64; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
}
#else
inline void write_line_non_temporally(char* to, const char* from) {
  std::memcpy(to, from, 64);
}
#endif

inline void write_non_temporally(char* to, const char* from, size_t bytes) {
  for (; bytes >= 64; bytes -= 64, to += 64, from += 64) write_line_non_temporally(to, from);
  std::memcpy(to, from, bytes);
}

// Of what was written non-temporally by the thread that leaves the scope.
struct Fence {
  ~Fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
  }
};

// to[i] = make(i); whole lines non-temporally, if `non_temporal`. Indices are 64-bit: with -fwrapv, sums of narrower
// ones do not vectorize.
template <class Stored, class Make>
GENOPT_INLINE void fill(Stored* to, int count, bool non_temporal, Make make) {
  int64_t done = 0;
  if (non_temporal && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    for (; done + 64 <= count; done += 64) {
      alignas(64) Stored lines[64];
#pragma GCC ivdep
      for (int64_t i = 0; i < 64; ++i) lines[i] = make(done + i);
      write_non_temporally(reinterpret_cast<char*>(to + done), reinterpret_cast<const char*>(lines), sizeof lines);
    }
  }
#pragma GCC ivdep
  for (int64_t i = done; i < count; ++i) to[i] = make(i);
}

// Prefetches memory that is read or written later, also beyond the tensor's end: memory is to be busy meanwhile.
template <int kLevel = 3>
inline void prefetch(const void* from, size_t bytes) {
  for (size_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(from) + byte, 0, kLevel);
}

template <class Codec, bool kSymmetric, class T>
__attribute__((noinline)) Reach<T> measure_run(const typename Codec::Stored* x, int64_t count) {
  Key<T> high = 0, low = 0;
  for (int64_t i = 0; i < count; ++i) {
    Reach<T> reach{high, low};
    reach.template add<kSymmetric>(Codec::template decode<T>(x[i]));
    high = reach.high, low = reach.low;
  }
  return {high, low};
}

// Units of one element each, side by side.
template <class Codec, bool kSymmetric, class T>
__attribute__((noinline)) void measure_each(const typename Codec::Stored* x, int64_t count, Key<T>* high, Key<T>* low) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    Reach<T> reach{high[i], kSymmetric ? Key<T>(0) : low[i]};
    reach.template add<kSymmetric>(Codec::template decode<T>(x[i]));
    high[i] = reach.high;
    if constexpr (!kSymmetric) low[i] = reach.low;
  }
}

template <class Codec, bool kStochastic, class T>
__attribute__((noinline)) void encode_run(const typename Codec::Stored* x, int count, const Encoder<T>& shared,
                                          uint32_t key, uint32_t index, int8_t* codes, bool non_temporal) {
  const Encoder<T> encoder = shared;  // a copy, which no store below can change
  fill(codes, count, non_temporal, [=](int64_t i) {
    return encoder.template operator()<kStochastic>(
        Codec::template decode<T>(x[i]), kStochastic ? random_number(key, index + static_cast<uint32_t>(i)) : 0.0f);
  });
}

template <class Codec, bool kStochastic, class T>
__attribute__((noinline)) void encode_each(const typename Codec::Stored* x, int count, const Encoders<T>& shared,
                                           uint32_t key, uint32_t index, int8_t* codes) {
  const Encoders<T> encoders = shared;
#pragma GCC ivdep
  for (int i = 0; i < count; ++i)
    codes[i] = encoders[i].template operator()<kStochastic>(
        Codec::template decode<T>(x[i]), kStochastic ? random_number(key, index + static_cast<uint32_t>(i)) : 0.0f);
}

template <class Codec, class T>
__attribute__((noinline)) void decode_run(const int8_t* codes, int count, int zero_point, float scale, T largest,
                                          typename Codec::Stored* to) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) to[i] = Codec::encode(number_behind<T>(codes[i], zero_point, scale, largest));
}

// `zero_point`: null where there is none.
template <class Codec, class T>
__attribute__((noinline)) void decode_each(const int8_t* codes, int count, const int8_t* zero_point, const float* scale,
                                           T largest, typename Codec::Stored* to) {
  if (zero_point) {
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) to[i] = Codec::encode(number_behind<T>(codes[i], zero_point[i], scale[i], largest));
  } else {
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) to[i] = Codec::encode(number_behind<T>(codes[i], 0, scale[i], largest));
  }
}

// `count` codes; an odd last one shares its byte with 0, for which there has to be room in `codes`.
__attribute__((noinline)) inline void pack_run(int8_t* codes, int count, uint8_t* bytes, bool non_temporal) {
  if (count & 1) codes[count] = 0;
  const int8_t* const from = codes;
  fill(bytes, (count + 1) / 2, non_temporal, [=](int64_t i) { return pack(from[2 * i], from[2 * i + 1]); });
}

__attribute__((noinline)) inline void unpack_run(const uint8_t* bytes, int count, int8_t* codes) {
#pragma GCC ivdep
  for (int i = 0; i < (count + 1) / 2; ++i) {
    codes[2 * i] = static_cast<int8_t>(unpack(bytes[i], 0));
    codes[2 * i + 1] = static_cast<int8_t>(unpack(bytes[i], 1));
  }
}

}  // namespace genopt::quant::GENOPT_CAPABILITY
