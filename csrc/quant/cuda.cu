// Quantization on CUDA: one warp, one tile (coded_tile.cuh), with the arithmetic of code.h. Blocks are read once: a
// block of up to 256 lies in registers between its maximum and its codes, a larger one is read again from the cache.
// Tensors and channels take a pass for their ranges, joined by integer maxima, which no order changes, and one for
// their codes.
#include "../cuda/launch.h"
#include "coded_tile.cuh"
#include "cuda.h"

namespace genopt::quant::cuda {
namespace {

using genopt::cuda::kThreads;
using genopt::cuda::lane_here;
using genopt::cuda::launch;
using genopt::cuda::thread_here;
using genopt::cuda::warp_here;

using Range = unsigned long long;  // a key, as atomicMax takes it

// What a kernel is told.
struct Work {
  Quantization q;
  int shift;  // of a run that is a power of two where no unit has two runs; else -1
  Range* ranges;

  __device__ int64_t unit_of(int64_t i) const {
    if (shift >= 0) return i >> shift;
    if (q.numel >> 32) return i / q.run % q.units;
    return static_cast<uint32_t>(i) / static_cast<uint32_t>(q.run) % static_cast<uint32_t>(q.units);
  }

  // Whether all of a tile is in one unit, as far as can be told at once.
  __device__ bool shares_unit(int64_t start, int count) const {
    if (q.run < kTile) return false;
    const int64_t last = start + count - 1;
    return shift >= 0 ? start >> shift == last >> shift : start / q.run == last / q.run;
  }
};

__device__ inline int32_t exchange(int32_t key, int lanes) {
  return static_cast<int32_t>(__shfl_xor_sync(~0u, static_cast<unsigned>(key), lanes));
}
__device__ inline int64_t exchange(int64_t key, int lanes) {
  return static_cast<int64_t>(__shfl_xor_sync(~0u, static_cast<unsigned long long>(key), lanes));
}

// Joined over groups of so many lanes, a power of two; all of them have the result.
template <bool kSymmetric, class T>
__device__ Reach<T> join_lanes(Reach<T> reach, int lanes) {
#pragma unroll 1
  for (int other = 1; other < lanes; other *= 2) {
    Reach<T> theirs;
    theirs.high = exchange(reach.high, other);
    if constexpr (!kSymmetric) theirs.low = exchange(reach.low, other);
    reach.join(theirs);
  }
  return reach;
}

// Scale and zero point of a unit, written by one lane, as an encoder.
template <class T>
__device__ Encoder<T> resolve(const Quantization& q, const Reach<T>& reach, int64_t unit, bool writes) {
  const CodeRange range = q.code_range();
  const float scale = scale_of(reach, range);
  const int zero_point = zero_point_of(reach, scale, range);
  if (writes && unit < q.units) {
    q.scale[unit] = scale;
    if (q.zero_point) q.zero_point[unit] = static_cast<int8_t>(zero_point);
  }
  return Encoder<T>(scale, zero_point, range);
}

// Blocks of up to 256 elements.
template <class Codec, bool kSymmetric>
__global__ void __launch_bounds__(kThreads) quantize_small_blocks(const __grid_constant__ Work work) {
  using T = Compute<Codec>;
  using TileHere = CodedTile<Codec>;
  const Quantization& q = work.q;
  const int64_t start = warp_here() * kTile;
  if (start >= q.numel) return;
  const TileHere tile(q, start, lane_here());
  T x[kElements];
  tile.load_numbers(x);
  Reach<T> reach[TileHere::kRows];
#pragma unroll
  for (int j = 0; j < kElements; ++j) reach[j / TileHere::kPiece].template add<kSymmetric>(x[j]);
  // A block is a part of a row of pieces, or several rows.
  const int block = static_cast<int>(q.run);
  const int lanes = block < TileHere::kRow ? block / TileHere::kPiece : kWarp;
  const int rows = block < TileHere::kRow ? 1 : block / TileHere::kRow;
  if constexpr (TileHere::kRows >= 2) {
#pragma unroll
    for (int r = 0; r < TileHere::kRows; r += 2)
      if (rows >= 2) reach[r].join(reach[r + 1]);
  }
  if constexpr (TileHere::kRows >= 4) {
    if (rows >= 4) reach[0].join(reach[2]);
  }
  const uint32_t key = tile.key();
  int8_t codes[kElements];
  Encoder<T> encoder(T(0), T(0), T(0), 0);
#pragma unroll
  for (int r = 0; r < TileHere::kRows; ++r) {
    if ((r & (rows - 1)) == 0)
      encoder = resolve(q, join_lanes<kSymmetric>(reach[r], lanes),
                        work.unit_of(start + r * TileHere::kRow + tile.lane * TileHere::kPiece),
                        (tile.lane & (lanes - 1)) == 0);
    tile.encode_row(encoder, x, r, key, codes);
  }
  if (q.codes) tile.store_codes(codes);
}

// Larger ones.
template <class Codec, bool kSymmetric>
__global__ void __launch_bounds__(kThreads) quantize_large_blocks(const __grid_constant__ Work work) {
  using T = Compute<Codec>;
  using TileHere = CodedTile<Codec>;
  const Quantization& q = work.q;
  const int64_t unit = warp_here();
  if (unit >= q.units) return;
  const int64_t begin = unit * q.run, end = begin + q.run < q.numel ? begin + q.run : q.numel;
  T x[kElements];
  Reach<T> reach;
#pragma unroll 2
  for (int64_t start = begin; start < end; start += kTile) {
    TileHere(q, start, lane_here()).load_numbers(x);
#pragma unroll
    for (int j = 0; j < kElements; ++j) reach.template add<kSymmetric>(x[j]);
  }
  const Encoder<T> encoder = resolve(q, join_lanes<kSymmetric>(reach, kWarp), unit, lane_here() == 0);
  if (!q.codes) return;
#pragma unroll 1
  for (int64_t start = begin; start < end; start += kTile) {
    const TileHere tile(q, start, lane_here());
    tile.load_numbers(x);
    int8_t codes[kElements];
    const uint32_t key = tile.key();
    tile.encode(encoder, x, key, codes);
    tile.store_codes(codes);
  }
}

template <bool kSymmetric, class T>
__device__ void join_range(const Work& work, int64_t unit, const Reach<T>& reach) {
  if (reach.high > 0) atomicMax(work.ranges + unit, static_cast<Range>(reach.high));
  if constexpr (!kSymmetric)
    if (reach.low > 0) atomicMax(work.ranges + work.q.units + unit, static_cast<Range>(reach.low));
}

// Runs of 32 and more: a warp takes so many elements, and the parts of runs among them in turn.
constexpr int kSpanElements = 4096, kLongRun = 32;

template <class Codec, bool kSymmetric>
__global__ void __launch_bounds__(kThreads) measure_runs(const __grid_constant__ Work work) {
  using T = Compute<Codec>;
  const Quantization& q = work.q;
  const auto* const x = static_cast<const typename Codec::Stored*>(q.numbers);
  int64_t at = warp_here() * kSpanElements;
  const int64_t stop = at + kSpanElements < q.numel ? at + kSpanElements : q.numel;
#pragma unroll 1
  while (at < stop) {
    const int64_t run = at / q.run, next = (run + 1) * q.run;
    const int64_t end = next < stop ? next : stop;
    Reach<T> reach;
#pragma unroll 8
    for (int64_t i = at + lane_here(); i < end; i += kWarp)
      reach.template add<kSymmetric>(Codec::template decode<T>(x[i]));
    reach = join_lanes<kSymmetric>(reach, kWarp);
    if (lane_here() == 0) join_range<kSymmetric>(work, run % q.units, reach);
    at = end;
  }
}

// Shorter runs: a thread takes one element of so many rows; a row is all units' runs.
constexpr int kColumnRows = 64;

template <class Codec, bool kSymmetric>
__global__ void __launch_bounds__(kThreads) measure_columns(const __grid_constant__ Work work) {
  using T = Compute<Codec>;
  const Quantization& q = work.q;
  const int64_t thread = thread_here();
  const int64_t columns = q.units * q.run, column = thread % columns;
  const int64_t first = thread / columns * kColumnRows * columns + column;
  if (first >= q.numel) return;
  const int64_t wanted = first + kColumnRows * columns, end = wanted < q.numel ? wanted : q.numel;
  const auto* const x = static_cast<const typename Codec::Stored*>(q.numbers);
  Reach<T> reach;
#pragma unroll 4
  for (int64_t i = first; i < end; i += columns) reach.template add<kSymmetric>(Codec::template decode<T>(x[i]));
  join_range<kSymmetric>(work, column / q.run, reach);
}

template <class T>
__global__ void __launch_bounds__(kThreads) resolve_ranges(const __grid_constant__ Work work) {
  const int64_t unit = thread_here();
  if (unit >= work.q.units) return;
  Reach<T> reach;
  reach.high = static_cast<Key<T>>(work.ranges[unit]);
  reach.low = static_cast<Key<T>>(work.ranges[work.q.units + unit]);
  resolve(work.q, reach, unit, true);
}

template <class Codec>
__global__ void __launch_bounds__(kThreads) encode_tiles(const __grid_constant__ Work work) {
  using T = Compute<Codec>;
  using TileHere = CodedTile<Codec>;
  const Quantization& q = work.q;
  const int64_t start = warp_here() * kTile;
  if (start >= q.numel) return;
  const TileHere tile(q, start, lane_here());
  const auto encoder_of = [&](int64_t unit) {
    return Encoder<T>(q.scale[unit], q.zero_point_at(unit), q.code_range());
  };
  T x[kElements];
  int8_t codes[kElements];
  tile.load_numbers(x);
  const uint32_t key = tile.key();
  if (work.shares_unit(start, tile.count)) {
    const Encoder<T> encoder = encoder_of(work.unit_of(start));
    tile.encode(encoder, x, key, codes);
  } else {
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const int i = tile.element(j);
      if (i >= tile.count) {
        codes[j] = 0;
        continue;
      }
      const Encoder<T> encoder = encoder_of(work.unit_of(start + i));
      codes[j] = q.stochastic ? encoder.template operator()<true>(
                                    x[j], random_number(key, static_cast<uint32_t>(start) + static_cast<uint32_t>(i)))
                              : encoder.template operator()<false>(x[j], 0.0f);
    }
  }
  tile.store_codes(codes);
}

template <class Codec>
__global__ void __launch_bounds__(kThreads) decode_tiles(const __grid_constant__ Work work) {
  using T = Compute<Codec>;
  const Quantization& q = work.q;
  const int64_t start = warp_here() * kTile;
  if (start >= q.numel) return;
  const CodedTile<Codec> tile(q, start, lane_here());
  const T largest = largest_of<T>(q.dtype);
  int8_t codes[kElements];
  T x[kElements];
  if (work.shares_unit(start, tile.count)) {
    const int64_t unit = work.unit_of(start);
    const float scale = q.scale[unit];
    const int zero_point = q.zero_point_at(unit);
    tile.load_codes(codes);
    if (static_cast<T>(scale) * T(256) <= largest) {  // no number is beyond it
#pragma unroll
      for (int j = 0; j < kElements; ++j) x[j] = static_cast<T>(codes[j] - zero_point) * static_cast<T>(scale);
    } else {
#pragma unroll
      for (int j = 0; j < kElements; ++j) x[j] = number_behind<T>(codes[j], zero_point, scale, largest);
    }
  } else {
    tile.load_codes(codes);
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      if (tile.element(j) >= tile.count) continue;
      const int64_t unit = work.unit_of(start + tile.element(j));
      x[j] = number_behind<T>(codes[j], q.zero_point_at(unit), q.scale[unit], largest);
    }
  }
  tile.store_numbers(x);
}

