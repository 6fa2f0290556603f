// The norm of all gradients, and the factors that clip them. Sums: sums.cuh.
#include "../plan/decide.h"
#include "lane_operand.cuh"
#include "lean_operand.cuh"
#include "prologue.cuh"
#include "sums.cuh"

namespace genopt::cuda {
namespace {

struct None {};

// Of an operand that is contiguous and aligned, in fp32 or, for kHalf, 16 bits: what a lane has of its norm.
template <class M, Form kForm>
__device__ Binned measure_lean(const Span& span, const void* data, DType dtype, int lane) {
  constexpr int kPiece = kForm == Form::kFloat ? 4 : 8;
  constexpr int64_t kAtOnce = kForm == Form::kFloat ? 4 : 8;  // tiles whose loads are under way
  using Operand = LeanOperand<kForm, kPiece>;
  BinnedSum<M> sum;
  const auto add = [&](const Operand& x) {
    float values[kElements];
    x.decode(values, dtype);
    add_up(values, sum);
  };
  int64_t start = span.begin;
#pragma unroll 1
  for (; start + kAtOnce * kTile <= span.end; start += kAtOnce * kTile) {
    Operand x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) x[i].load(data, Tile{start + i * kTile, kTile, lane}, 0);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) add(x[i]);
  }
#pragma unroll 1
  for (; start < span.end; start += kTile) {
    Operand x;
    x.load(data, Tile{start, count_of(span.end - start), lane}, 0);
    add(x);
  }
  return sum.total();
}

// Of any operand.
template <class M, class T>
__device__ Binned measure_any(const Span& span, const Table& table, const DeviceRow& row, int operand, void* data,
                              int lane, Slots<T, 2>& slots) {
  BinnedSum<M> sum;
  const uint64_t* layout = table.words + table.layouts() + row.layout;
  const auto tile_at = [&](int64_t start) {
    const int64_t rest = span.end - start;
    return RowTile{{start, rest <= 0 ? 0 : count_of(rest), lane}, row, layout};
  };
#pragma unroll 1
  for (int64_t start = span.begin; start < span.end; start += 2 * kTile) {
    const RowTile tiles[] = {tile_at(start), tile_at(start + kTile)};  // two loads under way at once
    LaneOperand<T> x[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) x[i].load(tiles[i], operand, data);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      x[i].load_slots(tiles[i], operand, slots.values[i]);
      x[i].decode(slots.values[i]);
      add_up(x[i].values, sum);
    }
  }
  return sum.total();
}

__device__ void write_number(uint64_t word, double x) {
  if (!word) return;
  with_codec(dtype_in(word), [word, x](auto codec) {
    using Codec = decltype(codec);
    *static_cast<typename Codec::Stored*>(address_in(word)) = Codec::encode(x);
  });
}

// A group's options; only the common ones are there.
struct GroupOptions {
  double values[kAllOptions];

  __device__ GroupOptions(const Table& table, int g) {
#pragma unroll
    for (int k = kMaxOptions; k < kAllOptions; ++k) values[k] = as_double(table.words[table.option(k, g)]);
  }
  __device__ double operator[](int k) const {
    return values[k];
  }
  __device__ const double* data() const {
    return values;
  }
};

// A device tensor, or null.
template <class Words>
__device__ Words* tensor_of(const Table& table, DeviceTensorKind kind) {
  return static_cast<Words*>(address_in(table.words[table.tensor(kind)]));
}

// Of a row whose group clips by tensor.
__device__ void decide_row(const Table& table, const DeviceRow& row, int r, double sum, double weights) {
  const auto word = [&](int64_t at) { return table.words[at]; };
  NormColumns(table).row_factors[r] =
      row_factor(static_cast<Norm>(word(table.control(kNormKind))), GroupOptions(table, row.group).data(),
                 group_scale(table, word, row.group), sum, weights);
}

// All rows of the table, for decide() by one warp.
template <class M>
struct Ledger {
  const Table& table;
  const int lane;
  double* const places;
  static constexpr int lanes = kWarp;
  const NormColumns norms{table};
  const int rows = table.rows, groups = table.groups;
  const Norm kind = static_cast<Norm>(word(table.control(kNormKind)));
  const double scale = common_scale(table, [this](int64_t at) { return word(at); });
  const double max_norm = as_double(word(table.control(kMaxNorm)));
  const double* const given_sums = table.sums_given ? tensor_of<const double>(table, kRowSums) : nullptr;
  const bool is_told = word(table.tensor(kGroupScales)) != 0, some_clip_alone = table.some_clip_alone;

  __device__ uint64_t word(int64_t at) const {
    return table.words[at];
  }
  __device__ const DeviceRow& row(int64_t r) const {
    return *reinterpret_cast<const DeviceRow*>(table.words + table.row(static_cast<int>(r)));
  }
  template <class Number>
  __device__ double join(int64_t first, int64_t count, Number number) const {
    return cuda::join<M>(count, lane, places, [&](int64_t i) { return number(first + i); });
  }
  __device__ double sum(int64_t r) const {
    return __ldcg(given_sums ? given_sums + r : norms.row_sums + r);
  }
  __device__ GroupOptions options(int g) const {
    return GroupOptions(table, g);
  }
  __device__ int64_t first_row(int g) const {
    return static_cast<int64_t>(word(table.first_row(g)));
  }
  __device__ double scale_of(int g) const {
    return group_scale(table, [this](int64_t at) { return word(at); }, g);
  }
  __device__ bool clips_alone(int64_t r) const {
    return row(r).clips_alone;
  }
  __device__ double& group_factor(int g) const {
    return norms.group_factors[g];
  }
};

