// The first kernel of a step, one thread a row: it brings into the table what the host changed, advances the step
// counters and derives the scalars, which the update (update.cuh) applies. And what it reads: numbers behind addresses
// in the table, and the scales of gradients.
#pragma once

#include <cstring>
#include <iterator>

#include "tile.cuh"

namespace genopt::cuda {

// A number on the device, of any dtype, from a word with its address.
__device__ inline double read_number(uint64_t word) {
  return with_codec(dtype_in(word), [word](auto codec) {
    using Codec = decltype(codec);
    return Codec::template decode<double>(*static_cast<const typename Codec::Stored*>(address_in(word)));
  });
}

// The reciprocal of a loss scale, which torch rounds to float.
template <class Word>
__device__ double loss_unscale(const Table& table, Word word) {
  const uint64_t loss_scale = word(table.tensor(kGradScale));
  return loss_scale ? static_cast<double>(static_cast<float>(1.0 / read_number(loss_scale))) : 1.0;
}

// Of all gradients: 1 / micro-batches, and 1 / loss scale.
template <class Word>
__device__ double common_scale(const Table& table, Word word) {
  return as_double(word(table.control(kScale))) * loss_unscale(table, word);
}

// A group's scale, from the device where it is given there.
template <class Word>
__device__ double group_scale(const Table& table, Word word, int group) {
  const double scale = common_scale(table, word);
  const uint64_t given = word(table.tensor(kGroupScales));
  return given ? scale * static_cast<const double*>(address_in(given))[group] : scale;
}

// Adds to a step counter in its own precision, as torch does, and returns it.
__device__ inline double advance(const DeviceRow& row, float by) {
  if (!row.step) return 0;
  if (row.step_dtype == DType::kFloat64) return *static_cast<double*>(row.step) += by;
  return *static_cast<float*>(row.step) += by;
}

// A group's options for the rule.
template <class Rule, class Word>
__device__ void read_options(const Table& table, Word word, int group, double (&options)[kAllOptions]) {
  constexpr int kCount = static_cast<int>(std::size(Rule::kOptions));
#pragma unroll
  for (int k = 0; k < kAllOptions; ++k) {
    options[k] = kUnset;
    if (k >= kCount && k < kMaxOptions) continue;
    const uint64_t source = k < kMaxOptions ? word(table.source(k, group)) : 0;
    options[k] = source ? read_number(source) : as_double(word(table.option(k, group)));
  }
}

// Undoes what the prologue did to a row's step counter and running numbers.
__device__ inline void take_back(const Table& table, int r, const DeviceRow& row) {
  advance(row, -1);
  for (int i = 0; i < kMaxRunning; ++i)
    if (row.running[i])  // else nothing was written there
      write_running(row.running[i], row.running_dtype[i], as_double(table.words[table.running_before(r, i)]));
}

// Writes `payload` into the table; then, for the first `rows` rows, advances the step counters and derives their
// scalars. What may be in the payload is read from there: the table has it only later.
template <class Rule, int kWords>
__global__ void __launch_bounds__(kThreads, 4)
    prologue(const __grid_constant__ Table table, const __grid_constant__ Payload<kWords> payload, int rows) {
  const int64_t i = thread_here();
  if (i < payload.count) table.words[payload.at + i] = payload.words[i];
  if (i >= rows) return;
  const auto word = [&](int64_t at) {
    const bool travels = at >= payload.at && at < payload.at + payload.count;
    return travels ? payload.words[at - payload.at] : table.words[at];
  };
  const int r = static_cast<int>(i);
  const uint64_t found_inf = word(table.tensor(kFoundInf));
  const bool skips = found_inf && read_number(found_inf) != 0;
  if (i == 0) {
    table.words[Table::kSkip] = skips;
    table.words[Table::kRowsDone] = 0;
    const double unscale = loss_unscale(table, word);
    memcpy(&table.words[Table::kUnscale], &unscale, sizeof unscale);
  }
  const auto* const shared = static_cast<const double*>(address_in(word(table.tensor(kSharedNumbers))));
  for (int k = 0; k < kSharedOf<Rule> && i == 0; ++k) table.words[Table::kShared + k] = bits_of(shared[k]);
  if (table.measures) {
    const NormColumns norms(table);
    norms.spans_done[r] = 0;
    norms.row_sums[r] = 0;
  }
  if (table.totals_rows) {
    const TotalColumns columns(table);
    columns.spans_done[r] = 0;
    for (int n = 0; n < kTotalsOf<Rule> && kSharedOf<Rule>; ++n) columns.of_rows(n)[r] = 0;
  }
  if (!word(table.grad(r))) return;

  const DeviceRow& row = *reinterpret_cast<const DeviceRow*>(table.words + table.row(r));
  // A step that the norm turns out to skip takes this back: see norm.cu.
  const double t = advance(row, skips ? 0 : 1);

  const double factor = table.measures ? 1.0 : group_scale(table, word, row.group);
  double options[kAllOptions];
  read_options<Rule>(table, word, row.group, options);
  if constexpr (constexpr int kEps = kEpsOf<Rule>; kEps >= 0)
    if (options[kEps] == kUnset) options[kEps] = epsilon_of(row.dtype[row.param()]);
  constexpr int kRunning = kRunningOf<Rule>;
  double running[kMaxRunning > kMaxShared ? kMaxRunning : kMaxShared];
  for (int i = 0; i < kRunning; ++i) {
    running[i] = read_running(row.running[i], row.running_dtype[i]);
    table.words[table.running_before(r, i)] = bits_of(running[i]);
  }
  for (int i = 0; i < kSharedOf<Rule>; ++i) running[i] = shared[i];
  const auto derive = [&]<class T>(T) {
    static_assert(sizeof(Scalars<Rule, T>) + kRunning * 8 <= kScalarsBytes);
    Scalars<Rule, T> scalars(options, t, running);
    scalars.around.factor *= static_cast<T>(factor);
    *reinterpret_cast<Scalars<Rule, T>*>(table.words + table.scalars(r)) = scalars;
  };
  if (row.dtype[kParam] == DType::kFloat64) {
    derive(double{});
  } else {
    derive(float{});
  }
  for (int i = 0; i < kRunning && !skips; ++i) write_running(row.running[i], row.running_dtype[i], running[i]);
}

}  // namespace genopt::cuda
