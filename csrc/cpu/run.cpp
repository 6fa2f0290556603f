// See run.h.
#include "run.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "../plan/lane_sums.h"
#include "threads.h"
#include "tuning.h"

namespace genopt {

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

#if defined(__x86_64__)
// 26 is Zen 5.
int amd_family() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &a, &b, &c, &d)) return 0;
  return static_cast<int>((a >> 8 & 0xf) + (a >> 20 & 0xff));
}
#endif

// Tiles ahead: bench/NOTES.md has what was measured. In steps two are 10 to 20 % faster on one Intel Xeon and 13 %
// slower on an AMD Zen 4; in norms eight take a fifth off on a Zen 5, and a quarter on an Intel Xeon. Others have not
// been measured.
Tuning choose_tuning() {
  Tuning chosen;
#if defined(__x86_64__)
  if (__builtin_cpu_is("intel")) chosen = {2, 8};
  if (amd_family() >= 26) chosen.norm = 8;
#endif
  const char* const wanted = std::getenv("GENOPT_CPU_TUNING");
  if (!wanted || !*wanted) return chosen;
  int read = 0;
  const int found = std::sscanf(wanted, "prefetch=%d%n,norm=%d%n", &chosen.prefetch, &read, &chosen.norm, &read);
  const auto fits = [](int tiles) { return tiles >= 0 && tiles <= kSpan; };
  if (found < 1 || wanted[read] || !fits(chosen.prefetch) || !fits(chosen.norm))
    throw std::runtime_error("GENOPT_CPU_TUNING is '" + std::string(wanted) +
                             "', expected prefetch=N or prefetch=N,norm=N with N from 0 to " + std::to_string(kSpan) +
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

// Calls visit(number) with number `at` of those at an address, in double or float.
template <class Visit>
double with_number(void* numbers, int64_t at, bool in_double, Visit visit) {
  return in_double ? visit(static_cast<double*>(numbers)[at]) : visit(static_cast<float*>(numbers)[at]);
}

// Of all spans of a row on the CPU.
template <class Number>
BinnedTotal sum_of(const Row& row, Number of_span) {
  BinnedTotal sum{};
  for (int64_t s = 0; s < row.spans(kHost); ++s) sum = joined(sum, widened(of_span(s)));
  return sum;
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
  return "prefetch=" + std::to_string(tuning.prefetch) + ",norm=" + std::to_string(tuning.norm);
}

const KernelTable& kernel_table() {
  return chosen().kernel_table();
}

void measure(Plan& plan, int threads) {
  const KernelTable& kernels = kernel_table();
  const int norm = static_cast<int>(plan.control.norm);
  std::vector<Binned> spans(plan.total_spans()), weights;
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
  const Norm kind = plan.control.norm;
  const int64_t rows = static_cast<int64_t>(plan.rows.size());
  for (int64_t r = 0; r < rows; ++r) {
    Row& row = plan.rows[r];
    const auto join = [&](const std::vector<Binned>& of_spans, int64_t column) {
      const BinnedTotal sum = sum_of(row, [&](int64_t s) { return of_spans[row.first_span + s]; });
      if (plan.row_parts) plan.row_parts[column * rows + r] = sum;
      return sum.value(kind);
    };
    row.norm = join(spans, 0);
    if (plan.groups[row.group][kAgc] >= 0) row.weights = join(weights, 1);
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
      if (plan.rule.totaled >> k & 1 && row.data[k] && !row.is_factor(k)) bytes += row.numel * size_of(row.dtype[k]);
  }
  return first;
}

// Where what is known of a row's matrices stands, among that of all rows.
struct FactorPlaces {
  int64_t across = 0;    // sums of the rows of all its matrices
  int64_t down = 0;      // of the columns, for each band
  int64_t divisors = 0;  // in bytes
};

// Gives rows with factors what these become by this step's gradients, from the sums of their squares.
void renew_factors(Plan& plan, const Row& row, const double* across, const double* down, char* divisors, int threads) {
  const auto [count, rows, columns] = row.matrices;
  const int64_t bands = row.matrices.bands();
  const Prepared& prepared = plan.prepared()[row.prepared];
  const auto renew = [&](int operand, int64_t at, double mean_square) {
    return with_number(row.data[operand], at, prepared.in_double, [&](auto& number) -> double {
      return number = static_cast<std::remove_reference_t<decltype(number)>>(
                 plan.rule.factor(prepared.scalars, prepared.in_double, number, mean_square));
    });
  };
  constexpr int64_t kNumbersPerThread = 4096, kColumnsTogether = 64, kLanesOfSums = 32;
  in_parallel(count, 1 + kNumbersPerThread / (rows + columns), threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      LaneSums of_rows(Norm::kOne);
      for (int64_t i = 0; i < rows; i += kRowsTogether) {
        LaneSums some(Norm::kOne);
        for (int64_t k = 0; k < std::min<int64_t>(kRowsTogether, rows - i); ++k) {
          const int64_t at = m * rows + i + k;
          some.add(k, renew(row.factors, at, across[at] / static_cast<double>(columns)));
        }
        of_rows.add(i / kRowsTogether, some.total());
      }
      with_number(divisors, m, prepared.in_double, [&](auto& number) -> double {
        return number = static_cast<std::remove_reference_t<decltype(number)>>(plan.rule.divisor(
                   prepared.scalars, prepared.in_double, of_rows.total() / static_cast<double>(rows)));
      });
      for (int64_t j = 0; j < columns; j += kColumnsTogether) {
        const int64_t some = std::min(kColumnsTogether, columns - j);
        double sums[kLanesOfSums][kColumnsTogether] = {};  // as LaneSums, of several columns at once
        for (int64_t b = 0; b < bands; ++b)
          for (int64_t k = 0; k < some; ++k) sums[b % kLanesOfSums][k] += down[(m * bands + b) * columns + j + k];
        for (int64_t half = kLanesOfSums / 2; half >= 1; half /= 2)
          for (int64_t i = 0; i < half && i + half < bands; ++i)
            for (int64_t k = 0; k < some; ++k) sums[i][k] += sums[i + half][k];
        for (int64_t k = 0; k < some; ++k)
          renew(row.factors + 1, m * columns + j + k, sums[0][k] / static_cast<double>(rows));
      }
    }
  });
}

