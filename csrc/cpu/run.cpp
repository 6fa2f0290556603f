// See run.h.
#include "run.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace genopt {

namespace baseline {
const KernelTable& kernel_table();
}
#if defined(__x86_64__)
namespace avx2 {
const KernelTable& kernel_table();
}
namespace avx512 {
const KernelTable& kernel_table();
}
#endif

namespace cpu {
namespace {

struct Capability {
  std::string name;
  const KernelTable& (*kernel_table)();
};

// Best first.
std::vector<Capability> available() {
  std::vector<Capability> list;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    list.push_back({"avx512", avx512::kernel_table});
  if (__builtin_cpu_supports("avx2")) list.push_back({"avx2", avx2::kernel_table});
#endif
  list.push_back({"default", baseline::kernel_table});
  return list;
}

Capability choose() {
  const std::vector<Capability> list = available();
  const char* wanted = std::getenv("GENOPT_CPU_CAPABILITY");
  if (!wanted || !*wanted) return list.front();
  std::string names;
  for (const Capability& each : list) {
    if (each.name == wanted) return each;
    names += (names.empty() ? "" : ", ") + each.name;
  }
  throw std::runtime_error("GENOPT_CPU_CAPABILITY is '" + std::string(wanted) +
                           "', but this processor and build have " + names + "; set it to one of these, or unset it");
}

const Capability& chosen() {
  static const Capability capability = choose();
  return capability;
}

// Below this much work for a thread, waking it costs more than it brings.
constexpr int64_t kTilesPerThread = 128;

// Asks for the first lines of a row a few rows on: a walk over many small tensors would else wait for each.
void prefetch_ahead(const Plan& plan, int64_t r) {
  constexpr int64_t kRowsAhead = 3, kBytes = 512;
  if (r + kRowsAhead >= static_cast<int64_t>(plan.rows.size())) return;
  const Row& row = plan.rows[r + kRowsAhead];
  if (row.device != kHost) return;
  for (int k = 0; k < kOperands; ++k) {
    const int64_t bytes = std::min<int64_t>(kBytes, row.numel * size_of(row.dtype[k]));
    for (int64_t byte = 0; row.data[k] && byte < bytes; byte += 64)
      __builtin_prefetch(static_cast<const char*>(row.data[k]) + byte);
  }
}

// Runs tiles [begin, end) of the whole plan.
void run_range(const Plan& plan, int64_t begin, int64_t end) {
  const auto& rows = plan.rows;
  // The last row that starts at or before `begin`: rows without tiles share their start with the next.
  auto row = std::upper_bound(rows.begin(), rows.end(), begin,
                              [](int64_t tile, const Row& each) { return tile < each.first_tile; }) -
             1;
  for (; begin < end; ++row) {
    const int64_t last = std::min(end, row->first_tile + row->tiles(kHost));
    if (begin >= last) continue;
    prefetch_ahead(plan, row - rows.begin());
    const Prepared& prepared = plan.prepared()[row->prepared];
    prepared.kernel(prepared.update, *row, begin - row->first_tile, last - row->first_tile);
    begin = last;
  }
}

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

}  // namespace

const std::string& capability() {
  return chosen().name;
}

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const Capability& each : available()) names.push_back(each.name);
  return names;
}

const KernelTable& kernel_table() {
  return chosen().kernel_table();
}

void run(const Plan& plan, int threads) {
  const int64_t total = plan.total_tiles();
  const int64_t team = std::min<int64_t>(threads, total / kTilesPerThread);
  if (team <= 1) {
    run_range(plan, 0, total);
    return;
  }
  const FloatMode mode;
#pragma omp parallel for num_threads(static_cast<int>(team)) schedule(static, 1)
  for (int64_t i = 0; i < team; ++i) {
    const FloatMode before;
    mode.adopt();
    run_range(plan, total * i / team, total * (i + 1) / team);
    before.adopt();
  }
}

}  // namespace cpu
}  // namespace genopt
