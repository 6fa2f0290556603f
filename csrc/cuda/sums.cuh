// Sums over the rows of a table: one warp, one span of 32 tiles; then whoever is last adds up, so one launch does it
// all. Of elements no order counts (plan/binned.h); numbers of rows are added up as LaneSums does (plan/lane_sums.h).
#pragma once

#include <cuda/atomic>

#include "../plan/binned.h"
#include "tile.cuh"

namespace genopt::cuda {

// What a block's warps join numbers in, one of each lane.
using Places = double[kWarps][kWarp];

// A warp's numbers by halves, into the first. All lanes call it.
template <class M>
__device__ double by_halves(double* places, int lane) {
#pragma unroll 1
  for (int half = kWarp / 2; half >= 1; half /= 2) {
    __syncwarp();
    if (lane < half) places[lane] = M::join(places[lane], places[lane + half]);
  }
  __syncwarp();
  const double result = places[0];
  __syncwarp();
  return result;
}

// A span of an operand, or what there is of one.
struct Span {
  int64_t begin, end;  // elements
  int first_tile;
};
__device__ inline Span span_of(const DeviceRow& row, int64_t number, int tile) {
  const int first_tile = static_cast<int>(number) * kSpan;
  const int64_t begin = int64_t{first_tile} * tile, end = begin + kSpan * tile;
  return {begin, row.numel < end ? row.numel : end, first_tile};
}

// Numbers [0, count) as LaneSums adds them up; number(i) is asked for by the lane that adds it.
template <class M, class Number>
__device__ double join(int64_t count, int lane, double* places, Number number) {
  constexpr int kAtOnce = 16;  // loads under way: what one alone waits for is most of the time
  double sum = 0;
#pragma unroll 1
  for (int64_t i = lane; i < count; i += kAtOnce * kWarp) {
    double numbers[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) numbers[k] = i + k * kWarp < count ? number(i + k * kWarp) : 0;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) sum = M::join(sum, numbers[k]);
  }
  places[lane] = sum;
  return by_halves<M>(places, lane);
}

// A lane's elements of a tile, of which there are none but zeros beyond its end.
template <class M, class T>
__device__ void add_up(const T (&values)[kElements], BinnedSum<M>& sum) {
  Bits<T> largest = 0;
#pragma unroll
  for (int j = 0; j < kElements; ++j) largest = larger(largest, bits_of(values[j]) << 1 >> 1);
  T x;
  memcpy(&x, &largest, sizeof x);
  sum.make_room(x);
#pragma unroll
  for (int j = 0; j < kElements; ++j) sum.add(values[j]);
}

// Lane by lane, one of two that differ in a bit of their number with the other. All lanes have the result.
template <class Sum>
__device__ Sum across_lanes(Sum sum) {
  constexpr int kWords = sizeof(Sum) / sizeof(int64_t);
#pragma unroll 1
  for (int lanes = kWarp / 2; lanes >= 1; lanes /= 2) {
    unsigned long long words[kWords];
    memcpy(words, &sum, sizeof sum);
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(~0u, words[i], lanes);
    Sum other;
    memcpy(&other, words, sizeof other);
    sum = joined(sum, other);
  }
  return sum;
}

template <class M>
__device__ inline void pack(const Binned& sum, PackedSum& packed) {
  const bool is_max = M::kIsMax;
  packed.words[0] = as_double(static_cast<uint64_t>(is_max ? sum.bin : sum.coarse << 3 | (sum.bin & 7)));
  packed.words[1] = as_double(static_cast<uint64_t>(is_max ? 0 : sum.fine << 3 | sum.bin >> 3));
}
template <class M>
__device__ BinnedTotal unpacked(const PackedSum& packed) {
  const int64_t x = static_cast<int64_t>(bits_of(packed.words[0])), y = static_cast<int64_t>(bits_of(packed.words[1]));
  return widened(M::kIsMax ? Binned{x, 0, 0} : Binned{(x & 7) | (y & 7) << 3, x >> 3, y >> 3});
}

// Of a row's spans, by one warp.
template <class M>
__device__ BinnedTotal join_spans(const PackedSum* spans, int64_t count, int lane) {
  constexpr int kAtOnce = 8;  // loads under way: what one alone waits for is most of the time
  BinnedTotal total{};
#pragma unroll 1
  for (int64_t i = lane; i < count; i += kAtOnce * kWarp) {
    PackedSum some[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
#pragma unroll
      for (int w = 0; w < 2; ++w) some[k].words[w] = i + k * kWarp < count ? __ldcg(spans[i + k * kWarp].words + w) : 0;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) total = joined(total, unpacked<M>(some[k]));
  }
  return across_lanes(total);
}

// Whether this warp is the last of `count` to arrive at a counter. What lane 0 wrote before is then seen by the last,
// which may write what any lane has read.
__device__ inline bool arrives_last(uint64_t* counter, int64_t count, int lane) {
  __syncwarp();
  bool last = false;
  if (lane == 0) {
    const ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device> arrived(*reinterpret_cast<unsigned*>(counter));
    last = arrived.fetch_add(1, ::cuda::memory_order_release) + 1 == static_cast<unsigned>(count);
    if (last) ::cuda::atomic_thread_fence(::cuda::memory_order_acquire, ::cuda::thread_scope_device);
  }
  const bool is_last = __ballot_sync(~0u, last) != 0;
  __syncwarp();  // a vote orders no memory
  return is_last;
}

}  // namespace genopt::cuda