// Gives rows [first, last) their factors. Returns the memory of these' divisors.
std::vector<char> factor(Plan& plan, RowRange range, int threads) {
  const auto& kernels = kernel_table().squares[plan.rule.index];
  std::vector<FactorPlaces> places(range.last - range.first);
  const auto is_factored = [](const Row& row) { return row.factors && row.spans(kHost) > 0; };
  FactorPlaces end;
  for (int64_t r = range.first; r < range.last; ++r) {
    const Row& row = plan.rows[r];
    if (!is_factored(row)) continue;
    const auto [count, rows, columns] = row.matrices;
    places[r - range.first] = end;
    end.across += count * rows;
    end.down += count * row.matrices.bands() * columns;
    end.divisors += count * static_cast<int64_t>(sizeof(double));
  }
  std::vector<double> across(end.across), down(end.down);
  std::vector<char> divisors(end.divisors);
  const int64_t before = plan.first_tile(range.first), count = plan.first_tile(range.last) - before;
  in_parallel(count, kTilesPerThread, threads, [&](int64_t begin, int64_t end) {
    for_range(plan, &Row::first_tile, host_tiles, 1u << kGrad, before + begin, before + end,
              [&](int64_t r, int64_t first, int64_t last) {
                const Row& row = plan.rows[r];
                if (!is_factored(row)) return;
                const Prepared& prepared = plan.prepared()[row.prepared];
                const auto [matrices, rows, columns] = row.matrices;
                const int64_t band = row.matrices.band(), bands = row.matrices.bands(), size = rows * columns;
                // The first band that begins at an element or after it.
                const auto band_from = [&](int64_t element) {
                  return element / size * bands +
                         std::min((element % size + band * columns - 1) / (band * columns), bands);
                };
                const FactorPlaces& place = places[r - range.first];
                const int64_t stop = band_from(row.start_of(last));
                for (int64_t b = band_from(row.start_of(first)); b < stop; ++b) {
                  const int64_t first_row = b / bands * rows + b % bands * band;
                  kernels[prepared.in_double](prepared.scalars, row, first_row * columns,
                                              std::min(band, rows - b % bands * band),
                                              &across[place.across + first_row], &down[place.down + b * columns]);
                }
              });
  });
  for (int64_t r = range.first; r < range.last; ++r) {
    Row& row = plan.rows[r];
    if (!is_factored(row)) continue;
    const FactorPlaces& place = places[r - range.first];
    row.divisors = &divisors[place.divisors];
    renew_factors(plan, row, &across[place.across], &down[place.down], &divisors[place.divisors], threads);
  }
  return divisors;
}

// Adds up what rows need to know as a whole before they are stepped.
void total(Plan& plan, RowRange range, int threads) {
  const auto& kernels = kernel_table().totals[plan.rule.index];
  const int64_t before = plan.first_span(range.first), count = plan.first_span(range.last) - before;
  std::vector<std::array<Binned, kMaxTotals>> spans(count);
  in_parallel(count, kTilesPerThread / kSpan, threads, [&](int64_t begin, int64_t end) {
    for_range(plan, &Row::first_span, host_spans, plan.rule.totaled, before + begin, before + end,
              [&](int64_t r, int64_t first, int64_t last) {
                const Row& row = plan.rows[r];
                if (!plan.needs_totals(row)) return;
                const Prepared& prepared = plan.prepared()[row.prepared];
                const TotalKernel kernel = kernels[row.used % kWithAverage][prepared.in_double];
                for (int64_t span = first; span < last; ++span)
                  kernel(prepared.scalars, row, span, spans[row.first_span + span - before].data());
              });
  });
  for (int64_t r = range.first; r < range.last; ++r) {
    Row& row = plan.rows[r];
    if (!row.spans(kHost)) continue;
    for (int n = 0; n < kMaxTotals; ++n)
      row.totals[n] = sum_of(row, [&](int64_t s) { return spans[row.first_span + s - before][n]; }).value(Norm::kTwo);
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
  if (control.measure && plan.row_sums) {
    for (size_t r = 0; r < plan.rows.size(); ++r) {
      plan.rows[r].norm = plan.row_sums[r];
      plan.rows[r].weights = plan.row_sums[plan.rows.size() + r];
    }
  } else if (control.measure) {
    measure(plan, threads);
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
      const std::vector<char> divisors = factor(plan, some, threads);
      total(plan, some, threads);
      plan.settle(some.first, some.last);
      run(plan, some, threads);
    }
  }
}

}  // namespace cpu
}  // namespace genopt
