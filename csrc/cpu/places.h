// Sums that are joined in the order of factors: csrc/README.md.
#pragma once

#include "../math/numbers.h"

namespace genopt::GENOPT_CAPABILITY {

// The places by halves.
template <class M>
GENOPT_INLINE double by_halves(double* sums, int places) {
  for (int half = places / 2; half >= 1; half /= 2)
#pragma GCC ivdep
    for (int i = 0; i < half; ++i) sums[i] = M::join(sums[i], sums[i + half]);
  return sums[0];
}

}  // namespace genopt::GENOPT_CAPABILITY
