// The limit that benchmarks compare with: a loop that moves the bytes of a step and computes nothing, with the vectors
// of the instruction set that the kernels use. Built and called by __init__.py.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kMaxArrays = 8;

// Of which the first `written` are written. `fresh`: these are not read. `ahead`: bytes, 0: nothing is prefetched.
struct Arrays {
  char* base[kMaxArrays];
  int count, written;
  bool fresh, non_temporal;
  int64_t ahead;
};

#define GENOPT_CAPABILITY baseline
#define GENOPT_VECTOR_BYTES 16
#include "move_lines.h"
#undef GENOPT_CAPABILITY
#undef GENOPT_VECTOR_BYTES

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2")
#define GENOPT_CAPABILITY avx2
#define GENOPT_VECTOR_BYTES 32
#include "move_lines.h"
#undef GENOPT_CAPABILITY
#undef GENOPT_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,prefer-vector-width=512")
#define GENOPT_CAPABILITY avx512
#define GENOPT_VECTOR_BYTES 64
#include "move_lines.h"
#undef GENOPT_CAPABILITY
#undef GENOPT_VECTOR_BYTES
#pragma GCC pop_options
#endif

}  // namespace

// Reads `bytes` (a multiple of 64) of each of `count` arrays together, front to back, and writes back the first
// `written`. Each is aligned to 64. `fresh`: these are not read but only written. `capability`: as the kernels name it.
extern "C" void move_bytes(const char* capability, const uintptr_t* addresses, int count, int written, int64_t bytes,
                           int threads, bool fresh, bool prefetches, bool non_temporal) {
  Arrays arrays{{}, count, written, fresh, non_temporal, prefetches ? 2048 : 0};
  for (int k = 0; k < count; ++k) arrays.base[k] = reinterpret_cast<char*>(addresses[k]);
  void (*move)(const Arrays&, int64_t, int64_t) = baseline::move<>;
#if defined(__x86_64__)
  if (std::strcmp(capability, "avx512") == 0) move = avx512::move<>;
  if (std::strcmp(capability, "avx2") == 0) move = avx2::move<>;
#endif
  const int64_t lines = bytes / 64;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int i = 0; i < threads; ++i) move(arrays, lines * i / threads * 64, lines * (i + 1) / threads * 64);
}
