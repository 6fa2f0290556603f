// Memory that is asked for before it is needed.
#pragma once

#include "../plan/row.h"
#include "tuning.h"

namespace genopt::GENOPT_CAPABILITY {

// While a tile is stepped, a later one of the row is prefetched, a line or less with each vector, where the processor
// gains by it (Tuning::prefetch): a core has room for some ten lines under way, and prefetchers of some stop at the end
// of a page.
class Prefetcher {
 public:
  // For the tile at `start` of those that end at `stop`.
  GENOPT_INLINE void begin(int64_t start, int64_t stop) {
    const int wanted = cpu::tuning.prefetch * kTile;
    distance_ = stop - start > wanted ? wanted : 0;  // else what is there anyway
  }
  // For the element i of the tile. Narrow operands come slowly enough to be left to the processor.
  template <class Stored>
  GENOPT_INLINE void prefetch(const Stored* tile, int64_t i) const {
    if constexpr (sizeof(Stored) == 4) __builtin_prefetch(tile + distance_ + i);
  }

 private:
  int distance_ = 0;
};

// Calls visit(std::bool_constant): whether whole tiles are prefetched on this processor.
template <class Visit>
GENOPT_INLINE void with_prefetch(Visit visit) {
  cpu::tuning.prefetch ? visit(std::true_type{}) : visit(std::false_type{});
}

// Prefetches an operand from element `start` on. Loading, computing and storing a tile take turns;
// with the next tile under way the memory is not idle while the rule computes.
inline void prefetch(const Row& row, int operand, int64_t start, int count) {
  if (!row.data[operand] || row.is_factor(operand) || (row.layout && !row.layout->strides[operand].empty())) return;
  const int size = size_of(row.dtype[operand]);
  const char* const from = static_cast<const char*>(row.data[operand]) + start * size;
  for (int byte = 0; byte < count * size; byte += 64) __builtin_prefetch(from + byte);
}

}  // namespace genopt::GENOPT_CAPABILITY
