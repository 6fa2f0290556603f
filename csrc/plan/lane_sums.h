// The order in which norms of spans and rows are joined.
#pragma once

#include <cstdint>

#include "norm.h"

namespace genopt {

// Numbers added up as a warp does it:
//   for i = 0, 1, ...:         sums[i % 32] += x[i]
//   for half = 16, 8, 4, 2, 1: sums[i] += sums[i + half] for each i < half
//   the total is sums[0]
class LaneSums {
 public:
  explicit LaneSums(Norm norm) : norm_(norm) {
  }
  void add(int64_t i, double x) {
    with_measure(norm_, [&](auto measure) { sums_[i % 32] = measure.join(sums_[i % 32], x); });
  }
  double total() {
    with_measure(norm_, [&](auto measure) {
      for (int half = 16; half >= 1; half /= 2)
        for (int i = 0; i < half; ++i) sums_[i] = measure.join(sums_[i], sums_[i + half]);
    });
    return sums_[0];
  }

 private:
  Norm norm_;
  double sums_[32] = {};
};

}  // namespace genopt
