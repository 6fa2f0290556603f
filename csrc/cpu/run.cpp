// See run.h.
#include "run.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "../plan/lane_sums.h"
#include "threads.h"
#include "tuning.h"

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
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back({"avx2", avx2::kernel_table});
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

// Two tiles ahead is 10 to 20 % faster on one Intel Xeon and 13 % slower on an AMD Zen 4: bench/NOTES.md. Others have
// not been measured.
Tuning choose_tuning() {
  Tuning chosen;
#if defined(__x86_64__)
  if (__builtin_cpu_is("intel")) chosen.prefetch = 2;
#endif
  const char* const wanted = std::getenv("GENOPT_CPU_TUNING");
  if (!wanted || !*wanted) return chosen;
  int read = 0;
  if (std::sscanf(wanted, "prefetch=%d%n", &chosen.prefetch, &read) != 1 || wanted[read] || chosen.prefetch < 0 ||
      chosen.prefetch > kSpan)
    throw std::runtime_error("GENOPT_CPU_TUNING is '" + std::string(wanted) +
                             "', expected prefetch=N with N from 0 to " + std::to_string(kSpan) +
                             ", the tiles to prefetch ahead; or unset it");
  return chosen;
}

const Capability& chosen() {
  static const Capability capability = [] {
    tuning = choose_tuning();
    return choose();
  }();
  return capability;
}

// Below this much work for a thread, waking it costs more than it brings.
constexpr int64_t kTilesPerThread = 128;
// Of a thread, what is read twice in a step at a time.
constexpr int64_t kBytesAtOnce = 1 << 20;

// Prefetches the first lines of a row a few rows on: a walk over many small tensors would else wait for each.
void prefetch_ahead(const Plan& plan, int64_t r, unsigned operands) {
  constexpr int64_t kRowsAhead = 3, kBytes = 512;
  if (r + kRowsAhead >= static_cast<int64_t>(plan.rows.size())) return;
  const Row& row = plan.rows[r + kRowsAhead];
  if (row.device != kHost) return;
  for (int k = 0; k < kOperands; ++k) {
    if (!(operands >> k & 1) || !row.data[k]) continue;
    const int64_t bytes = std::min<int64_t>(kBytes, row.numel * size_of(row.dtype[k]));
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(row.data[k]) + byte);
  }
}

// Visits pieces [begin, end) of the whole plan: visit(row index, its first piece, its last). `first` says where a row's
// pieces begin, `count` how many it has; `operands` are used, as a mask.
template <class Count, class Visit>
void for_range(const Plan& plan, int64_t Row::* first, Count count, unsigned operands, int64_t begin, int64_t end,
               Visit visit) {
  const auto& rows = plan.rows;
  // The last row that starts at or before `begin`: rows without pieces share their start with the next.
  auto row = std::upper_bound(rows.begin(), rows.end(), begin,
                              [first](int64_t piece, const Row& each) { return piece < each.*first; }) -
             1;
  for (; begin < end; ++row) {
    const int64_t last = std::min(end, (*row).*first + count(*row));
    if (begin >= last) continue;
    prefetch_ahead(plan, row - rows.begin(), operands);
    visit(row - rows.begin(), begin - (*row).*first, last - (*row).*first);
    begin = last;
  }
}

int64_t host_tiles(const Row& row) {
  return row.tiles(kHost);
}
int64_t host_spans(const Row& row) {
  return row.spans(kHost);
}

double join_spans(const double* spans, int64_t count, Norm norm) {
  if (count == 1) return spans[0];
  LaneSums sums(norm);
  for (int64_t i = 0; i < count; ++i) sums.add(i, spans[i]);
  return sums.total();
}

}  // namespace

const std::string& capability() {
  return chosen().name;
}

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const Capability& each : available()) names.push_back(each.name);
  return names;
}

std::string tuning_in_use() {
  chosen();
  return "prefetch=" + std::to_string(tuning.prefetch);
}

const KernelTable& kernel_table() {
  return chosen().kernel_table();
}

void measure(Plan& plan, int threads) {
  const KernelTable& kernels = kernel_table();
  const int norm = static_cast<int>(plan.control.norm);
  std::vector<double> spans(plan.total_spans()), weights;
  bool weighs = false;
  for (const Options& group : plan.groups) weighs = weighs || group[kAgc] >= 0;
  if (weighs) weights.resize(spans.size());
  in_parallel(plan.total_spans(), kTilesPerThread / kSpan, threads, [&](int64_t begin, int64_t end) {
    for_range(plan, &Row::first_span, host_spans, 1u << kGrad, begin, end, [&](int64_t r, int64_t first, int64_t last) {
      const Row& row = plan.rows[r];
      const SpanKernel kernel = kernels.spans[norm][row.dtype[kParam] == DType::kFloat64];
      for (int64_t span = first; span < last; ++span) {
        spans[row.first_span + span] = kernel(row, kGrad, span);
        if (plan.groups[row.group][kAgc] >= 0) weights[row.first_span + span] = kernel(row, kParam, span);
      }
    });
  });
  for (Row& row : plan.rows) {
    const int64_t count = row.spans(kHost);
    if (count == 0) continue;
    row.norm = join_spans(&spans[row.first_span], count, plan.control.norm);
    if (plan.groups[row.group][kAgc] >= 0) row.weights = join_spans(&weights[row.first_span], count, plan.control.norm);
  }
}

