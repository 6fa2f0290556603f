// The step plan as CUDA kernels see it: one buffer of 64-bit words on the device, in columns.
//
//   skip                       not 0: this step is skipped
//   rows done                  counts rows whose norm is known
//   unscale                    1 / loss scale, a double; an unused word follows
//   shared                     numbers that all rows share, as they were before this step
//   scalars  [row]             the rule's Scalars, which the prologue derives; all below comes from the host
//   sources  [option][group]   an option read on the device: its address, dtype in the top byte; 0: none
//   options  [option][group]   a double; the last option first, so that lr stands beside what follows
//   control  [ControlWord]
//   grads    [row]             the gradient's address; 0: the row takes no part
//   tiles    [position]        tiles of all rows before this one, in the order of the next column
//   order    [position]        rows, those that one kernel updates together
//   spans    [row]             spans of all rows before this one
//   rows     [row]             DeviceRow
//   firsts   [group]           the group's first row, and after the last group the number of rows
//   pieces   [row]             of rules with factors: pieces of the matrices of all rows before this one
//   groups   [row]             likewise, groups of 32 rows or columns
//   layouts                    of rows that are not contiguous: dims, sizes[dims], strides[operand][dims]
//   norms                      where gradients are measured, written by kernels alone: see norm_columns.h
//   totals                     where the rule needs totals of a row, likewise
//   factors                    where rows have factors, likewise: see factor.cuh
//
// What changes at every step (options, control, grads) stands together: it travels in one launch's arguments.
#pragma once

#include <cstdint>
#include <cstring>

#include "../plan/plan.h"

namespace genopt::cuda {

// How a row's norm is measured: as one whose operands are stored in a usual way, in float, in double.
enum class Measured : uint8_t { kLean, kFloat, kDouble };
constexpr int kMeasured = 3;

struct DeviceRow {
  void* data[kOperands];  // data[kGrad] is not used: see grads
  float* scales[kMaxStates];
  int64_t numel;
  void* step;  // null: the rule counts none
  void* running[kMaxRunning];
  int64_t origin, run, gap;  // as Row's
  Matrices matrices;         // where it has factors
  int64_t factors_at;        // words from the start of the factors
  int64_t layout;            // words from the start of the layouts
  int32_t group;
  DType dtype[kOperands];
  DType step_dtype;
  DType running_dtype[kMaxRunning];
  uint8_t used;         // as Row::used
  uint8_t factors;      // as Row::factors
  uint8_t strided;      // operands that have strides in the layout, as a mask
  uint8_t piece_bits;   // a lane holds 1 << piece_bits elements side by side
  uint8_t clips_alone;  // its group is left out of the optimizer's norm
  uint8_t by_tensor;    // its group clips by tensor
  uint8_t weighs;       // and by the parameter's norm
  uint8_t totaled;      // the rule needs totals of it
  uint8_t unbiased;     // as Row::unbiased
  Extra extra;
  uint8_t only_average;  // as Row::only_average
  uint8_t kind;          // which kernel updates it: see DevicePlan
  Measured measured;
  uint16_t tile;  // as Row::tile

  GENOPT_INLINE int64_t place_of(int64_t start) const {
    return origin + start + (gap ? start / run * gap : 0);
  }
  GENOPT_INLINE int param() const {
    return extra == Extra::kMaster ? kExtra : kParam;
  }
};

constexpr int kRowWords = sizeof(DeviceRow) / 8;
static_assert(sizeof(DeviceRow) % 8 == 0);
constexpr int kScalarsWords = kScalarsBytes / 8;
static_assert(kScalarsBytes % 16 == 0);

// Stands for a gradient's address in a row that takes part without: it has no elements, or only its average moves.
constexpr uint64_t kEmpty = 2;

// A word with an address, and its dtype in the top byte; 0: none.
constexpr int kDTypeShift = 56;
GENOPT_INLINE uint64_t word_of(const void* address, DType dtype) {
  return address ? reinterpret_cast<uintptr_t>(address) | static_cast<uint64_t>(dtype) << kDTypeShift : 0;
}
GENOPT_INLINE void* address_in(uint64_t word) {
  return reinterpret_cast<void*>(word & ((uint64_t{1} << kDTypeShift) - 1));
}
GENOPT_INLINE DType dtype_in(uint64_t word) {
  return static_cast<DType>(word >> kDTypeShift);
}

// Control and DeviceTensors as words: doubles, flags, addresses with the dtype in the top byte.
enum ControlWord { kMaxNorm, kScale, kNormKind, kGuard, kTensors, kControlWords = kTensors + int{kDeviceTensors} };

// A kernel argument, passed by value.
struct Table {
  uint64_t* words;
  int32_t groups, rows;
  int64_t spans;
  int64_t pieces, factor_groups;                                // of matrices
  int64_t layout_words, norm_spans, total_spans, factor_words;  // that there is room for
  int32_t factored;                                             // rows, of a rule with factors; else 0
  bool measures, totals_rows;                                   // this step
  Gradients gradients;                                          // what is left in them
  bool sums_given;                                              // of rows, by kRowSums: nothing is measured
  bool may_skip;
  bool some_clip_alone;  // groups: they have norms of their own

