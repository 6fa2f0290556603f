// What a rule needs to know of a whole row before it is stepped (rules/rule.h): one span's share.
#pragma once

#include <algorithm>

#include "../plan/norm.h"
#include "operand.h"
#include "places.h"

namespace genopt::GENOPT_CAPABILITY {

// Adds to the sums of their places what a tile's elements share. `values`: the operands', the parameter as the rule
// sees it, up to a whole vector.
template <class Rule, unsigned kUsed, class T>
__attribute__((noinline)) void add_shares(const Scalars<Rule, T>& shared, T* const (&values)[kOperands], int count,
                                          double (&sums)[kTotalsOf<Rule>][kTile]) {
  using V = ValuesOf<T>;
  using M = TotalOf<Rule>;
  const Scalars<Rule, T> scalars = shared;
  const bool plain = scalars.around.is_plain();
  const auto share = [&](int i, V(&given)[kMaxTotals]) __attribute__((always_inline)) {
    const auto value = [&](int k) __attribute__((always_inline)) {
      return kTotaledOf<Rule, kUsed> >> k & 1 ? load_values<Values<T>>(values[k] + i) : V(0);
    };
    const V p = value(kParam), g = value(kGrad);
    V x[kMaxStates];
    for (int k = 0; k < kMaxStates; ++k) x[k] = value(kState + k);
    scalars.update.template share<kUsed>(given, p, plain ? g : scalars.around.gradient(g), x[0], x[1], x[2], x[3]);
  };
  int i = 0;
#pragma GCC ivdep
  for (; i + kAtOnce<T> <= count; i += kAtOnce<T>) {
    V given[kMaxTotals];
    share(i, given);
    for (int n = 0; n < kTotalsOf<Rule>; ++n) add_up<M>(given[n], sums[n] + i);
  }
  if (i == count) return;
  V given[kMaxTotals];
  share(i, given);
  for (int n = 0; n < kTotalsOf<Rule>; ++n) {  // a rule may make NaN of padding
    T each[kAtOnce<T>];
    store_values<Values<T>>(each, given[n]);
    for (int j = 0; i + j < count; ++j) sums[n][i + j] = M::join(sums[n][i + j], M::of(static_cast<double>(each[j])));
  }
}

// Their squares, or they themselves, added up in the order of csrc/README.md. kUsed: the row's states.
template <class Rule, unsigned kUsed, class T>
void total(const void* storage, const Row& row, int64_t span, double* totals) {
  constexpr int kCount = kTotalsOf<Rule>;
  using M = TotalOf<Rule>;
  constexpr unsigned kRead = kTotaledOf<Rule, kUsed>;
  Scalars<Rule, T> scalars = *static_cast<const Scalars<Rule, T>*>(storage);
  scalars.around.factor *= static_cast<T>(row.factor);
  const int64_t first = span * kSpan * kTile, stop = std::min(first + int64_t{kSpan} * kTile, row.numel);
  TileOperand<T> operands[kOperands];
  T* values[kOperands] = {};
  alignas(64) double sums[kCount][kTile] = {};
  for (int64_t start = first; start < stop; start += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, stop - start));
    const int padded = (count + kLanes - 1) & -kLanes;
    if (cpu::tuning.prefetch)
      for (int k = 0; k < kAverage; ++k)
        if (kRead >> k & 1 && start + 3 * kTile <= stop) prefetch(row, k, start + 2 * kTile, kTile);
    const auto load = [&](int k) { return operands[k].load(row, k, start, count, padded); };
    for (int k = 0; k < kAverage; ++k)
      if (kRead >> k & 1) values[k] = load(k == kParam ? row.param() : k);
    if (kRead & kOfParam && row.extra == Extra::kCompensation) {
      const T* const rest = load(kExtra);
      for (int i = 0; i < padded; ++i) values[kParam][i] += rest[i];  // in a buffer, as it has 16 bits in memory
    }
    add_shares<Rule, kUsed>(scalars, values, count, sums);
  }
  for (int n = 0; n < kCount; ++n) totals[n] = by_halves<M>(sums[n], places_of(stop - first));
}

}  // namespace genopt::GENOPT_CAPABILITY
