// make_layout: dimensions merge where every operand allows, in the parameter's memory order; and whatever the
// layout, a walk over it meets the same elements of every operand together as plain indexing does.
#include <set>

#include "check.h"
#include "plan/plan.h"

using namespace genopt;
using Dims = std::vector<int64_t>;

// Where element i of a walk over `sizes` lies.
static int64_t locate(const Dims& sizes, const Dims& strides, int64_t i) {
  int64_t offset = 0;
  for (size_t d = sizes.size(); d-- > 0; i /= sizes[d]) offset += i % sizes[d] * strides[d];
  return offset;
}

// Lays out param, grad and one state, and checks the walk; returns the layout for a look at its dimensions.
static Layout layout(const Dims& sizes, const std::array<Dims, 3>& operands, const char* name) {
  std::array<const int64_t*, kOperands> strides{};
  for (int k = 0; k < 3; ++k) strides[k] = operands[k].data();
  const Layout made = make_layout(sizes, strides);

  int64_t numel = 1, walked = 1;
  for (const int64_t size : sizes) numel *= size;
  for (const int64_t size : made.sizes) walked *= size;
  CHECK(walked == numel, name);
  CHECK(made.strides[kState + 1].empty() && made.strides[kState + 2].empty(), name);
  std::set<std::array<int64_t, 3>> expected, met;
  int64_t last = -1;
  for (int64_t i = 0; i < numel; ++i) {
    std::array<int64_t, 3> plain, here;
    for (int k = 0; k < 3; ++k) {
      plain[k] = locate(sizes, operands[k], i);
      here[k] = made.strides[k].empty() ? i : locate(made.sizes, made.strides[k], i);
    }
    expected.insert(plain);
    met.insert(here);
    CHECK(here[kParam] > last, name);  // in the parameter's memory order
    last = here[kParam];
  }
  CHECK(met == expected, name);
  return made;
}

static Layout layout(const Dims& sizes, const Dims& param, const Dims& others, const char* name) {
  return layout(sizes, {param, others, others}, name);
}

int main() {
  Layout l = layout({2, 3, 4}, {12, 4, 1}, {12, 4, 1}, "contiguous");
  CHECK((l.sizes == Dims{24}) && l.strides[kParam].empty() && l.strides[kGrad].empty(), "contiguous");
  l = layout({2, 3, 4}, {12, 1, 3}, {12, 1, 3}, "contiguous in another order");
  CHECK((l.sizes == Dims{24}) && l.strides[kParam].empty(), "contiguous in another order");
  l = layout({2, 3, 4, 5}, {60, 1, 15, 3}, {60, 1, 15, 3}, "channels last");
  CHECK((l.sizes == Dims{120}) && l.strides[kParam].empty() && l.strides[kState].empty(), "channels last");
  l = layout({2, 3, 4, 5}, {60, 1, 15, 3}, {60, 20, 5, 1}, "channels-last param only");
  CHECK((l.sizes == Dims{2, 20, 3}) && l.strides[kParam].empty() && (l.strides[kGrad] == Dims{60, 1, 20}),
        "channels-last param only");
  l = layout({3, 4}, {4, 1}, {1, 3}, "transposed grad");
  CHECK((l.sizes == Dims{3, 4}) && l.strides[kParam].empty() && (l.strides[kGrad] == Dims{1, 3}), "transposed grad");
  l = layout({3, 4}, {1, 3}, {4, 1}, "transposed param");
  CHECK((l.sizes == Dims{4, 3}) && l.strides[kParam].empty() && (l.strides[kGrad] == Dims{1, 4}), "transposed param");
  l = layout({5, 3, 4}, {24, 4, 1}, {12, 4, 1}, "sliced param");
  CHECK((l.sizes == Dims{5, 12}) && (l.strides[kParam] == Dims{24, 1}) && l.strides[kGrad].empty(), "sliced param");
  l = layout({5, 3, 4}, {12, 4, 1}, {24, 8, 2}, "every other element");
  CHECK((l.sizes == Dims{60}) && l.strides[kParam].empty() && (l.strides[kGrad] == Dims{2}), "every other element");
  l = layout({2, 3, 4}, {Dims{12, 4, 1}, Dims{24, 4, 1}, Dims{4, 8, 1}}, "all differ");
  CHECK((l.sizes == Dims{2, 3, 4}) && l.strides[kParam].empty() && (l.strides[kState] == Dims{4, 8, 1}), "all differ");
  l = layout({3, 4}, {4, 1}, {0, 0}, "expanded grad");
  CHECK((l.sizes == Dims{12}) && (l.strides[kGrad] == Dims{0}), "expanded grad");
  l = layout({1, 6, 1}, {99, 2, 7}, {6, 1, 1}, "size-1 dimensions");
  CHECK((l.sizes == Dims{6}) && (l.strides[kParam] == Dims{2}) && l.strides[kGrad].empty(), "size-1 dimensions");
  for (const Dims& ones : {Dims{}, Dims{1}, Dims{1, 1, 1}}) {
    l = layout(ones, ones, ones, "one element");
    CHECK(l.sizes.empty() && l.strides[kParam].empty(), ones.size());
  }
}
