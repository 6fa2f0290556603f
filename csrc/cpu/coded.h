// Tiles with states in codes: decoded, stepped, and encoded by the scales that their new values ask for.
#pragma once

#include "assembly.h"

namespace genopt::GENOPT_CAPABILITY {

// Whole tiles whose states are all in codes. Returns where it ended.
template <class Rule, unsigned kUsed, class Param, bool kHasExtra>
__attribute__((noinline)) int64_t run_coded(const Scalars<Rule, float>& scalars, const Row& row, int64_t start,
                                            int64_t stop) {
  using Step = Assembly<Rule, kUsed, float, Param, kHasExtra>;
  bool fits = Step::takes(row);
  each_state<Rule, kUsed>([&]<class Block>(auto k, Block) { fits = fits && is_direct<Block>(row, kState + k); });
  if (!fits) return start;
  Step assembly(scalars, row);
  alignas(64) float values[kMaxStates][kTile];
  const int tile = row.tile;
  int64_t number = start / tile;
  const auto run = [&]<bool kPrefetches>(std::bool_constant<kPrefetches>) __attribute__((always_inline)) {
    float scales[kMaxStates];
    void* codes[kMaxStates];
    Words most[kMaxStates];
    each_state<Rule, kUsed>([&]<class Block>(auto k, Block) {
      scales[k] = row.scales[k][number];
      codes[k] = element<Block>(row, kState + k, start);
      most[k] = Words(0);
    });
    assembly.begin(start, stop);
    for (int i = 0; i < tile; i += kWidth) {
      Floats x[kMaxStates];
      if constexpr (kPrefetches) assembly.prefetch_operands(i);
      each_state<Rule, kUsed>([&]<class Block>(auto k, Block) {
        x[k] = Block(scales[k]).decode(load_ints(static_cast<const typename Block::Stored*>(codes[k]) + i));
      });
      assembly.step(i, x);
      each_state<Rule, kUsed>([&]<class Block>(auto k, Block) {
        store(values[k] + i, x[k]);
        most[k] = larger(most[k], as_unsigned(Block::magnitude(x[k])));
      });
    }
    each_state<Rule, kUsed>([&]<class Block>(auto k, Block) {
      prefetch(row, kState + k, start + tile, tile);
      row.scales[k][number] = scales[k] = Block::scale_for(largest(most[k]));
    });
    const uint32_t phase = tile_phase(scalars.phase, row.place_of(start));
    for (int i = 0; i < tile; i += kWidth) {
      const Words thresholds = thresholds_from(phase, i);
      each_state<Rule, kUsed>([&]<class Block>(auto k, Block) {
        store_ints(static_cast<typename Block::Stored*>(codes[k]) + i,
                   Block(scales[k]).encode(load<Floats>(values[k] + i), thresholds));
      });
    }
  };
  with_prefetch([&](auto prefetches) __attribute__((always_inline)) {
    for (; stop - start >= tile; start += tile, ++number) run(prefetches);
  });
  return start;
}

}  // namespace genopt::GENOPT_CAPABILITY
