// The last kernel of a step, for rows that lean.cuh does not serve: load, rule, store, as cpu/assembly.h, with the same
// rules and codecs. One warp, one tile.
#pragma once

#include <iterator>

#include "factor.cuh"
#include "lane_operand.cuh"

namespace genopt::cuda {

// The rule, compiled once for each set of states that its rows may have.
template <class Rule, class T>
__device__ void apply(const Scalars<Rule, T>& scalars, unsigned used, LaneOperand<T> (&x)[kOperands]) {
  const auto apply_with = [&]<unsigned kUsed>() {
#pragma unroll
    for (int j = 0; j < kElements; ++j)
      scalars.update.template apply<kUsed | kAnyDecay<Rule>>(
          x[kParam].values[j], scalars.around.gradient(x[kGrad].values[j]), x[kState].values[j],
          x[kState + 1].values[j], x[kState + 2].values[j], x[kState + 3].values[j]);
  };
  [&]<unsigned... kMasks>(StateMasks<kMasks...>) {
    ((used % kWithAverage == kMasks ? apply_with.template operator()<kMasks>() : void()), ...);
  }(typename Rule::Masks{});
}

// Writes what the step leaves in the gradient. `grad`: as it was loaded, where that is not zero.
template <class T>
__device__ void leave_gradient(const Table& table, Gradients left, LaneOperand<T>& grad, const RowTile& tile,
                               T (*slots)[kThreads]) {
  const bool zeroes = left == Gradients::kZeroed;
  const T unscale = static_cast<T>(as_double(table.words[Table::kUnscale]));
#pragma unroll
  for (int j = 0; j < kElements; ++j) grad.values[j] = zeroes ? T(0) : unscale * grad.values[j];
  store_one(grad, tile, kGrad, slots);
}

// The average of the weights, from p as it has been stored.
template <class T>
__device__ void average(const Around<T>& around, LaneOperand<T>& param, const RowTile& tile, T (*slots)[kThreads]) {
  LaneOperand<T> e;
  load_one(e, tile, kAverage, tile.row.data[kAverage], slots);
  const bool has_master = tile.row.extra == Extra::kMaster;
  with_codec(has_master ? tile.row.dtype[kExtra] : tile.row.dtype[kParam], [&](auto codec) {
#pragma unroll
    for (int j = 0; j < kElements; ++j)
      e.values[j] =
          around.average(e.values[j], decltype(codec)::template decode<T>(decltype(codec)::encode(param.values[j])));
  });
  store_one(e, tile, kAverage, slots);
}

// Before the rule, for a parameter with a compensation: p + c.
template <class T>
__device__ void join_rest(LaneOperand<T>& param, const RowTile& tile, T (*slots)[kThreads]) {
  LaneOperand<T> rest;
  load_one(rest, tile, kExtra, tile.row.data[kExtra], slots);
#pragma unroll
  for (int j = 0; j < kElements; ++j) param.values[j] += rest.values[j];
}

// After it: p as it will be stored, and c as what that leaves over.
template <class T>
__device__ void part_rest(LaneOperand<T>& param, const RowTile& tile, T (*slots)[kThreads]) {
  LaneOperand<T> rest;
  rest.point_to(tile, kExtra, tile.row.data[kExtra]);
  with_codec(tile.row.dtype[kParam], [&](auto codec) {
    using Codec = decltype(codec);
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const T rounded = Codec::template decode<T>(Codec::encode(param.values[j]));
      rest.values[j] = rounded - rounded == T(0) ? param.values[j] - rounded : T(0);
      param.values[j] = rounded;
    }
  });
  store_one(rest, tile, kExtra, slots);
}

// The parameter, rounded from its master.
template <class T>
__device__ void store_rounded(const LaneOperand<T>& master, const RowTile& tile, T (*slots)[kThreads]) {
  LaneOperand<T> param;
  param.point_to(tile, kParam, tile.row.data[kParam]);
#pragma unroll
  for (int j = 0; j < kElements; ++j) param.values[j] = master.values[j];
  store_one(param, tile, kParam, slots);
}

// Which operands of its row a tile's update loads, and where from: as the parameter its master, where it has one.
struct RowOperands {
  const DeviceRow& row;
  uint64_t grad;
  bool only_average, has_master;
  unsigned wanted = ~0u;  // as a mask

  __device__ bool loads(int k) const {
    return (wanted >> k & 1) && (k == kParam || (!only_average && is_used(row.used, k)));
  }
  __device__ int source(int k) const {
    return k == kParam ? row.param() : k;
  }
  __device__ DType dtype(int k) const {
    return k == kParam && has_master ? row.dtype[kExtra] : row.dtype[k];
  }
  __device__ void* address(int k) const {
    return k == kGrad ? reinterpret_cast<void*>(grad) : k == kParam && has_master ? row.data[kExtra] : row.data[k];
  }
};

// The first kUsable operands: all are under way before the first is waited for.
template <int kUsable, class T>
__device__ void load_operands(LaneOperand<T> (&x)[kOperands], const RowOperands& operands, const RowTile& tile,
                              Slots<T, kUsable>& slots) {
#pragma unroll
  for (int k = 0; k < kUsable; ++k)
    if (operands.loads(k)) x[k].load(tile, operands.source(k), operands.address(k), operands.dtype(k));
#pragma unroll
  for (int k = 0; k < kUsable; ++k)
    if (operands.loads(k)) x[k].load_slots(tile, operands.source(k), slots.values[k]);
#pragma unroll
  for (int k = 0; k < kUsable; ++k)
    if (operands.loads(k)) x[k].decode(slots.values[k]);
}

