// A row of the plan: one tensor, what belongs to it, and what the step does with it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "../codecs/int8_block.h"
#include "layout.h"
#include "matrices.h"
#include "tiles.h"

namespace genopt {

// Bits of a set of operands in use, beside the rule's own states: see is_used.
constexpr unsigned kWithAverage = 1u << (kAverage - kState);
constexpr unsigned kWithExtra = 1u << (kExtra - kState);

// How a parameter of 16 bits is kept more precisely. kCompensation (Kahan): the parameter is the rounded sum of itself
// and an operand of its own dtype, the rest. kMaster: the operand is the parameter in float, which is rounded from it.
enum class Extra : uint8_t { kNone, kCompensation, kMaster };

GENOPT_INLINE constexpr bool is_used(unsigned used, int operand) {
  return operand < kState || (used >> (operand - kState) & 1);
}

// A running number, of float or double; null: there is none.
GENOPT_INLINE double read_running(const void* at, DType dtype) {
  if (!at) return 0;
  return dtype == DType::kFloat64 ? *static_cast<const double*>(at) : *static_cast<const float*>(at);
}
GENOPT_INLINE void write_running(void* at, DType dtype, double number) {
  if (!at) return;
  if (dtype == DType::kFloat64) {
    *static_cast<double*>(at) = number;
  } else {
    *static_cast<float*>(at) = static_cast<float>(number);
  }
}

constexpr int kHost = -1;  // the device number of the CPU

struct Row {
  int device = kHost;
  int64_t numel = 0;
  int64_t first_tile = 0;  // tiles of all rows before this one
  int64_t first_span = 0;  // spans of all rows before this one
  std::array<void*, kOperands> data{};
  std::array<DType, kOperands> dtype{};
  std::array<float*, kMaxStates> scales{};  // of states that are stored in codes, one for each tile
  int tile = kTile;                         // elements of a tile: fewer where codes have smaller blocks, or runs end
  const Layout* layout = nullptr;           // null: every operand is contiguous, in one order
  void* step = nullptr;                     // the step counter, where the row has one
  DType step_dtype = DType::kFloat32;
  std::array<void*, kMaxRunning> running{};  // the rule's, float or double as running_dtype says
  std::array<DType, kMaxRunning> running_dtype{};
  bool active = false;        // takes part in this step
  bool only_average = false;  // without gradient: only the weights' average moves
  unsigned used = 0;          // states in use, kWithAverage and kWithExtra, as a mask
  unsigned unbiased = 0;      // operands of 16 bits that are not rounded to the nearest, as a mask; codes never are
  bool is_part = false;       // of a tensor that is spread over processes
  // Of a part: the place of its first element in the whole, how many elements, in whole tiles, follow one another
  // there, and how many others lie between two such runs; no others: all follow one another.
  int64_t origin = 0, run = 0, gap = 0;
  Extra extra = Extra::kNone;
  int factors = 0;                 // the first of its two operands that are factors (rules/rule.h); 0: it has none
  Matrices matrices{};             // that these are of: contiguous as all the row is, in what the rule computes in
  const void* divisors = nullptr;  // of each matrix, likewise; this step's
  int group = 0;
  int prepared = 0;              // index into Plan::prepared
  double norm = 0, weights = 0;  // of gradient and parameter, where measured
  std::array<double, kMaxTotals> totals{};
  double factor = 1;  // of the gradient

  bool is_factor(int operand) const {
    return factors != 0 && (operand == factors || operand == factors + 1);
  }
  // The first element of a tile, or the end.
  int64_t start_of(int64_t number) const {
    return std::min(number * tile, numel);
  }
  // The place in the whole of a tile's first element, of which this is the place in the row.
  int64_t place_of(int64_t start) const {
    return origin + start + (gap ? start / run * gap : 0);
  }
  // Tiles to step on the device `on_device`.
  int64_t tiles(int on_device) const {
    return active && device == on_device ? tiles_of(numel, tile) : 0;
  }
  // Spans to measure there.
  int64_t spans(int on_device) const {
    return active && device == on_device && !only_average ? spans_of(numel, tile) : 0;
  }
  // The operand that holds the parameter as the rule sees it.
  int param() const {
    return extra == Extra::kMaster ? kExtra : kParam;
  }
};

}  // namespace genopt
