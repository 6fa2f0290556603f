// Tiles of any kind, by way of buffers where operands are not values in place; and those of EMA-only rows.
#pragma once

#include <algorithm>

#include "assembly.h"
#include "operand.h"

namespace genopt::GENOPT_CAPABILITY {

// The weights' average of a tile.
template <class T>
__attribute__((noinline)) void apply_average(const Around<T>& shared, const T* p, T* average, int count) {
  const Around<T> around = shared;
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) average[i] = around.average(average[i], p[i]);
}

// Tiles of any kind, by way of buffers where operands are not values in place. kUsed: the states alone.
template <class Rule, unsigned kUsed, class T>
__attribute__((noinline)) void run_buffered(const Scalars<Rule, T>& scalars, const Row& row, int64_t start,
                                            int64_t stop) {
  using Step = Assembly<Rule, kUsed, T, Buffered<T>, true>;
  Step assembly(scalars, row);
  TileOperand<T> operands[kOperands];
  T* values[kOperands] = {};
  for (int count; start < stop; start += count) {
    count = static_cast<int>(std::min<int64_t>(row.tile, stop - start));
    const int padded = (count + kLanes - 1) & -kLanes;
    for (int k = 0; k < kOperands; ++k) {
      if (!is_used(row.used, k)) continue;
      if (start + kTile < stop) prefetch(row, k, start + kTile, kTile);
      values[k] = k == kParam && row.extra == Extra::kMaster ? operands[k].place(row, k, start, count, padded)
                                                             : operands[k].load(row, k, start, count, padded);
    }
    assembly.begin(start, [&](int operand, auto) { return values[operand]; });
#pragma GCC ivdep
    for (int64_t i = 0; i < padded; i += kAtOnce<T>) {
      typename Step::V x[kMaxStates];
      each_state<Rule, kUsed>([&](auto k, auto) { x[k] = load_values<Values<T>>(values[kState + k] + i); });
      assembly.step(i, x);
      each_state<Rule, kUsed>([&](auto k, auto) { store_values<Values<T>>(values[kState + k] + i, x[k]); });
    }
    if (values[kAverage]) apply_average(scalars.around, values[row.param()], values[kAverage], padded);
    for (int k = 0; k < kOperands; ++k)
      if (k != kGrad && values[k]) operands[k].store(scalars);
  }
}

// An EMA-only row.
template <class T>
void walk_only_average(const void* storage, const Row& row, int64_t begin, int64_t end) {
  const auto& scalars = *static_cast<const Scalars<Transfer, T>*>(storage);
  const int64_t stop = row.start_of(end);
  TileOperand<T> param, average;
  for (int64_t start = row.start_of(begin); start < stop; start += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, stop - start));
    const int padded = (count + kLanes - 1) & -kLanes;
    const auto load = [&](TileOperand<T>& operand, int k) {
      if (start + kTile < stop) prefetch(row, k, start + kTile, kTile);
      return operand.load(row, k, start, count, padded);
    };
    const T* const p = load(param, row.param());
    apply_average(scalars.around, p, load(average, kAverage), padded);
    average.store(scalars);
  }
}

}  // namespace genopt::GENOPT_CAPABILITY
