// Which tensors share memory: what a step writes in parallel would race, and what it reads besides would change under
// it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace genopt {

// The memory of one tensor. sizes and strides (in elements) are only given where its elements leave gaps or meet.
struct Region {
  const char* base;
  int64_t item_size;
  int64_t numel;
  std::vector<int64_t> sizes, strides;
  int64_t owner;  // what to report
};

// Regions in the order of their addresses.
class Regions {
 public:
  Regions() = default;
  explicit Regions(std::vector<Region> regions);

  // The pairs of owners that share a byte, a region that visits one byte twice as a pair with itself.
  // At least one pair for each group of regions in conflict; not necessarily every pair of it.
  std::vector<std::pair<int64_t, int64_t>> find_overlaps() const;

  // Those that share a byte with `other`.
  std::vector<const Region*> find_met(const Region& other) const;

 private:
  struct Span {
    const char *low, *high;
    size_t region;
  };

  std::vector<Region> regions_;
  std::vector<Span> spans_;         // without empty ones, by their lower end
  std::vector<const char*> reach_;  // the highest end so far
};

}  // namespace genopt
