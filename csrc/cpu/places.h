// Sums of elements by their place in a tile, joined in the order of a rule's totals: csrc/README.md.
#pragma once

#include "../math/numbers.h"
#include "../plan/tiles.h"

namespace genopt::GENOPT_CAPABILITY {

// How many of a span's places in a tile hold something, rounded up to a power of 2.
inline int places_of(int64_t elements) {
  int places = kTile;
  while (places > 1 && places / 2 >= elements) places /= 2;
  return places;
}

// The places by halves.
template <class M>
GENOPT_INLINE double by_halves(double* sums, int places) {
  for (int half = places / 2; half >= 1; half /= 2)
#pragma GCC ivdep
    for (int i = 0; i < half; ++i) sums[i] = M::join(sums[i], sums[i + half]);
  return sums[0];
}

}  // namespace genopt::GENOPT_CAPABILITY
