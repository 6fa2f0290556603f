// Work in parts, one for each thread.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <pthread.h>

#include <algorithm>
#include <cstdint>

namespace genopt::cpu {

// The caller's rounding and flush-to-zero mode, which a thread takes over: otherwise the bits of
// denormal numbers would depend on which thread meets them.
#if defined(__x86_64__)
class FloatMode {
 public:
  FloatMode() : mode_(_mm_getcsr()) {
  }
  void adopt() const {
    _mm_setcsr(mode_);
  }

 private:
  unsigned mode_;
};
#else
class FloatMode {
 public:
  void adopt() const {
  }
};
#endif

// Whether results that nobody has read are written non-temporally, so that memory need not be read before. One core
// writes more slowly so (6 GB/s, 8 with lines prefetched in time, where this was measured); many wait for memory either
// way.
inline bool writes_non_temporally(int64_t bytes, int threads) {
  constexpr int64_t kLarge = 4 << 20;
  constexpr int kMany = 8;
  return bytes >= kLarge && threads >= kMany;
}

// Whether this process is a fork's child. OpenMP's threads stayed with its parent, and it would wait for them for ever.
inline bool is_forked = false;
inline const int kWatchesForks = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

// Calls work(begin, end) for parts of [0, total), one for each thread that has at least `least` pieces; once if there
// are few, also if there are none, and in a fork's child.
template <class Work>
void in_parallel(int64_t total, int64_t least, int threads, Work work) {
  const int64_t team = std::min<int64_t>(threads, total / least);
  if (team <= 1 || is_forked) {
    work(0, total);
    return;
  }
  const FloatMode mode;
#pragma omp parallel for num_threads(static_cast<int>(team)) schedule(static, 1)
  for (int64_t i = 0; i < team; ++i) {
    const FloatMode before;
    mode.adopt();
    work(total * i / team, total * (i + 1) / team);
    before.adopt();
  }
}

}  // namespace genopt::cpu