// Rows [first, last).
struct RowRange {
  int64_t first = 0, last = 0;
};

// Where rows from `first` on end of which a cache holds what totals are made of: the step then reads it there.
int64_t end_of_some(const Plan& plan, int64_t first, int threads) {
  const int64_t most = threads * kBytesAtOnce;
  const int64_t rows = static_cast<int64_t>(plan.rows.size());
  int64_t bytes = 0;
  for (; first < rows && bytes < most; ++first) {
    const Row& row = plan.rows[first];
    for (int k = 0; k < kOperands; ++k)
      if (plan.rule.totaled >> k & 1) bytes += row.tiles(kHost) * kTile * size_of(row.dtype[k]);
  }
  return first;
}

// Adds up what rows need to know as a whole before they are stepped.
void total(Plan& plan, RowRange range, int threads) {
  const auto& kernels = kernel_table().totals[plan.rule.index];
  const int64_t before = plan.first_span(range.first), count = plan.first_span(range.last) - before;
  std::vector<double> spans(kMaxTotals * count);
  in_parallel(count, kTilesPerThread / kSpan, threads, [&](int64_t begin, int64_t end) {
    for_range(plan, &Row::first_span, host_spans, plan.rule.totaled, before + begin, before + end,
              [&](int64_t r, int64_t first, int64_t last) {
                const Row& row = plan.rows[r];
                if (!plan.needs_totals(row)) return;
                const Prepared& prepared = plan.prepared()[row.prepared];
                const TotalKernel kernel = kernels[row.used % kWithAverage][prepared.in_double];
                for (int64_t span = first; span < last; ++span) {
                  std::array<double, kMaxTotals> totals{};
                  kernel(prepared.scalars, row, span, totals.data());
                  const int64_t at = row.first_span + span - before;
                  for (int n = 0; n < kMaxTotals; ++n) spans[n * count + at] = totals[n];
                }
              });
  });
  for (int64_t r = range.first; r < range.last; ++r) {
    Row& row = plan.rows[r];
    if (const int64_t own = row.spans(kHost))
      for (int n = 0; n < kMaxTotals; ++n)
        row.totals[n] = join_spans(&spans[n * count + row.first_span - before], own, Norm::kTwo);
  }
}

void run(const Plan& plan, RowRange range, int threads) {
  const KernelTable& table = kernel_table();
  const GradientKernel leave_gradient = table.leave_gradient;
  std::vector<TileKernel> kernels;
  for (const Prepared& each : plan.prepared())
    kernels.push_back(each.only_average ? table.only_average[each.in_double]
                                        : table.tiles[plan.rule.index][each.used & ~kWithExtra][each.in_double]);
  const int64_t before = plan.first_tile(range.first), count = plan.first_tile(range.last) - before;
  in_parallel(count, kTilesPerThread, threads, [&](int64_t begin, int64_t end) {
    for_range(plan, &Row::first_tile, host_tiles, ~0u, before + begin, before + end,
              [&](int64_t r, int64_t first, int64_t last) {
                const Row& row = plan.rows[r];
                const bool writes = plan.control.writes_gradients() && !row.only_average;
                // The gradient that is written is still in the cache.
                const int64_t block = writes ? kSpan : last - first;
                for (int64_t at = first; at < last; at += block) {
                  const int64_t stop = std::min(at + block, last);
                  if (!plan.control.skip) {
                    kernels[row.prepared](plan.prepared()[row.prepared].scalars, row, at, stop);
                  }
                  if (writes) leave_gradient(row, plan.control, at, stop);
                }
              });
  });
}

void step(Plan& plan, int threads) {
  Control& control = plan.control;
  plan.number();
  for (Row& row : plan.rows) {
    row.norm = row.weights = 0;
    row.factor = 1;
  }
  if (control.measure && plan.row_sums && !control.only_measure) {
    for (size_t r = 0; r < plan.rows.size(); ++r) {
      plan.rows[r].norm = plan.row_sums[r];
      plan.rows[r].weights = plan.row_sums[plan.rows.size() + r];
    }
  } else if (control.measure) {
    measure(plan, threads);
    for (size_t r = 0; plan.row_sums && r < plan.rows.size(); ++r) {
      plan.row_sums[r] = plan.rows[r].norm;
      plan.row_sums[plan.rows.size() + r] = plan.rows[r].weights;
    }
  }
  if (control.measure || control.scale != 1 || !plan.group_scales.empty())
    control.skip = !plan.decide() || control.skip;
  if (control.only_measure || (control.skip && !control.writes_gradients())) return;
  if (plan.is_clipping()) plan.number();
  if (!control.skip) plan.prepare();
  const RowRange all{0, static_cast<int64_t>(plan.rows.size())};
  if (control.skip || !plan.needs_totals()) {
    run(plan, all, threads);
  } else if (plan.rule.shared) {
    total(plan, all, threads);
    plan.settle_together();
    run(plan, all, threads);
  } else {
    for (RowRange some{}; some.first < all.last; some.first = some.last) {
      some.last = end_of_some(plan, some.first, threads);
      total(plan, some, threads);
      plan.settle(some.first, some.last);
      run(plan, some, threads);
    }
  }
}

}  // namespace cpu
}  // namespace genopt
