// What a rule needs to know of a whole row before it is stepped (rules/rule.h): one span's share.
#pragma once

#include <algorithm>

#include "measure.h"

namespace genopt::GENOPT_CAPABILITY {

// What a tile's elements share of each total. `values`: the operands', the parameter as the rule sees it, up to a whole
// vector.
template <class Rule, unsigned kUsed, class T>
__attribute__((noinline)) void find_shares(const Scalars<Rule, T>& shared, T* const (&values)[kOperands], int count,
                                           T* const (&shares)[kTotalsOf<Rule>]) {
  using V = ValuesOf<T>;
  const Scalars<Rule, T> scalars = shared;
  const bool plain = scalars.around.is_plain();
#pragma GCC ivdep
  for (int i = 0; i < count; i += kAtOnce<T>) {
    const auto value = [&](int k) __attribute__((always_inline)) {
      return kTotaledOf<Rule, kUsed> >> k & 1 ? load_values<Values<T>>(values[k] + i) : V(0);
    };
    const V p = value(kParam), g = value(kGrad);
    V x[kMaxStates], given[kMaxTotals];
    for (int k = 0; k < kMaxStates; ++k) x[k] = value(kState + k);
    scalars.update.template share<kUsed>(given, p, plain ? g : scalars.around.gradient(g), x[0], x[1], x[2], x[3]);
    for (int n = 0; n < kTotalsOf<Rule>; ++n) store_values<Values<T>>(shares[n] + i, given[n]);
  }
}

// Their squares, or they themselves, added up as norms are. kUsed: the row's states.
template <class Rule, unsigned kUsed, class T>
void total(const void* storage, const Row& row, int64_t span, Binned* totals) {
  constexpr int kCount = kTotalsOf<Rule>;
  using M = TotalOf<Rule>;
  constexpr unsigned kRead = kTotaledOf<Rule, kUsed>;
  Scalars<Rule, T> scalars = *static_cast<const Scalars<Rule, T>*>(storage);
  scalars.around.factor *= static_cast<T>(row.factor);
  const int64_t first = span * kSpan * row.tile, stop = row.start_of((span + 1) * kSpan);
  TileOperand<T> operands[kOperands];
  T* values[kOperands] = {};
  constexpr int kTogether = 4 * kTile;  // added up at once, as beginning and ending takes time
  alignas(64) T all_shares[kCount][kTogether];
  T* shares[kCount];
  BinnedSum<M> sums[kCount];
  int before = 0;  // added up together with what is next
  for (int64_t start = first; start < stop; start += row.tile) {
    const int count = static_cast<int>(std::min<int64_t>(row.tile, stop - start));
    const int padded = (count + kLanes - 1) & -kLanes;
    if (cpu::tuning.prefetch)
      for (int k = 0; k < kAverage; ++k)
        if (kRead >> k & 1 && start + 3 * row.tile <= stop) prefetch(row, k, start + 2 * row.tile, row.tile);
    const auto load = [&](int k) { return operands[k].load(row, k, start, count, padded); };
    for (int k = 0; k < kAverage; ++k)
      if (kRead >> k & 1) values[k] = load(k == kParam ? row.param() : k);
    if (kRead & kOfParam && row.extra == Extra::kCompensation) {
      const T* const rest = load(kExtra);
      for (int i = 0; i < padded; ++i) values[kParam][i] += rest[i];  // in a buffer, as it has 16 bits in memory
    }
    for (int n = 0; n < kCount; ++n) shares[n] = all_shares[n] + before;
    find_shares<Rule, kUsed>(scalars, values, count, shares);
    const int there_are = before + count;
    before = there_are + row.tile <= kTogether ? there_are : 0;
    if (before && start + row.tile < stop) continue;
    for (int n = 0; n < kCount; ++n) {
      sums[n].make_room(largest_of<Values<T>>(all_shares[n], there_are));
      BitSums some{};
      add_numbers<M, Values<T>>(all_shares[n], there_are, sums[n].grids(), 0, some);
      sums[n].add(some, there_are);
    }
  }
  for (int n = 0; n < kCount; ++n) totals[n] = sums[n].total();
}

}  // namespace genopt::GENOPT_CAPABILITY
