// See stream.h.
#include "stream.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace genopt::cpu {
namespace {

typedef uint64_t Line __attribute__((vector_size(64)));

std::atomic<uint64_t> zero{0};
std::atomic<uint64_t> sink;  // keeps the reads of arrays that are not written alive

void write_past_caches(Line* to, const Line& line) {
#if defined(__x86_64__)
  __m128i quarters[4];
  std::memcpy(quarters, &line, sizeof line);
  for (int i = 0; i < 4; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, quarters[i]);
#else
  *to = line;
#endif
}

// The number of arrays and of those written are compile-time constants: written ones come first.
template <int kArrays, int kWritten, bool kFresh>
void run(char* const (&base)[8], int64_t begin, int64_t end) {
  Line sum = {};
  const Line nothing = Line{} + zero.load();  // the compiler must not see that the values stay the same
  for (int64_t at = begin; at < end; at += sizeof(Line)) {
    Line lines[kArrays];
    for (int k = kFresh ? kWritten : 0; k < kArrays; ++k) lines[k] = *reinterpret_cast<const Line*>(base[k] + at);
    for (int k = kWritten; k < kArrays; ++k) sum ^= lines[k];
    for (int k = 0; k < kWritten; ++k) {
      Line* const to = reinterpret_cast<Line*>(base[k] + at);
      if (kFresh) {
        write_past_caches(to, nothing);
      } else {
        *to = lines[k] ^ nothing;
      }
    }
  }
  sink ^= sum[0];
}

template <int kArrays = 8, int kWritten = kArrays>
void dispatch(int arrays, int written, bool fresh, char* const (&base)[8], int64_t begin, int64_t end) {
  if (arrays == kArrays && written == kWritten) {
    fresh ? run<kArrays, kWritten, true>(base, begin, end) : run<kArrays, kWritten, false>(base, begin, end);
  } else if constexpr (kWritten > 0) {
    dispatch<kArrays, kWritten - 1>(arrays, written, fresh, base, begin, end);
  } else if constexpr (kArrays > 1) {
    dispatch<kArrays - 1, kArrays - 1>(arrays, written, fresh, base, begin, end);
  }
}

}  // namespace

void stream(const std::vector<std::pair<uintptr_t, bool>>& arrays, int64_t bytes, int threads, bool fresh) {
  char* base[8] = {};
  int count = 0, written = 0;
  for (const bool write : {true, false})
    for (const auto& [address, is_written] : arrays)
      if (is_written == write && count < 8) {
        base[count++] = reinterpret_cast<char*>(address);
        written += write;
      }
  const int64_t lines = bytes / static_cast<int64_t>(sizeof(Line));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int i = 0; i < threads; ++i)
    dispatch(count, written, fresh, base, lines * i / threads * 64, lines * (i + 1) / threads * 64);
}

}  // namespace genopt::cpu
