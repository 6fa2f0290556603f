// What a step leaves in the gradients' memory.
#pragma once

#include <algorithm>
#include <cstring>

#include "../plan/plan.h"
#include "operand.h"

namespace genopt::GENOPT_CAPABILITY {

// Sets tiles of the gradient to zero.
inline void zero_gradient(const Row& row, int64_t begin, int64_t end) {
  const int64_t start = row.start_of(begin), stop = row.start_of(end);
  const int size = size_of(row.dtype[kGrad]);
  char* const base = static_cast<char*>(row.data[kGrad]);
  if (!row.layout || row.layout->strides[kGrad].empty()) {
    std::memset(base + start * size, 0, (stop - start) * size);
    return;
  }
  int64_t offsets[kTile];
  for (int64_t at = start; at < stop; at += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, stop - at));
    locate(row.layout->sizes, row.layout->strides[kGrad], at, count, offsets);
    for (int i = 0; i < count; ++i) std::memset(base + offsets[i] * size, 0, size);
  }
}

template <class T>
__attribute__((noinline)) void multiply(T factor, int count, T* x) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) x[i] = factor * x[i];
}

// Takes the loss scale off tiles of the gradient.
template <class T>
void unscale_gradient(const Row& row, T factor, int64_t begin, int64_t end) {
  constexpr struct {
    uint32_t random = 0, phase = 0;
  } kToNearest;
  TileOperand<T> grad;
  const int64_t stop = row.start_of(end);
  for (int64_t start = row.start_of(begin); start < stop; start += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, stop - start));
    const int padded = (count + kLanes - 1) & -kLanes;
    multiply(factor, padded, grad.load(row, kGrad, start, count, padded));
    grad.store(kToNearest);
  }
}

inline void leave_gradient(const Row& row, const Control& control, int64_t begin, int64_t end) {
  if (control.gradients == Gradients::kZeroed) {
    zero_gradient(row, begin, end);
  } else if (row.dtype[kGrad] == DType::kFloat64) {
    unscale_gradient(row, control.unscale, begin, end);
  } else {
    unscale_gradient(row, static_cast<float>(control.unscale), begin, end);
  }
}

}  // namespace genopt::GENOPT_CAPABILITY
