// The step plan as CUDA kernels see it: one buffer of 64-bit words on the device, in columns.
//
//   updates  [row]             the rule's Update, which the prologue derives; all below comes from the host
//   sources  [option][group]   an option read on the device: its address, dtype in the top byte; 0: none
//   options  [option][group]   a double; the last option first, so that lr stands beside the gradients
//   grads    [row]             the gradient's address, with kFresh; 0: no gradient, the row rests
//   tiles    [row]             tiles of all rows before this one
//   rows     [row]             DeviceRow
//   layouts                    of rows that do not lie dense: dims, sizes[dims], strides[operand][dims]
//
// What changes at every step (options, grads) stands together: it travels in one launch's arguments.
#pragma once

#include <cstdint>

#include "../plan.h"

namespace genopt::cuda {

struct DeviceRow {
  void* data[kOperands];  // data[kGrad] is not used: see grads
  int64_t numel;
  void* step;      // null: the rule counts none
  int64_t layout;  // words from the start of the layouts
  int32_t group;
  DType dtype[kOperands];
  DType step_dtype;
  uint8_t used;     // states in use, as a mask
  uint8_t strided;  // operands that have strides in the layout, as a mask
  uint8_t piece;    // elements that a lane holds side by side
  uint8_t unused[3];
};

constexpr int kRowWords = sizeof(DeviceRow) / 8;
static_assert(sizeof(DeviceRow) == 10 * 8);
constexpr int kUpdateWords = kUpdateBytes / 8;
static_assert(kUpdateBytes % 16 == 0);

// Bits of a word in `grads`, beside an address that is a multiple of 2.
constexpr uint64_t kFresh = 1;  // the row's states were made for this very step
constexpr uint64_t kEmpty = 2;  // stands for the address where there are no elements
constexpr int kDTypeShift = 56;

// A kernel argument, passed by value.
struct Table {
  uint64_t* words;
  int32_t groups, rows;
  int64_t tiles;

  // Where the columns stand, in words.
  GENOPT_INLINE int64_t update(int row) const {
    return int64_t{row} * kUpdateWords;
  }
  GENOPT_INLINE int64_t source(int option, int group) const {
    return update(rows) + int64_t{option} * groups + group;
  }
  GENOPT_INLINE int64_t option(int option, int group) const {
    return source(2 * kMaxOptions - 1 - option, group);
  }
  GENOPT_INLINE int64_t grad(int row) const {
    return source(2 * kMaxOptions, row);
  }
  GENOPT_INLINE int64_t first_tile(int row) const {
    return grad(rows) + row;
  }
  GENOPT_INLINE int64_t row(int row) const {
    return first_tile(rows) + int64_t{row} * kRowWords;
  }
  GENOPT_INLINE int64_t layouts() const {
    return row(rows);
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
