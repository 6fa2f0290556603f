// What a rule with factors (rules/rule.h) needs to know of the rows and columns of a matrix: sums of squares.
#pragma once

#include "../plan/norm.h"
#include "operand.h"

namespace genopt::GENOPT_CAPABILITY {

// Sums, joined in the order of csrc/README.md.
template <class M>
GENOPT_INLINE double by_halves(double* sums, int places) {
  for (int half = places / 2; half >= 1; half /= 2)
#pragma GCC ivdep
    for (int i = 0; i < half; ++i) sums[i] = M::join(sums[i], sums[i + half]);
  return sums[0];
}

// Of elements of one row that lie in one panel: returns the sum of their squares, and adds these to `down`.
template <class M, class T>
__attribute__((noinline)) double add_squares_of(const Around<T>& shared, const T* values, int count, double* down) {
  using V = ValuesOf<T>;
  const Around<T> around = shared;
  const bool plain = around.is_plain();
  alignas(64) double across[kRowsTogether] = {};
  int j = 0;
  for (; j + kAtOnce<T> <= count; j += kAtOnce<T>) {
    const V given = load_values<Values<T>>(values + j), g = plain ? given : around.gradient(given);
    add_up<M>(g, across + j % kRowsTogether);
    add_up<M>(g, down + j);
  }
  for (; j < count; ++j) {
    const double square = M::of(static_cast<double>(plain ? values[j] : around.gradient(values[j])));
    across[j % kRowsTogether] += square;
    down[j] += square;
  }
  int places = kRowsTogether;
  while (places > 1 && places / 2 >= count) places /= 2;
  return by_halves<M>(across, places);
}

template <class Rule, class T>
void add_squares(const void* storage, const Row& row, int64_t start, int64_t rows, double* across, double* down) {
  using M = TotalOf<Rule>;
  static_assert(kAddsSquares<Rule>);
  Around<T> around = static_cast<const Scalars<Rule, T>*>(storage)->around;
  around.factor *= static_cast<T>(row.factor);
  TileOperand<T> operand;
  const auto load = [&](int64_t from, int64_t count) {
    const int some = static_cast<int>(count);
    return operand.load(row, kGrad, from, some, (some + kLanes - 1) & -kLanes);
  };
  const int64_t columns = row.matrices.columns;
  if (columns <= kPanel) {  // whole rows at a time
    for (int64_t i = 0, some; i < rows; i += some) {
      some = std::min(kPanel / columns, rows - i);
      const T* const g = load(start + i * columns, some * columns);
      for (int64_t k = 0; k < some; ++k)
        across[i + k] = add_squares_of<M>(around, g + k * columns, static_cast<int>(columns), down);
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i, start += columns) {
    double panels[kRowsTogether] = {};
    for (int64_t column = 0; column < columns; column += kPanel) {
      const int64_t count = std::min<int64_t>(kPanel, columns - column);
      panels[column / kPanel % kRowsTogether] +=
          add_squares_of<M>(around, load(start + column, count), static_cast<int>(count), down + column);
    }
    across[i] = by_halves<M>(panels, kRowsTogether);
  }
}

}  // namespace genopt::GENOPT_CAPABILITY
