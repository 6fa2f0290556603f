// How one row's tiles are walked on CPU: load, rule, store (assembly.h). Contiguous tiles of fp32, bf16, fp64 and 8-bit
// codes are stepped where they lie, all others by way of buffers. Included once by each cpu/walk_*.cpp, which sets
// the instruction set, GENOPT_VECTOR_BYTES and GENOPT_CAPABILITY, the namespace that keeps the copies apart.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "assembly.h"
#include "gradient.h"
#include "kernels.h"
#include "measure.h"

namespace genopt::GENOPT_CAPABILITY {

// Calls visit(std::bool_constant): whether whole tiles are prefetched on this processor.
template <class Visit>
GENOPT_INLINE void with_prefetch(Visit visit) {
  cpu::tuning.prefetch ? visit(std::true_type{}) : visit(std::false_type{});
}

// The last elements of a tile, less than a vector of them, in memory where a vector of them can be stepped.
class Tail {
 public:
  // The elements [from, from + count) of `tile`, as those of the tile that is returned. Called once for each operand.
  template <class Stored>
  GENOPT_INLINE Stored* load(Stored* tile, int64_t from, int64_t count, bool is_written) {
    Copy& copy = copies_[size_++];
    copy.is_written = is_written;
    copy.elements = tile + from;
    copy.bytes = count * sizeof(Stored);
    std::memset(copy.bytes_at, 0, sizeof copy.bytes_at);
    std::memcpy(copy.bytes_at, copy.elements, copy.bytes);
    return reinterpret_cast<Stored*>(copy.bytes_at) - from;
  }
  void store() const {
    for (int i = 0; i < size_; ++i)
      if (copies_[i].is_written) std::memcpy(copies_[i].elements, copies_[i].bytes_at, copies_[i].bytes);
  }

 private:
  struct Copy {
    alignas(64) char bytes_at[kWidth * sizeof(float)];
    void* elements;
    int64_t bytes;
    bool is_written;
  };
  Copy copies_[kOperands];
  int size_ = 0;
};

// A row whose states are all stored with the codec State. Returns where it ended.
template <class Rule, unsigned kUsed, class Param, class State, bool kHasExtra, class T>
__attribute__((noinline)) int64_t run_plain(const Scalars<Rule, T>& scalars, const Row& row, int64_t start,
                                            int64_t stop) {
  using Step = Assembly<Rule, kUsed, T, Param, kHasExtra>;
  bool fits = Step::takes(row);
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
    phase = tile_phase(scalars.phase, start);
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
  const auto run = [&]<bool kPrefetches>(std::bool_constant<kPrefetches>) __attribute__((always_inline)) {
    float scales[kMaxStates];
    void* codes[kMaxStates];
    Words most[kMaxStates];
    each_state<Rule, kUsed>([&]<class Block>(auto k, Block) {
      scales[k] = row.scales[k][start / kTile];
      codes[k] = element<Block>(row, kState + k, start);
      most[k] = Words(0);
    });
    assembly.begin(start, stop);
    for (int i = 0; i < kTile; i += kWidth) {
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
      prefetch(row, kState + k, start + kTile, kTile);
      row.scales[k][start / kTile] = scales[k] = Block::scale_for(largest(most[k]));
    });
    const uint32_t phase = tile_phase(scalars.phase, start);
    for (int i = 0; i < kTile; i += kWidth) {
      const Words thresholds = thresholds_from(phase, i);
      each_state<Rule, kUsed>([&]<class Block>(auto k, Block) {
        store_ints(static_cast<typename Block::Stored*>(codes[k]) + i,
                   Block(scales[k]).encode(load<Floats>(values[k] + i), thresholds));
      });
    }
  };
  with_prefetch([&](auto prefetches) __attribute__((always_inline)) {
    for (; stop - start >= kTile; start += kTile) run(prefetches);
  });
  return start;
}

