// A tile of 256 elements as a warp has it on CUDA, 8 of them in each lane; how a warp finds its tile, and the scalars
// of its row.
//
// A lane holds pieces of 2, 4 or 8 elements that lie side by side, as many as make 16 bytes of the row's widest
// operand, and the warp's pieces lie side by side too: so every access of a warp is one contiguous range.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"
#include "norm_columns.h"

namespace genopt::cuda {

constexpr int kWarps = kThreads / kWarp;  // of a block
constexpr int kElements = kTile / kWarp;  // of a lane

// Whether this is compiled for processors for which the compiler finds fewer registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr bool kIsTight = true;
#else
constexpr bool kIsTight = false;
#endif

// Which thread and warp of the launch runs here, and which lane of its warp.
__device__ inline int64_t thread_here() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}
__device__ inline int64_t warp_here() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
}
__device__ inline int lane_here() {
  return threadIdx.x % kWarp;
}

// How many elements a tile has that starts so many before the end.
__device__ inline int count_of(int64_t rest, int tile = kTile) {
  return rest < tile ? static_cast<int>(rest) : tile;
}

// Spans of a row of which this is the first.
__device__ inline int64_t spans_after(const Table& table, int row, int64_t first) {
  const bool is_last = row + 1 == table.rows;
  return (is_last ? table.spans : static_cast<int64_t>(table.words[table.first_span(row + 1)])) - first;
}

// The row of a tile or span: the last one that starts at or before it in its column. The warp looks at 32 candidates
// at a time.
__device__ inline int find_row(const uint64_t* first, int rows, int64_t tile, int lane) {
  int low = 0;
  for (int count = rows; count > 1;) {
    const int stride = (count + kWarp - 1) / kWarp;
    const int at = lane * stride;
    const bool starts = at < count && static_cast<int64_t>(first[low + at]) <= tile;
    const int last = __popc(__ballot_sync(~0u, starts)) - 1;  // starts holds for the lanes up to one
    low += last * stride;
    count = count - last * stride < stride ? count - last * stride : stride;
  }
  return low;
}

// The tile of this warp of a launch for `range`.
struct TileHere {
  int row;
  int number;  // in it
};
__device__ inline TileHere find_tile(const Table& table, const TileRange& range) {
  const int64_t tile = range.first_tile + warp_here();
  const int position =
      range.first + find_row(table.words + table.first_tile(range.first), range.rows, tile, lane_here());
  const int64_t first = static_cast<int64_t>(table.words[table.first_tile(position)]);
  return {static_cast<int>(table.words[table.order(position)]), static_cast<int>(tile - first)};
}

// The same, without a search where every row has one tile.
__device__ inline TileHere find_lean_tile(const Table& table, const TileRange& range) {
  if (range.one_each) return {static_cast<int>(table.words[table.order(range.first) + warp_here()]), 0};
  return find_tile(table, range);
}

// Which element of the tile is a lane's j-th, in pieces of 1 << bits.
__device__ inline int element_of(int j, int lane, int bits) {
  return (j >> bits) << (bits + 5) | lane << bits | (j & ((1 << bits) - 1));
}

// A tile as one lane sees it.
struct Tile {
  int64_t start;
  int count, lane;
  int number = 0;  // in its row, where there are codes

  // Which element of the tile is a lane's j-th, in pieces of kPiece.
  template <int kPiece>
  __device__ int element(int j) const {
    return element_of(j, lane, kPiece == 8 ? 3 : 2);
  }
};

// What the prologue derived, with the factor that clips the row's gradient.
template <class Scalars>
__device__ Scalars scalars_of(const Table& table, const DeviceRow& row, int r) {
  Scalars scalars = *reinterpret_cast<const Scalars*>(table.words + table.scalars(r));
  if (table.measures) {
    const NormColumns norms(table);
    const double factor = row.by_tensor ? norms.row_factors[r] : norms.group_factors[row.group];
    scalars.around.factor *= static_cast<decltype(scalars.around.factor)>(factor);
  }
  return scalars;
}

}  // namespace genopt::cuda
