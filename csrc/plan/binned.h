// Sums of numbers in double that are the same in whatever order the numbers are added up, and however they are divided
// among threads, devices and processes. The largest decides on the grids to which all are rounded; multiples of a grid
// are integers, of which sums are exact. After Ahrens, Demmel and Nguyen, "Algorithms for efficient reproducible
// floating-point summation", ACM TOMS 46 (2020), where sums stay floating-point numbers.
//
// Numbers of bin b are below 2^(48 b - 975), and its grid is 2^(48 b - 1022). The bin of a sum is the lowest for all of
// its numbers. Of each it has the nearest multiple of the bin's grid, and of the rest the nearest multiple of the grid
// of the bin below: together it is off by 2^-48 of the largest number at most. (A number that the bin below has too is
// no multiple of this bin's grid but 0: so the sums of the one bin's grid are those of the other's finer one.)
// genopt_ext/binned.py is the same in torch operations.
#pragma once

#include "norm.h"
#include "tiles.h"

namespace genopt {

constexpr int kBinBits = 48;
constexpr int kTopBin = 2046 / kBinBits;
constexpr int kInfiniteBin = 62, kNaNBin = 63;  // in place of a bin: some number is infinite, or is NaN

// 2^exponent, of a normal number.
GENOPT_INLINE double power_of_2(int exponent) {
  return as_double(static_cast<uint64_t>(exponent + 1023) << 52);
}

// Of the largest number, which is not negative.
GENOPT_INLINE int bin_of(double largest) {
  const int exponent = static_cast<int>(bits_of(largest) >> 52);  // as it is stored
  return exponent < 2047 ? exponent / kBinBits : largest == largest ? kInfiniteBin : kNaNBin;
}

// Any count of multiples: high * 2^32 + low, where 0 <= low < 2^32.
struct Wide {
  int64_t high, low;

  GENOPT_INLINE double number() const {
    return static_cast<double>(high) * 0x1p32 + static_cast<double>(low);
  }
};
GENOPT_INLINE Wide widened(int64_t x) {
  return {x >> 32, x & 0xffffffff};
}
GENOPT_INLINE Wide operator+(const Wide& a, const Wide& b) {
  const int64_t low = a.low + b.low;
  return {a.high + b.high + (low >> 32), low & 0xffffffff};
}

// Some numbers, as multiples of their bin's grid and of the finer one. Of Norm::kMax: the bits of the largest as a bin.
template <class Multiples>
struct BinnedAs {
  static constexpr int kWords = 1 + 2 * static_cast<int>(sizeof(Multiples) / sizeof(int64_t));
  int64_t bin;
  Multiples coarse, fine;

  GENOPT_INLINE double value(Norm norm) const {
    if (norm == Norm::kMax) return as_double(static_cast<uint64_t>(bin));
    if (bin >= kInfiniteBin) return as_double(uint64_t{bin == kNaNBin ? 0x7ff8u : 0x7ff0u} << 48);
    const double half = power_of_2(kBinBits / 2 * static_cast<int>(bin) - 535);  // the finer grid is its square
    return (coarse.number() * power_of_2(kBinBits) + fine.number()) * half * half;
  }
};
using Binned = BinnedAs<int64_t>;    // at most a span's numbers
using BinnedTotal = BinnedAs<Wide>;  // any count of them
static_assert(sizeof(BinnedTotal) == BinnedTotal::kWords * sizeof(int64_t));
GENOPT_INLINE Binned binned_maximum(double x) {
  return {static_cast<int64_t>(x == x ? bits_of(x) : uint64_t{0x7ff8} << 48), 0, 0};
}
GENOPT_INLINE BinnedTotal widened(const Binned& x) {
  return {x.bin, widened(x.coarse), widened(x.fine)};
}
// As one of a bin that is not below its own.
template <class Multiples>
GENOPT_INLINE BinnedAs<Multiples> raised(const BinnedAs<Multiples>& x, int64_t bin) {
  const Multiples none{};
  return {bin, x.bin == bin ? x.coarse : none, x.bin == bin ? x.fine : x.bin + 1 == bin ? x.coarse : none};
}
template <class Multiples>
GENOPT_INLINE BinnedAs<Multiples> joined(const BinnedAs<Multiples>& a, const BinnedAs<Multiples>& b) {
  const int64_t bin = a.bin > b.bin ? a.bin : b.bin;
  const BinnedAs<Multiples> x = raised(a, bin), y = raised(b, bin);
  return {bin, x.coarse + y.coarse, x.fine + y.fine};
}

// What numbers are added to, to be rounded: beside a grid's magic number their bits count its multiples.
struct Grids {
  double scale;        // of numbers, as the top bin's magic number would be infinite
  double first, both;  // magic numbers: of the bin's grid, and the sum of this and the finer grid's