// What one of the loops above takes of a row. Returns where it ended.
template <class Rule, unsigned kUsed>
GENOPT_INLINE int64_t run_direct(const Scalars<Rule, double>& scalars, const Row& row, int64_t start, int64_t stop) {
  return run_plain<Rule, kUsed, Float64, Float64, false>(scalars, row, start, stop);
}
template <class Rule, unsigned kUsed>
GENOPT_INLINE int64_t run_direct(const Scalars<Rule, float>& scalars, const Row& row, int64_t start, int64_t stop) {
  start = run_plain<Rule, kUsed, Float32, Float32, false>(scalars, row, start, stop);
  if constexpr (kUsed < kWithAverage) {
    if (start == stop) return start;
    const auto run = [&]<bool kHasExtra>(std::bool_constant<kHasExtra>) {
      start = run_plain<Rule, kUsed, BFloat16, BFloat16, kHasExtra>(scalars, row, start, stop);
      if constexpr (kUsed != 0) {
        start = run_plain<Rule, kUsed, BFloat16, Float32, kHasExtra>(scalars, row, start, stop);
        start = run_coded<Rule, kUsed, BFloat16, kHasExtra>(scalars, row, start, stop);
      }
    };
    if (row.extra != Extra::kNone) {
      run(std::true_type{});
      return start;
    }
    run(std::false_type{});
    if constexpr (kUsed != 0) {
      start = run_plain<Rule, kUsed, Float32, BFloat16, false>(scalars, row, start, stop);
      start = run_coded<Rule, kUsed, Float32, false>(scalars, row, start, stop);
    }
  }
  return start;
}

// Tiles of any kind, by way of buffers where operands are not values in place.
template <class Rule, unsigned kUsed, class T>
__attribute__((noinline)) void run_buffered(const Scalars<Rule, T>& scalars, const Row& row, int64_t start,
                                            int64_t stop) {
  using Step = Assembly<Rule, kUsed, T, Buffered<T>, true>;
  Step assembly(scalars, row);
  TileOperand<T> operands[kOperands];
  T* values[kOperands] = {};
  for (int count; start < stop; start += count) {
    count = static_cast<int>(std::min<int64_t>(kTile, stop - start));
    const int padded = (count + kLanes - 1) & -kLanes;
    for (int k = 0; k < kOperands; ++k) {
      if (!is_used(kUsed, k) && (k != kExtra || row.extra == Extra::kNone)) continue;
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
    for (int k = 0; k < kOperands; ++k)
      if (k != kGrad && values[k]) operands[k].store(scalars);
  }
}

// Tiles [begin, end) of a row: where they lie if there is a loop for them, the rest by way of buffers.
template <class Rule, unsigned kUsed, class T>
void walk(const void* storage, const Row& row, int64_t begin, int64_t end) {
  const auto& scalars = *static_cast<const Scalars<Rule, T>*>(storage);
  const int64_t stop = std::min(end * kTile, row.numel);
  const int64_t start = run_direct<Rule, kUsed>(scalars, row, begin * kTile, stop);
  if (start < stop) run_buffered<Rule, kUsed>(scalars, row, start, stop);
}

// The average alone.
template <class T>
__attribute__((noinline)) void apply_average(const Around<T>& shared, const T* p, T* average, int count) {
  const Around<T> around = shared;
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) average[i] = around.average(average[i], p[i]);
}

// An EMA-only row.
template <class Rule, class T>
void walk_only_average(const void* storage, const Row& row, int64_t begin, int64_t end) {
  const auto& scalars = *static_cast<const Scalars<Rule, T>*>(storage);
  const int64_t stop = std::min(end * kTile, row.numel);
  TileOperand<T> param, average;
  for (int64_t start = begin * kTile; start < stop; start += kTile) {
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

template <class Rule, unsigned... kMasks>
void fill(KernelTable& table, int rule, StateMasks<kMasks...>) {
  const auto set = [&]<unsigned kUsed>(StateMasks<kUsed>) {
    table.tiles[rule][kUsed] = {walk<Rule, kUsed, float>, walk<Rule, kUsed, double>};
  };
  (set(StateMasks<kMasks>{}), ...);
  (set(StateMasks<kMasks | kWithAverage>{}), ...);
  table.only_average[rule] = {walk_only_average<Rule, float>, walk_only_average<Rule, double>};
}

const KernelTable& kernel_table() {
  static const KernelTable table = [] {
    KernelTable kernels;
    for_each_rule([&]<class Rule, int kIndex>() { fill<Rule>(kernels, kIndex, typename Rule::Masks{}); });
    for (const Norm norm : {Norm::kTwo, Norm::kOne, Norm::kMax})
      with_measure(
          norm, [&]<class M>(M) { kernels.spans[static_cast<int>(norm)] = {measure<M, float>, measure<M, double>}; });
    kernels.leave_gradient = leave_gradient;
    return kernels;
  }();
  return table;
}

}  // namespace genopt::GENOPT_CAPABILITY