Work work_for(const Quantization& q, void* ranges = nullptr) {
  int shift = 0;
  while (shift < 62 && int64_t{1} << shift < q.run) ++shift;
  const bool is_shift = int64_t{1} << shift == q.run && q.run * q.units >= q.numel;
  return {q, is_shift ? shift : -1, static_cast<Range*>(ranges)};
}

int64_t warps(int64_t elements, int64_t each) {
  return (elements + each - 1) / each * kWarp;
}

// Calls visit(codec, symmetric), the second as std::bool_constant.
template <class Visit>
void with_types(const Quantization& q, Visit visit) {
  with_codec(q.dtype,
             [&](auto codec) { q.zero_point ? visit(codec, std::false_type{}) : visit(codec, std::true_type{}); });
}

}  // namespace

void quantize_blocks(const Quantization& q, const Queue& queue) {
  with_types(q, [&](auto codec, auto symmetric) {
    using Codec = decltype(codec);
    if (q.run <= kTile)
      launch(quantize_small_blocks<Codec, symmetric()>, warps(q.numel, kTile), queue, work_for(q));
    else
      launch(quantize_large_blocks<Codec, symmetric()>, q.units * kWarp, queue, work_for(q));
  });
}

void find_scales(const Quantization& q, void* ranges, const Queue& queue) {
  const Work work = work_for(q, ranges);
  if (q.numel) {
    with_types(q, [&](auto codec, auto symmetric) {
      using Codec = decltype(codec);
      if (q.run >= kLongRun) {
        launch(measure_runs<Codec, symmetric()>, warps(q.numel, kSpanElements), queue, work);
      } else {
        const int64_t columns = q.units * q.run, rows = q.numel / columns;
        launch(measure_columns<Codec, symmetric()>, (rows + kColumnRows - 1) / kColumnRows * columns, queue, work);
      }
    });
  }
  launch(q.dtype == DType::kFloat64 ? resolve_ranges<double> : resolve_ranges<float>, q.units, queue, work);
}

void encode(const Quantization& q, const Queue& queue) {
  with_codec(q.dtype,
             [&](auto codec) { launch(encode_tiles<decltype(codec)>, warps(q.numel, kTile), queue, work_for(q)); });
}

void decode(const Quantization& q, const Queue& queue) {
  with_codec(q.dtype,
             [&](auto codec) { launch(decode_tiles<decltype(codec)>, warps(q.numel, kTile), queue, work_for(q)); });
}

}  // namespace genopt::quant::cuda
