// How a tensor is divided: tiles are stepped, spans are measured.
#pragma once

#include <cstdint>

namespace genopt {

// The unit of work everywhere: as many elements as a CPU loop holds in stack arrays and a CUDA warp in registers. Those
// of a tile share one int8 scale.
constexpr int kTile = 256;

// Tiles that make one partial sum of a norm or of a total.
constexpr int kSpan = 32;

// In tiles of `tile` elements, at most kTile.
constexpr int64_t tiles_of(int64_t numel, int tile = kTile) {
  return numel ? (numel + tile - 1) / tile : 0;
}
constexpr int64_t spans_of(int64_t numel, int tile = kTile) {
  return (tiles_of(numel, tile) + kSpan - 1) / kSpan;
}

// Elements that share a scale in a tensor whose slices along its first dimension have `length` each: a part of a slice,
// so that no cut along that dimension divides it, and as many whole vectors as there are in one of 64 to 256 elements.
// 0: no such part makes a slice; they follow one another without regard to slices, kTile each.
constexpr int kSmallestBlock = 64, kBlockStep = 16;
constexpr int block_in(int64_t length) {
  for (int block = kTile; block >= kSmallestBlock; block -= kBlockStep)
    if (length > 0 && length % block == 0) return block;
  return 0;
}

}  // namespace genopt
