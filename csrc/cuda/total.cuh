// Between prologue (or norm) and update, for rules that need to know something of a whole row (rules/rule.h): what its
// elements come to, and the scalars that follow from it. As cpu/total.h.
#pragma once

#include <bit>

#include "lean.cuh"
#include "prologue.cuh"
#include "sums.cuh"
#include "update.cuh"

namespace genopt::cuda {

// What a lane adds up of a span, of each total.
template <class Rule>
using LaneTotals = BinnedSum<TotalOf<Rule>>[kTotalsOf<Rule>];

// Adds the shares of a lane's elements. kUsed: the row's states; padding, of which a rule may make NaN, has no share.
template <unsigned kUsed, class Rule, class T, class Value, class IsPadding>
__device__ void add_shares(const Scalars<Rule, T>& scalars, Value value, IsPadding is_padding,
                           LaneTotals<Rule>& totals) {
  T shares[kMaxTotals][kElements];
#pragma unroll
  for (int j = 0; j < kElements; ++j) {
    const auto x = [&](int k) { return kTotaledOf<Rule, kUsed> >> k & 1 ? value(k, j) : T(0); };
    T states[] = {x(kState), x(kState + 1), x(kState + 2), x(kState + 3)}, given[kMaxTotals];
    scalars.update.template share<kUsed>(given, x(kParam), scalars.around.gradient(x(kGrad)), states[0], states[1],
                                         states[2], states[3]);
#pragma unroll
    for (int n = 0; n < kTotalsOf<Rule>; ++n) shares[n][j] = is_padding(j) ? T(0) : given[n];
  }
#pragma unroll
  for (int n = 0; n < kTotalsOf<Rule>; ++n) add_up(shares[n], totals[n]);
}

// Of the rows of a kind (device_plan.h), which compute in T: one warp, one span. tile_of(row): its tiles' elements;
// add_up(row, scalars, gradient, span, lane, totals) adds the shares of a span's tiles.
template <class Rule, class T, class TileOf, class AddUp>
__device__ void total_of_kind(const Table& table, int kind, TileOf tile_of, AddUp add_up) {
  constexpr int kCount = kTotalsOf<Rule>;
  const int lane = lane_here();
  const int64_t number = warp_here();
  if (number >= table.spans || (table.may_skip && table.words[Table::kSkip] != 0)) return;
  const int r = find_row(table.words + table.first_span(0), table.rows, number, lane);
  const uint64_t grad = table.words[table.grad(r)];
  const DeviceRow& row = *reinterpret_cast<const DeviceRow*>(table.words + table.row(r));
  if (!grad || row.only_average || !row.totaled || row.numel == 0 || row.kind != kind) return;

  const auto scalars = scalars_of<Scalars<Rule, T>>(table, row, r);
  const int64_t first = static_cast<int64_t>(table.words[table.first_span(r)]);
  const TotalColumns columns(table);
  {
    LaneTotals<Rule> sums;
    add_up(row, scalars, reinterpret_cast<void*>(grad), span_of(row, number - first, tile_of(row)), lane, sums);
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const Binned sum = across_lanes(sums[n].total());
      if (lane == 0) pack<TotalOf<Rule>>(sum, columns.of(n)[number]);
    }
  }
  const int64_t count = spans_of(row.numel, tile_of(row));
  if (!arrives_last(columns.spans_done + r, count, lane)) return;
  double totals[kCount];
#pragma unroll
  for (int n = 0; n < kCount; ++n)
    totals[n] = join_spans<TotalOf<Rule>>(columns.of(n) + first, count, lane).value(Norm::kTwo);
  if (lane != 0) return;
  if constexpr (kSharedOf<Rule> > 0) {
    for (int n = 0; n < kCount; ++n) columns.of_rows(n)[r] = totals[n];
  } else {
    auto& own = *reinterpret_cast<Scalars<Rule, T>*>(table.words + table.scalars(r));
    own.update.settle(totals, static_cast<double>(row.numel));
  }
}

// Of rows of any kind that compute in T.
template <class Rule, class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    total(const __grid_constant__ Table table, int kind) {
  constexpr int kUsable = std::bit_width(Rule::kTotaled);
  __shared__ Slots<T, kUsable> slots;
  const auto add_up = [&](const DeviceRow& row, const Scalars<Rule, T>& scalars, void* gradient, const Span& span,
                          int lane, LaneTotals<Rule>& sums) {
    const RowOperands operands{row, reinterpret_cast<uint64_t>(gradient), false, row.extra == Extra::kMaster,
                               Rule::kTotaled & loaded_of<Rule>(row)};
    const uint64_t* const layout = table.words + table.layouts() + row.layout;
    int number = span.first_tile;
#pragma unroll 1
    for (int64_t start = span.begin; start < span.end; start += tile_of<T>(row), ++number) {
      const RowTile here{{start, count_of(span.end - start, tile_of<T>(row)), lane, number}, row, layout};
      LaneOperand<T> x[kOperands];
      load_operands(x, operands, here, slots);
      if (operands.loads(kParam) && row.extra == Extra::kCompensation) join_rest(x[kParam], here, slots.values[kParam]);
      find_factors<Rule>(table, here, slots);
      const auto value = [&](int k, int j) {
        return is_factor<Rule>(k) ? slots.values[k][j][threadIdx.x] : x[k].values[j];
      };
      const auto is_padding = [&](int j) { return here.element(j) >= here.count; };
      [&]<unsigned... kMasks>(StateMasks<kMasks...>) {
        ((row.used % kWithAverage == kMasks ? add_shares<kMasks>(scalars, value, is_padding, sums) : void()), ...);
      }(typename Rule::Masks{});
    }
  };
  total_of_kind<Rule, T>(table, kind, tile_of<T>, add_up);
}

