// The order in which the elements of a row's tensors are visited.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "../rules/all.h"

namespace genopt {

// The tensors a row names, in the order of Layout::strides. kAverage: the moving average of the weights. kExtra: what
// the parameter's dtype can not hold, see Extra.
enum Operand { kParam, kGrad, kState, kAverage = kState + kMaxStates, kExtra, kOperands };

// The element order of a row whose operands are not all contiguous in one order. Dimensions are merged
// where every operand allows; the last one varies fastest. Strides count elements.
struct Layout {
  std::vector<int64_t> sizes;
  std::array<std::vector<int64_t>, kOperands> strides;  // empty: contiguous in this order, or not used
};

// sizes: the tensor's shape; strides: an operand's strides for that shape, or null where not used.
// Elements are visited in the order in which the parameter lies in memory.
Layout make_layout(const std::vector<int64_t>& sizes, const std::array<const int64_t*, kOperands>& strides);

}  // namespace genopt
