// Norms: one span of an operand, added up so that no order counts (plan/binned.h). Numbers of 16 bits other than
// bfloat16, and what is strided, pass through a buffer as floats.
#pragma once

#include <algorithm>

#include "../plan/binned.h"
#include "operand.h"

namespace genopt::GENOPT_CAPABILITY {

// Numbers without their signs stand in the order of these bits: infinity and NaN after all others.
template <class T>
GENOPT_INLINE Bits<T> magnitude(T x) {
  return genopt::bits_of(x) << 1 >> 1;
}

// The largest |x|, or NaN if there is one.
template <class Codec>
__attribute__((noinline)) double largest_of(const typename Codec::Stored* x, int count) {
  using T = std::conditional_t<sizeof *x == 8, double, float>;
  Bits<T> most = 0;
  int i = 0;
  if constexpr (sizeof *x < 8) {
    constexpr int kVectors = 4;
    Words some[kVectors] = {0u, 0u, 0u, 0u};
    for (; i + kVectors * kWidth <= count; i += kVectors * kWidth)
      for (int k = 0; k < kVectors; ++k)
        some[k] = larger(some[k], bits_of(load_values<Codec>(x + i + k * kWidth)) & Words(0x7fffffffu));
    most = largest(larger(larger(some[0], some[1]), larger(some[2], some[3])));
  }
#pragma GCC ivdep
  for (; i < count; ++i) most = std::max(most, magnitude(Codec::template decode<T>(x[i])));
  T result;
  std::memcpy(&result, &most, sizeof result);
  return result;
}

// Adds up the numbers of a tile or a span, and prefetches so many elements ahead.
template <class M, class Codec>
__attribute__((noinline)) void add_numbers(const typename Codec::Stored* x, int64_t count, const Grids& shared,
                                           int ahead, BitSums& sums) {
  using T = std::conditional_t<sizeof *x == 8, double, float>;
  typedef uint64_t Sums __attribute__((vector_size(4 * kWidth)));
  const Grids grids = shared;
  const HalfOfDoubles first = grids.first - HalfOfDoubles{}, both = grids.both - HalfOfDoubles{};
  // As M::plus().
  const auto plus = [&](HalfOfDoubles half, HalfOfDoubles y) __attribute__((always_inline)) {
    if constexpr (sizeof(T) == 4 && std::is_same_v<M, Measure<Norm::kTwo>>) return multiply_add(half, half, y);
    return M::of(half) * grids.scale + y;
  };
  Sums rounded[2] = {}, left[2] = {}, seen = {};
  const auto add = [&](HalfOfDoubles half, int k) __attribute__((always_inline)) {
    const HalfOfDoubles number = plus(half, first);
    rounded[k] += (Sums)number;
    left[k] += (Sums)plus(half, both - number);
    return (Sums)number;
  };
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    for (size_t byte = 0; byte < kWidth * sizeof *x; byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(x + i + ahead) + byte);
    HalfOfDoubles halves[2];
    load_in_double<Codec>(x + i, halves);
    seen |= add(halves[0], 0) | add(halves[1], 1);
  }
  for (int k = 0; k < kWidth / 2; ++k) {
    sums.rounded += rounded[0][k] + rounded[1][k];
    sums.left += left[0][k] + left[1][k];
    sums.seen |= seen[k];
  }
  for (; i < count; ++i) sums.add<M>(Codec::template decode<T>(x[i]), grids);
}

// `numbers(at, count)`: so many of a span's `all`, of which it knows at most kMost at once.
template <class M, class Codec, int kMost, class Numbers>
Binned sum_of_span(int64_t all, Numbers numbers) {
  const int ahead = cpu::tuning.norm * kTile;
  const auto largest_among = [&](int64_t some) {
    double largest = 0;
    for (int64_t at = 0; at < some; at += kTile) {
      const int count = static_cast<int>(std::min<int64_t>(kTile, some - at));
      largest = maximum(largest, M::of(largest_of<Codec>(numbers(at, count), count)));
    }
    return largest;
  };
  if constexpr (M::kIsMax) return binned_maximum(largest_among(all));
  // Mostly the first tile's bin is that of all.
  for (int64_t some = std::min<int64_t>(kTile, all);; some = all) {
    const int bin = bin_of(largest_among(some));
    if (bin == kInfiniteBin && some < all) continue;  // there may be NaN
    if (bin >= kInfiniteBin) return {bin, 0, 0};
    const Grids grids(bin);
    BitSums sums{};
    for (int64_t at = 0; at < all; at += kMost) {
      const int64_t count = std::min<int64_t>(kMost, all - at);
      add_numbers<M, Codec>(numbers(at, count), count, grids, ahead, sums);
    }
    if (some == all || sums.are_of_bin(grids)) return sums.counted(bin, grids, all);
  }
}

template <class M, class T>
Binned measure(const Row& row, int operand, int64_t span) {
  constexpr int kAll = kSpan * kTile;
  const int64_t start = span * kSpan * row.tile, count = row.start_of((span + 1) * kSpan) - start;
  const auto direct = [&]<class Codec>(Codec) {
    return sum_of_span<M, Codec, kAll>(count,
                                       [&](int64_t at, int64_t) { return element<Codec>(row, operand, start + at); });
  };
  if (is_direct<Values<T>>(row, operand)) return direct(Values<T>{});
  if (is_direct<BFloat16>(row, operand)) return direct(BFloat16{});
  TileOperand<T> tile;
  return sum_of_span<M, Values<T>, kTile>(count, [&](int64_t at, int64_t some) {
    return tile.load(row, operand, start + at, static_cast<int>(some), static_cast<int>(some));
  });
}

}  // namespace genopt::GENOPT_CAPABILITY