// Parameter and states, rounded as the row says, on the way to codes too.
template <int kUsable, class T, class Scalars>
__device__ void store_operands(LaneOperand<T> (&x)[kOperands], const RowOperands& operands, const RowTile& tile,
                               const Scalars& scalars, Slots<T, kUsable>& slots) {
  const DeviceRow& row = tile.row;
  if (row.unbiased & 1 << kParam) {
    const uint32_t key = tile_key(scalars.random, row.place_of(tile.start));
    x[kParam].round_by(tile, [key](uint32_t i) { return random_bits(key, i); });
  }
  const uint32_t phase = tile_phase(scalars.phase, row.place_of(tile.start));
#pragma unroll
  for (int k = kState; k < kUsable; ++k) {
    if (!operands.loads(k)) continue;
    if (is_block(row.dtype[k])) {
      x[k].encode_block(tile, k, phase);
    } else if (row.unbiased >> k & 1) {
      x[k].round_by(tile, [phase](uint32_t i) { return threshold_of(phase, i); });
    }
  }
#pragma unroll
  for (int k = 0; k < kUsable; ++k)
    if (k != kGrad && operands.loads(k)) x[k].store(tile, slots.values[k]);
#pragma unroll
  for (int k = 0; k < kUsable; ++k)
    if (k != kGrad && operands.loads(k)) x[k].store_slots(tile, operands.source(k), slots.values[k], phase);
}

// Operands that are loaded as they are, as a mask: all but factors.
template <class Rule>
__device__ unsigned loaded_of(const DeviceRow& row) {
  if constexpr (kFactorsOf<Rule> == 0) {
    return ~0u;
  } else {
    return row.factors ? ~(kFactorsOf<Rule> << kState) : ~0u;
  }
}

template <class Rule>
__device__ constexpr bool is_factor(int k) {
  return kFactorsOf<Rule> << kState >> k & 1;
}

// Puts the factors of a tile's elements into their slots, where the row has some.
template <class Rule, int kUsable, class T>
__device__ void find_factors(const Table& table, const RowTile& tile, Slots<T, kUsable>& slots) {
  if constexpr (kFactorsOf<Rule> != 0) {
    if (!tile.row.factors) return;
    constexpr int kRow = kState + kFirstFactor<Rule>;
    TileFactors<T> factors(table, tile.row, tile);
#pragma unroll 1
    for (int j = 0; j < kElements; ++j) {
      T of_row = 0, of_column = 0;
      if (const int e = tile.element(j); e < tile.count) factors.find(e, of_row, of_column);
      slots.values[kRow][j][threadIdx.x] = of_row;
      slots.values[kRow + 1][j][threadIdx.x] = of_column;
    }
  }
}

// Of rows that compute in T.
template <class Rule, class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 || std::size(Rule::kStates) > 3 ? 2 : 3)
    update(const __grid_constant__ Table table, const __grid_constant__ TileRange range) {
  if (warp_here() >= range.tiles) return;
  const auto [r, number] = find_tile(table, range);
  const uint64_t grad = table.words[table.grad(r)];
  const DeviceRow& row = *reinterpret_cast<const DeviceRow*>(table.words + table.row(r));
  if (!grad) return;
  const bool skips = table.may_skip && table.words[Table::kSkip] != 0, only_average = row.only_average;
  if (skips && (only_average || table.gradients != Gradients::kZeroed)) return;
  const auto scalars = scalars_of<Scalars<Rule, T>>(table, row, r);
  if constexpr (requires { scalars.update.is_idle(scalars.around); })
    if (scalars.update.is_idle(scalars.around)) return;

  const int64_t start = int64_t{number} * row.tile;
  const RowTile here{{start, count_of(row.numel - start, row.tile), lane_here(), number},
                     row,
                     table.words + table.layouts() + row.layout};
  constexpr int kUsable = kState + static_cast<int>(std::size(Rule::kStates));
  const RowOperands operands{row, grad, only_average, row.extra == Extra::kMaster, loaded_of<Rule>(row)};
  __shared__ Slots<T, kUsable> slots;
  LaneOperand<T> x[kOperands];
  if (skips) {
    x[kGrad].load(here, kGrad, operands.address(kGrad));
    leave_gradient(table, Gradients::kZeroed, x[kGrad], here, slots.values[kGrad]);
    return;
  }
  load_operands(x, operands, here, slots);
  if (!only_average) {
    if (row.extra == Extra::kCompensation) join_rest(x[kParam], here, slots.values[kParam]);
    find_factors<Rule>(table, here, slots);
#pragma unroll
    for (int k = kState; k < kUsable; ++k) {
      if (!is_factor<Rule>(k) || !row.factors) continue;
#pragma unroll
      for (int j = 0; j < kElements; ++j) x[k].values[j] = slots.values[k][j][threadIdx.x];
    }
    apply<Rule>(scalars, row.used, x);
    if (row.extra == Extra::kCompensation) part_rest(x[kParam], here, slots.values[kParam]);
    if (operands.has_master) store_rounded(x[kParam], here, slots.values[kParam]);
    store_operands(x, operands, here, scalars, slots);
  }
  if (is_used(row.used, kAverage)) average(scalars.around, x[kParam], here, slots.values[kParam]);
  if (!only_average && table.gradients != Gradients::kKept)
    leave_gradient(table, table.gradients, x[kGrad], here, slots.values[kGrad]);
}

}  // namespace genopt::cuda
