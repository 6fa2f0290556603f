// Elements that are stepped where they lie: contiguous, and stored with codecs of plain numbers. The usual way of fp32.
#pragma once

#include "assembly.h"
#include "tail.h"

namespace genopt::GENOPT_CAPABILITY {

// A row whose states are all stored with the codec State. Returns where it ended.
template <class Rule, unsigned kUsed, class Param, class State, bool kHasExtra, class T>
__attribute__((noinline)) int64_t run_plain(const Scalars<Rule, T>& scalars, const Row& row, int64_t start,
                                            int64_t stop) {
  using Step = Assembly<Rule, kUsed, T, Param, kHasExtra>;
  bool fits = Step::takes(row) && row.tile == kTile;
  each_state<Rule, kUsed>([&](auto k, auto) { fits = fits && is_direct<State>(row, kState + k); });
  if (!fits) return start;
  Step assembly(scalars, row);
  const bool by_threshold = row.unbiased >> kState;
  typename State::Stored* states[kMaxStates];
  uint32_t phase;
  // Elements of the tile from i on.
  const auto step = [&]<bool kPrefetches>(std::bool_constant<kPrefetches>, int64_t i) __attribute__((always_inline)) {
    typename Step::V x[kMaxStates];
    each_state<Rule, kUsed>([&](auto k, auto) {
      if constexpr (kPrefetches) assembly.prefetcher().prefetch(states[k], i);
      x[k] = load_values<State>(states[k] + i);
    });
    if constexpr (kPrefetches) assembly.prefetch_operands(i);
    assembly.step(i, x);
    each_state<Rule, kUsed>([&](auto k, auto) {
      if constexpr (sizeof *states[k] == 2)
        if (by_threshold) x[k] = State::round_by(x[k], thresholds_from(phase, static_cast<uint32_t>(i)));
      store_values<State>(states[k] + i, x[k]);
    });
  };
  const auto begin = [&]() __attribute__((always_inline)) {
    phase = tile_phase(scalars.phase, row.place_of(start));
    each_state<Rule, kUsed>([&](auto k, auto) { states[k] = element<State>(row, kState + k, start); });
    assembly.begin(start, stop);
  };
  with_prefetch([&](auto prefetches) __attribute__((always_inline)) {
    for (; stop - start >= kTile; start += kTile) {
      begin();
#pragma GCC ivdep
      for (int64_t i = 0; i < kTile; i += kAtOnce<T>) step(prefetches, i);
    }
  });
  if (start == stop) return stop;
  begin();
  const int64_t count = stop - start, whole = count & -int64_t{kAtOnce<T>};
#pragma GCC ivdep
  for (int64_t i = 0; i < whole; i += kAtOnce<T>) step(std::false_type{}, i);
  if (whole == count) return stop;
  Tail tail;
  each_state<Rule, kUsed>([&](auto k, auto) { states[k] = tail.load(states[k], whole, count - whole, true); });
  assembly.begin(start, [&]<class Codec>(int operand, Codec) {
    return tail.load(element<Codec>(row, operand, start), whole, count - whole, operand != kGrad);
  });
  step(std::false_type{}, whole);
  tail.store();
  return stop;
}

}  // namespace genopt::GENOPT_CAPABILITY
