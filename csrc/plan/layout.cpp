// See layout.h. Dimensions that every operand allows are merged.
#include "layout.h"

#include <algorithm>

namespace genopt {

Layout make_layout(const std::vector<int64_t>& sizes, const std::array<const int64_t*, kOperands>& strides) {
  // The parameter's memory order: largest stride first, dimensions of size 1 left out.
  std::vector<int> order;
  for (int d = 0; d < static_cast<int>(sizes.size()); ++d)
    if (sizes[d] != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return strides[kParam][a] > strides[kParam][b]; });

  Layout layout;
  for (const int d : order) {
    bool merge = !layout.sizes.empty();
    for (int k = 0; k < kOperands; ++k)
      merge = merge && (!strides[k] || layout.strides[k].back() == strides[k][d] * sizes[d]);
    if (merge) {
      layout.sizes.back() *= sizes[d];
    } else {
      layout.sizes.push_back(sizes[d]);
    }
    for (int k = 0; k < kOperands; ++k) {
      if (!strides[k]) continue;
      if (merge) {
        layout.strides[k].back() = strides[k][d];
      } else {
        layout.strides[k].push_back(strides[k][d]);
      }
    }
  }
  // An operand that is contiguous in this order needs no strides.
  for (auto& operand : layout.strides) {
    int64_t expected = 1;
    bool contiguous = true;
    for (size_t d = operand.size(); d-- > 0; expected *= layout.sizes[d])
      contiguous = contiguous && operand[d] == expected;
    if (contiguous) operand.clear();
  }
  return layout;
}

}  // namespace genopt
