// Which tensors that a step writes share memory: written in parallel, they would race.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace genopt {

// The memory of one tensor. sizes and strides (in elements) are only given where it is not dense.
struct Region {
  const char* base;
  int64_t item_size;
  int64_t numel;
  std::vector<int64_t> sizes, strides;
  int64_t owner;  // what to report
};

// The pairs of owners that share a byte, a region that visits one byte twice as a pair with itself.
// At least one pair for each group of regions in conflict; not necessarily every pair of it.
std::vector<std::pair<int64_t, int64_t>> find_overlaps(std::vector<Region> regions);

}  // namespace genopt