// Decides, and tells what was asked for. All lanes of one warp call it.
template <class M>
__device__ void decide(const Table& table, int lane, double* places) {
  Ledger<M> ledger{table, lane, places};
  if (ledger.given_sums)
#pragma unroll 1
    for (int r = lane; r < table.rows; r += kWarp)
      if (ledger.word(table.grad(r)) && ledger.row(r).by_tensor)
        decide_row(table, ledger.row(r), r, ledger.sum(r), __ldcg(ledger.given_sums + table.rows + r));
  const double norm = genopt::decide(ledger);
  const bool found = !is_finite(norm), skipped = ledger.word(Table::kSkip) != 0;
  const bool skips = found && ledger.word(table.control(kGuard)) != 0;
  if (skips && !skipped)
#pragma unroll 1
    for (int r = lane; r < table.rows; r += kWarp)
      if (ledger.word(table.grad(r))) take_back(table, r, ledger.row(r));
  __syncwarp();  // all lanes have read what lane 0 writes now
  if (lane != 0) return;
  if (skips) table.words[Table::kSkip] = 1;
  write_number(ledger.word(table.tensor(kGradNorm)), norm);
  write_number(ledger.word(table.tensor(kNonFinite)), found);
  const uint64_t counter = ledger.word(table.tensor(kSkippedSteps));
  if (counter && skips) ++*static_cast<int64_t*>(address_in(counter));
}

// What a lane has of one operand of a row.
template <class M, Measured kHow, class Slots>
__device__ Binned measure(const Span& span, const Table& table, const DeviceRow& row, int operand, void* data, int lane,
                          Slots& slots) {
  if constexpr (kHow != Measured::kLean) {
    return measure_any<M>(span, table, row, operand, data, lane, slots);
  } else {
    const DType dtype = row.dtype[operand];
    return dtype == DType::kFloat32 ? measure_lean<M, Form::kFloat>(span, data, dtype, lane)
                                    : measure_lean<M, Form::kHalf>(span, data, dtype, lane);
  }
}

// How many blocks are to run on a processor.
constexpr int norm_blocks(Measured how) {
  return how == Measured::kLean ? 5 : how == Measured::kFloat ? 4 : 2;
}

// `rows`: how many rows there are to measure in all.
template <class M, Measured kHow>
__global__ void __launch_bounds__(kThreads, norm_blocks(kHow)) norm(const __grid_constant__ Table table, int rows) {
  using T = std::conditional_t<kHow == Measured::kDouble, double, float>;
  __shared__ Places all_places;
  __shared__ std::conditional_t<kHow == Measured::kLean, None, Slots<T, 2>> slots;
  const int lane = lane_here();
  double* const places = all_places[threadIdx.x / kWarp];
  const int64_t number = warp_here();
  if (rows == 0 && number == 0) decide<M>(table, lane, places);
  if (rows == 0 || number >= table.spans) return;
  const int r = find_row(table.words + table.first_span(0), table.rows, number, lane);
  const uint64_t grad = table.words[table.grad(r)];
  const DeviceRow& row = *reinterpret_cast<const DeviceRow*>(table.words + table.row(r));
  if (!grad || row.only_average || row.measured != kHow) return;

  const NormColumns norms(table);
  const int64_t first = static_cast<int64_t>(table.words[table.first_span(r)]);
  const Span span = span_of(row, number - first, row.tile);
  // The gradient, then the parameter where its norm is wanted too: in one rolled loop, for the registers' sake.
  const int operands = row.weighs ? 2 : 1;
#pragma unroll 1
  for (int i = 0; i < operands; ++i) {
    void* const data = i == 0 ? reinterpret_cast<void*>(grad) : row.data[kParam];
    const Binned sum = across_lanes(measure<M, kHow>(span, table, row, i == 0 ? kGrad : kParam, data, lane, slots));
    if (lane == 0) pack<M>(sum, (i == 0 ? norms.partials : norms.weight_partials)[number]);
  }
  const int64_t count = spans_after(table, r, first);
  if (!arrives_last(norms.spans_done + r, count, lane)) return;
  double sums[2] = {};
  auto* const told = tensor_of<BinnedTotal>(table, kRowParts);
#pragma unroll 1
  for (int i = 0; i < operands; ++i) {
    const BinnedTotal total = join_spans<M>((i == 0 ? norms.partials : norms.weight_partials) + first, count, lane);
    if (told && lane == 0) told[i * int64_t{table.rows} + r] = total;
    (i == 0 ? sums[0] : sums[1]) = total.value(M::kKind);
  }
  if (lane == 0) {
    norms.row_sums[r] = sums[0];
    if (row.by_tensor) decide_row(table, row, r, sums[0], sums[1]);
  }
  if (arrives_last(table.words + Table::kRowsDone, rows, lane)) decide<M>(table, lane, places);
}

}  // namespace

NormKernels norm_kernels(Norm kind) {
  return with_measure(kind, []<class M>(M) {
    return NormKernels{norm<M, Measured::kLean>, norm<M, Measured::kFloat>, norm<M, Measured::kDouble>};
  });
}

}  // namespace genopt::cuda