  // Where the columns stand, in words: place() knows, so that no kernel has to multiply.
  static constexpr int64_t kSkip = 0, kRowsDone = 1, kUnscale = 2, kShared = 4, kHeader = kShared + kMaxShared;
  int64_t sources_at, options_at, control_at, grads_at, tiles_at, order_at, spans_at, rows_at, groups_at, pieces_at,
      layouts_at, norms_at;

  // Once it is known how much there is of each.
  void place() {
    sources_at = scalars(rows);
    options_at = sources_at + int64_t{kMaxOptions} * groups;
    control_at = options_at + int64_t{kAllOptions} * groups;
    grads_at = control_at + kControlWords;
    tiles_at = grads_at + rows;
    order_at = tiles_at + rows;
    spans_at = order_at + rows;
    rows_at = spans_at + rows;
    groups_at = rows_at + int64_t{rows} * kRowWords;
    pieces_at = groups_at + groups + 1;
    layouts_at = pieces_at + 2 * int64_t{factored};
    norms_at = layouts_at + layout_words;
  }

  GENOPT_INLINE int64_t scalars(int row) const {
    return kHeader + int64_t{row} * kScalarsWords;
  }
  // A running number as it was, for a step that is taken back: the last words of the row's scalars.
  GENOPT_INLINE int64_t running_before(int row, int i) const {
    return scalars(row + 1) - 1 - i;
  }
  GENOPT_INLINE int64_t source(int option, int group) const {
    return sources_at + int64_t{option} * groups + group;
  }
  GENOPT_INLINE int64_t option(int option, int group) const {
    return options_at + int64_t{kAllOptions - 1 - option} * groups + group;
  }
  GENOPT_INLINE int64_t control(int word) const {
    return control_at + word;
  }
  GENOPT_INLINE int64_t tensor(int kind) const {  // a DeviceTensorKind
    return control(kTensors) + kind;
  }
  GENOPT_INLINE int64_t grad(int row) const {
    return grads_at + row;
  }
  GENOPT_INLINE int64_t first_tile(int position) const {
    return tiles_at + position;
  }
  GENOPT_INLINE int64_t order(int position) const {
    return order_at + position;
  }
  GENOPT_INLINE int64_t first_span(int row) const {
    return spans_at + row;
  }
  GENOPT_INLINE int64_t row(int row) const {
    return rows_at + int64_t{row} * kRowWords;
  }
  GENOPT_INLINE int64_t first_row(int group) const {
    return groups_at + group;
  }
  GENOPT_INLINE int64_t first_piece(int row) const {
    return pieces_at + row;
  }
  GENOPT_INLINE int64_t first_factor_group(int row) const {
    return pieces_at + factored + row;
  }
  GENOPT_INLINE int64_t layouts() const {
    return layouts_at;
  }
  GENOPT_INLINE int64_t norms() const {
    return norms_at;
  }
  GENOPT_INLINE int64_t totals() const {
    return norms() + (norm_spans ? groups + 3 * rows + 4 * norm_spans : 0);
  }
  GENOPT_INLINE int64_t factors() const {
    return totals() + (total_spans ? (1 + kMaxTotals) * int64_t{rows} + 2 * kMaxTotals * total_spans : 0);
  }
  GENOPT_INLINE int64_t end() const {
    return factors() + factor_words;
  }
};

// Words [at, at + count) of a table, by value: a launch's arguments are copied when it is enqueued, so no
// buffer on the host can be overwritten too early, and a CUDA graph keeps its own copy.
template <int kWords>
struct Payload {
  int64_t at, count;
  uint64_t words[kWords];
};
// A launch takes 32,764 bytes of arguments. Most steps change little: the small one is cheaper to enqueue.
constexpr int kSmallPayload = 480, kLargePayload = 4064;
static_assert(sizeof(Table) + sizeof(Payload<kLargePayload>) + 8 <= 32764);

}  // namespace genopt::cuda