// How many blocks are to run on a processor: as many as registers let, of which sums and operands take most. `read`:
// operands, as a mask.
constexpr int total_blocks(unsigned read, const Way& way, bool factored) {
  if (factored) return 3;
  if (kIsTight && read >= kOfFirstState && way.state == Form::kCodes) return read & kOfParam ? 4 : 5;
  const int most = !(read & kOfParam) || read < kOfFirstState ? 6 : way == kWays[0] ? 4 : 5;
  return read & kOfParam && way.extra == Extra::kCompensation ? most - 1 : most;
}

// Of lean rows (lean.cuh), all of one kind.
template <class Rule, unsigned kUsed, int kWay>
__global__ void __launch_bounds__(kThreads, total_blocks(Rule::kTotaled, kWays[kWay], (kUsed & kFactorsOf<Rule>) != 0))
    lean_total(const __grid_constant__ Table table, int kind) {
  constexpr Way kStored = kWays[kWay];
  constexpr unsigned kGiven = kUsed & kFactorsOf<Rule>;
  constexpr unsigned kRead = kTotaledOf<Rule, kUsed & ~kGiven>;
  constexpr bool kHasFloats = kStored.param == Form::kFloat || (kRead & kOfParam && kStored.extra == Extra::kMaster) ||
                              (kRead >= kOfFirstState && kStored.state == Form::kFloat);
  constexpr int kPiece = kHasFloats ? 4 : 8;  // 16 bytes of the widest operand that is read
  const auto tile_of = [](const DeviceRow& row) { return kStored.state == Form::kCodes ? int{row.tile} : kTile; };
  const auto add_up = [&](const DeviceRow& row, const Scalars<Rule, float>& scalars, void* gradient, const Span& span,
                          int lane, LaneTotals<Rule>& sums) {
    const auto add_tile = [&](const Tile& tile) {
      LeanTile<Rule, kRead, kWay, kPiece> x;
      x.load(row, gradient, tile);
      float values[kState + kMaxStates][kElements];
      if constexpr (kGiven != 0)
        load_factors(values[kState + kFirstFactor<Rule>], values[kState + kFirstFactor<Rule> + 1], table, row, tile,
                     [&](int j) { return tile.template element<kPiece>(j); });
      x.decode(values, row.dtype[kParam]);
      const auto value = [&](int k, int j) { return values[k][j]; };
      add_shares<kUsed>(scalars, value, [&](int j) { return tile.template element<kPiece>(j) >= tile.count; }, sums);
    };
    const int size = tile_of(row);
    int64_t start = span.begin;
    int number = span.first_tile;
#pragma unroll 1
    for (; start + size <= span.end; start += size, ++number) add_tile({start, size, lane, number});
    if (start < span.end) add_tile({start, count_of(span.end - start), lane, number});
  };
  total_of_kind<Rule, float>(table, kind, tile_of, add_up);
}

// After it, for rules that need totals of all rows together: one thread a row. `first`: the row whose thread advances
// the shared numbers.
template <class Rule>
__global__ void __launch_bounds__(kThreads) settle(const __grid_constant__ Table table, int first) {
  constexpr int kCount = kTotalsOf<Rule>, kShared = kSharedOf<Rule>;
  __shared__ Places all_places;
  if (table.may_skip && table.words[Table::kSkip] != 0) return;
  const TotalColumns columns(table);
  double totals[kCount];
#pragma unroll
  for (int n = 0; n < kCount; ++n)
    totals[n] = join<TotalOf<Rule>>(table.rows, lane_here(), all_places[threadIdx.x / kWarp],
                                    [&](int64_t k) { return columns.of_rows(n)[k]; });
  const int64_t i = thread_here();
  if (i >= table.rows) return;
  const int r = static_cast<int>(i);
  const DeviceRow& row = *reinterpret_cast<const DeviceRow*>(table.words + table.row(r));
  if (!table.words[table.grad(r)] || row.only_average || row.numel == 0) return;
  const auto word = [&](int64_t at) { return table.words[at]; };
  double values[kAllOptions], shared[kShared];
  read_options<Rule>(table, word, row.group, values);
  const auto options = options_of<Rule>(values);
#pragma unroll
  for (int k = 0; k < kShared; ++k) shared[k] = as_double(table.words[Table::kShared + k]);
  uint64_t* const own = table.words + table.scalars(r);
  if (row.dtype[kParam] == DType::kFloat64) {
    reinterpret_cast<Scalars<Rule, double>*>(own)->update.settle(options, totals, shared);
  } else {
    reinterpret_cast<Scalars<Rule, float>*>(own)->update.settle(options, totals, shared);
  }
  if (r != first) return;
  auto* const numbers = static_cast<double*>(address_in(table.words[table.tensor(kSharedNumbers)]));
  for (int k = 0; k < kShared; ++k) numbers[k] = shared[k];
}

}  // namespace genopt::cuda
