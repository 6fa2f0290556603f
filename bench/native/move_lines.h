// The loops of one instruction set: included by memory_loop.cpp once for each, with GENOPT_CAPABILITY, the namespace
// that keeps the copies apart, and GENOPT_VECTOR_BYTES.

namespace GENOPT_CAPABILITY {

typedef uint32_t Words __attribute__((vector_size(GENOPT_VECTOR_BYTES)));

inline void write_non_temporally(char* to, Words x) {
#if !defined(__x86_64__)
  memcpy(to, &x, sizeof x);
#elif GENOPT_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)x);
#elif GENOPT_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)x);
#else
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)x);
#endif
}

// The number of arrays and of those written are compile-time constants: written ones come first.
template <int kArrays, int kWritten, bool kFresh>
void move_lines(const Arrays& arrays, int64_t begin, int64_t end) {
  const bool non_temporal = arrays.non_temporal;
  const int64_t ahead = arrays.ahead;
  static std::atomic<uint32_t> zero{0}, sink;
  const Words nothing = zero.load() - Words{};  // the compiler must not see that the values stay the same
  Words sum{};
  char* base[kArrays];
  for (int k = 0; k < kArrays; ++k) base[k] = arrays.base[k];
  for (int64_t at = begin; at < end; at += GENOPT_VECTOR_BYTES) {
    for (int k = 0; k < kArrays; ++k)
      if (ahead && (k >= kWritten || !kFresh || !non_temporal)) __builtin_prefetch(base[k] + at + ahead);
    Words values[kArrays];
    for (int k = kFresh ? kWritten : 0; k < kArrays; ++k) memcpy(&values[k], base[k] + at, sizeof values[k]);
    for (int k = kWritten; k < kArrays; ++k) sum ^= values[k];
    for (int k = 0; k < kWritten; ++k) {
      const Words written = kFresh ? nothing : values[k] ^ nothing;
      non_temporal ? write_non_temporally(base[k] + at, written)
                   : static_cast<void>(memcpy(base[k] + at, &written, sizeof written));
    }
  }
  uint32_t read = 0;
  for (size_t i = 0; i < sizeof(Words) / sizeof read; ++i) read ^= sum[i];
  sink ^= read;  // keeps the reads of arrays that are not written alive
}

template <int kArrays = kMaxArrays, int kWritten = kArrays>
void move(const Arrays& arrays, int64_t begin, int64_t end) {
  if (arrays.count == kArrays && arrays.written == kWritten) {
    arrays.fresh ? move_lines<kArrays, kWritten, true>(arrays, begin, end)
                 : move_lines<kArrays, kWritten, false>(arrays, begin, end);
  } else if constexpr (kWritten > 0) {
    move<kArrays, kWritten - 1>(arrays, begin, end);
  } else if constexpr (kArrays > 1) {
    move<kArrays - 1, kArrays - 1>(arrays, begin, end);
  }
}

}  // namespace GENOPT_CAPABILITY
