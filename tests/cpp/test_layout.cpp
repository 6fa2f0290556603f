// make_layout: dimensions merge where every operand allows, in the parameter's memory order.
#include "check.h"
#include "plan.h"

using namespace genopt;
using Dims = std::vector<int64_t>;

static Layout layout(const Dims& sizes, const Dims& param, const Dims& grad) {
  std::array<const int64_t*, kOperands> strides{};
  strides[kParam] = param.data();
  strides[kGrad] = grad.data();
  return make_layout(sizes, strides);
}

int main() {
  Layout l = layout({2, 3, 4}, {12, 4, 1}, {12, 4, 1});
  CHECK((l.sizes == Dims{24}) && l.strides[kParam].empty() && l.strides[kGrad].empty(), "contiguous");
  l = layout({2, 3, 4}, {12, 1, 3}, {12, 1, 3});
  CHECK((l.sizes == Dims{24}) && l.strides[kParam].empty(), "dense in another order");
  l = layout({3, 4}, {4, 1}, {1, 3});
  CHECK((l.sizes == Dims{3, 4}) && l.strides[kParam].empty() && (l.strides[kGrad] == Dims{1, 3}), "transposed grad");
  l = layout({3, 4}, {1, 3}, {4, 1});
  CHECK((l.sizes == Dims{4, 3}) && l.strides[kParam].empty() && (l.strides[kGrad] == Dims{1, 4}), "transposed param");
  l = layout({5, 3, 4}, {24, 4, 1}, {12, 4, 1});
  CHECK((l.sizes == Dims{5, 12}) && (l.strides[kParam] == Dims{24, 1}) && l.strides[kGrad].empty(), "sliced param");
  l = layout({1, 6, 1}, {99, 2, 7}, {6, 1, 1});
  CHECK((l.sizes == Dims{6}) && (l.strides[kParam] == Dims{2}) && l.strides[kGrad].empty(), "size-1 dimensions");
  l = layout({}, {}, {});
  CHECK(l.sizes.empty() && l.strides[kParam].empty(), "0-dim");
}
