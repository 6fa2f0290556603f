// Sums over the rows of a table: one warp, one span of 32 tiles; then whoever is last adds up, so one launch does it
// all. The order of additions is that of cpu/measure.h and LaneSums (plan/lane_sums.h); csrc/README.md spells it out.
#pragma once

#include <cuda/atomic>

#include "tile.cuh"

namespace genopt::cuda {

// What a block's warps add up in.
using Places = double[kWarps][kTile];

// The first `count` places by halves, into the first. All lanes call it.
template <class M>
__device__ double by_halves(double* places, int count, int lane) {
#pragma unroll 1
  for (int half = count / 2; half >= 1; half /= 2) {
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < half; i += kWarp) places[i] = M::join(places[i], places[i + half]);
  }
  __syncwarp();
  const double result = places[0];
  __syncwarp();
  return result;
}

// A span of an operand, or what there is of one.
struct Span {
  int64_t begin, end;  // elements
};
__device__ inline Span span_of(const DeviceRow& row, int64_t number) {
  const int64_t begin = number * kSpan * kTile, end = begin + kSpan * kTile;
  return {begin, row.numel < end ? row.numel : end};
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
  return by_halves<M>(places, kWarp, lane);
}

// Whether this warp is the last of `count` to arrive at a counter. What lane 0 wrote before is then seen by the last.
__device__ inline bool arrives_last(uint64_t* counter, int64_t count, int lane) {
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
