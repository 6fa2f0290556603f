// How a tensor is divided: tiles are stepped, spans are measured.
#pragma once

#include <cstdint>

namespace genopt {

// The unit of work everywhere: elements that a CPU loop holds in stack arrays, that a CUDA warp holds
// in registers, and that share one int8 scale.
constexpr int kTile = 256;

// Tiles that make one partial sum of a norm or of a total.
constexpr int kSpan = 32;

constexpr int64_t tiles_of(int64_t numel) {
  return (numel + kTile - 1) / kTile;
}
constexpr int64_t spans_of(int64_t numel) {
  return (tiles_of(numel) + kSpan - 1) / kSpan;
}

}  // namespace genopt
