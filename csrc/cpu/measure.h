// Norms: one span of an operand as a number.
#pragma once

#include <algorithm>

#include "../plan/norm.h"
#include "operand.h"

namespace genopt::GENOPT_CAPABILITY {

// Joins the measures of `count` elements to the sums of their places in a tile, front to back: several tiles at a time
// keep the sums longer in registers, and take an AMD Zen 4 twice as long, whose prefetching follows one stream.
template <class M, class Codec>
__attribute__((noinline)) void measure_direct(const typename Codec::Stored* x, int64_t count, double* sums) {
  const auto of = [](typename Codec::Stored each) { return M::of(Codec::template decode<double>(each)); };
  for (; count > 0; count -= kTile, x += kTile) {
    const int here = static_cast<int>(std::min<int64_t>(kTile, count));
#pragma GCC ivdep
    for (int i = 0; i < here; ++i) sums[i] = M::join(sums[i], of(x[i]));
  }
}

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

// One span as a number, in an order that no thread count and no vector width changes: the elements at one place of
// all tiles in turn, then the places by halves.
template <class M, class T>
double measure(const Row& row, int operand, int64_t span) {
  const int64_t start = span * kSpan * kTile, stop = std::min(start + int64_t{kSpan} * kTile, row.numel);
  const int places = places_of(stop - start);
  alignas(64) double sums[kTile];
  std::fill(sums, sums + places, 0.0);
  const auto direct = [&]<class Codec>(Codec) {
    if (!is_direct<Codec>(row, operand)) return false;
    measure_direct<M, Codec>(element<Codec>(row, operand, start), stop - start, sums);
    return true;
  };
  if (!direct(Values<T>{}) && !direct(BFloat16{}) && !direct(Float16{})) {
    TileOperand<T> loaded;
    for (int64_t at = start; at < stop; at += kTile) {
      const int count = static_cast<int>(std::min<int64_t>(kTile, stop - at));
      measure_direct<M, Values<T>>(loaded.load(row, operand, at, count, count), count, sums);
    }
  }
  return by_halves<M>(sums, places);
}

}  // namespace genopt::GENOPT_CAPABILITY
