// The limit that benchmarks compare with, for one instruction set: see stream.h. Included by walk.h.
#pragma once

#include <atomic>

#include "../plan.h"
#include "vectors.h"

namespace genopt::GENOPT_CAPABILITY {

GENOPT_INLINE void write_past_caches(char* to, Words x) {
#if !defined(__x86_64__)
  store(to, x);
#elif GENOPT_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)x.raw);
#elif GENOPT_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)x.raw);
#else
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)x.raw);
#endif
}

// The number of arrays and of those written are compile-time constants: written ones come first.
template <int kArrays, int kWritten, bool kFresh>
void move_lines(const Streams& streams, int64_t begin, int64_t end) {
  constexpr int kAhead = 2048;  // bytes
  const bool past_caches = kFresh && streams.past_caches;
  static std::atomic<uint32_t> zero{0}, sink;
  const Words nothing(zero.load());  // the compiler must not see that the values stay the same
  Words sum(0);
  char* base[kArrays];
  for (int k = 0; k < kArrays; ++k) base[k] = streams.base[k];
  for (int64_t at = begin; at < end; at += GENOPT_VECTOR_BYTES) {
    for (int k = 0; k < kArrays; ++k)
      if (k >= kWritten || !past_caches) __builtin_prefetch(base[k] + at + kAhead);
    Words values[kArrays];
    for (int k = kFresh ? kWritten : 0; k < kArrays; ++k) values[k] = load<Words>(base[k] + at);
    for (int k = kWritten; k < kArrays; ++k) sum = sum ^ values[k];
    for (int k = 0; k < kWritten; ++k)
      past_caches ? write_past_caches(base[k] + at, nothing)
                  : store(base[k] + at, kFresh ? nothing : values[k] ^ nothing);
  }
  sink ^= largest(sum);  // keeps the reads of arrays that are not written alive
}

template <int kArrays = kMaxStreams, int kWritten = kArrays>
void stream_lines(const Streams& streams, int64_t begin, int64_t end) {
  if (streams.count == kArrays && streams.written == kWritten) {
    streams.fresh ? move_lines<kArrays, kWritten, true>(streams, begin, end)
                  : move_lines<kArrays, kWritten, false>(streams, begin, end);
  } else if constexpr (kWritten > 0) {
    stream_lines<kArrays, kWritten - 1>(streams, begin, end);
  } else if constexpr (kArrays > 1) {
    stream_lines<kArrays - 1, kArrays - 1>(streams, begin, end);
  }
}

}  // namespace genopt::GENOPT_CAPABILITY
