// See stream.h.
#include "stream.h"

#include "run.h"
#include "threads.h"

namespace genopt::cpu {

void stream(const std::vector<std::pair<uintptr_t, bool>>& arrays, int64_t bytes, int threads, bool fresh) {
  Streams streams;
  streams.fresh = fresh;
  streams.past_caches = writes_past_caches(bytes, threads);
  for (const bool write : {true, false})
    for (const auto& [address, is_written] : arrays)
      if (is_written == write && streams.count < kMaxStreams) {
        streams.base[streams.count++] = reinterpret_cast<char*>(address);
        streams.written += write;
      }
  const StreamKernel kernel = kernel_table().stream;
  const int64_t lines = bytes / 64;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int i = 0; i < threads; ++i) kernel(streams, lines * i / threads * 64, lines * (i + 1) / threads * 64);
}

}  // namespace genopt::cpu