  GENOPT_INLINE explicit Grids(int bin) {
    constexpr int kBinsDown = 2;
    const int scaled = bin == kTopBin ? kTopBin - kBinsDown : bin;
    scale = bin == kTopBin ? power_of_2(-kBinsDown * kBinBits) : 1;
    first = 1.5 * power_of_2(kBinBits * scaled - 970);
    both = first + 1.5 * power_of_2(kBinBits * (scaled - 1) - 970);
  }
};

// Bits of numbers that were rounded to a bin's grid, and of what was left of them to the finer one: sums, and what was
// seen of the first.
struct BitSums {
  uint64_t rounded, left, seen;

  // M::of() of a number.
  template <class M, class T>
  GENOPT_INLINE void add(T x, const Grids& grids) {
    const double number = M::plus(x, grids.scale, grids.first);
    rounded += bits_of(number);
    left += bits_of(M::plus(x, grids.scale, grids.both - number));
    seen |= bits_of(number);
  }
  // Of `count` numbers.
  GENOPT_INLINE Binned counted(int bin, const Grids& grids, int64_t count) const {
    const uint64_t many = static_cast<uint64_t>(count);
    return {bin, static_cast<int64_t>(rounded - many * bits_of(grids.first)),
            static_cast<int64_t>(left - many * bits_of(grids.both - grids.first))};
  }
  // Whether numbers that are not negative were all of the bin; false too where one is nearly at its end.
  GENOPT_INLINE bool are_of_bin(const Grids& grids) const {
    constexpr int kBelow = kBinBits - 1;
    return seen >> kBelow == bits_of(grids.first) >> kBelow;
  }
};

// Adds up M::of() of at most a span's numbers. Themselves of which some are infinite, whatever their signs, come to
// infinity.
template <class M>
class BinnedSum {
 public:
  GENOPT_INLINE BinnedSum() : grids_(0) {
  }
  // Before numbers are added: room for the largest.
  GENOPT_INLINE void make_room(double x) {
    const double wanted = M::of(x);
    if (wanted <= largest_ || largest_ != largest_) return;  // NaN stays
    largest_ = wanted;
    if constexpr (!M::kIsMax) {
      const int bin = bin_of(wanted);
      if (bin <= bin_) return;
      sums_ = {0, static_cast<uint64_t>(raised(total(), bin).fine), 0};
      count_ = 0;
      bin_ = bin;
      grids_ = Grids(bin);
    }
  }
  template <class T>
  GENOPT_INLINE void add(T x) {
    if constexpr (!M::kIsMax) {
      sums_.template add<M>(x, grids_);
      ++count_;
    }
  }
  GENOPT_INLINE const Grids& grids() const {
    return grids_;
  }
  // Of `count` numbers that were added to the grids elsewhere.
  GENOPT_INLINE void add(const BitSums& some, int count) {
    sums_.rounded += some.rounded;
    sums_.left += some.left;
    count_ += count;
  }
  GENOPT_INLINE Binned total() const {
    if constexpr (M::kIsMax) return binned_maximum(largest_);
    return bin_ >= kInfiniteBin ? Binned{bin_, 0, 0} : sums_.counted(bin_, grids_, count_);
  }

 private:
  int bin_ = 0, count_ = 0;
  double largest_ = 0;
  BitSums sums_{};
  Grids grids_;
};
static_assert(int64_t{kSpan} * kTile << (kBinBits - 1) < int64_t{1} << 61);

}  // namespace genopt
