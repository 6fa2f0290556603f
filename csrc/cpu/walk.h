// How one row's tiles are walked on CPU: load, rule, store; in registers where that can be (whole.h), else by way of
// stack arrays (operand.h). Included once by each cpu/walk_*.cpp, which sets the instruction set, GENOPT_VECTOR_BYTES
// and GENOPT_CAPABILITY, the namespace that keeps the copies apart.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../plan.h"
#include "lines.h"
#include "whole.h"

namespace genopt::GENOPT_CAPABILITY {

// The average alone, after p has been rounded as it is stored.
template <class T>
__attribute__((noinline)) void apply_average(const Around<T>& shared, const T* p, T* average, int count) {
  const Around<T> around = shared;
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) average[i] = around.average(average[i], p[i]);
}

// Joins values with the rest that they were rounded off, and parts them again.
template <class T>
__attribute__((noinline)) void join_rest(const T* rest, int count, T* p) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) p[i] += rest[i];
}
template <class T>
void part_rest(DType dtype, int count, T* p, T* rest) {
  with_codec(dtype, [=](auto codec) {
    using Codec = decltype(codec);
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) {
      const T rounded = Codec::template decode<T>(Codec::encode(p[i]));
      rest[i] = rest_of(p[i], rounded);
      p[i] = rounded;
    }
  });
}

template <class Rule, unsigned kUsed, class T>
void walk(const void* storage, const Row& row, int64_t begin, int64_t end) {
  auto scalars = *static_cast<const Scalars<Rule, T>*>(storage);
  scalars.around.factor *= static_cast<T>(row.factor);
  const int64_t stop = std::min(end * kTile, row.numel);
  int64_t start = begin * kTile;
  if constexpr (!(kUsed & kRests)) {
    // The usual cases first: what lies dense in whole tiles, and what else is stored in the compute type.
    if constexpr (sizeof(T) == 4) start = run_whole<Rule, kUsed>(scalars, row, start, stop);
    if (row.extra == Extra::kNone && !row.unbiased) start = run_direct<T, kUsed>(scalars, row, start, stop);
    if (start == stop) return;
  }

  TileOperand<T> operands[kOperands];
  const int param = row.param();
  for (; start < stop; start += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, stop - start));
    const int padded = (count + kLanes - 1) & -kLanes;
    T* values[kOperands] = {};
    const auto load = [&](int k) {
      if (start + kTile < stop) prefetch(row, k, start + kTile, kTile);
      values[k] = operands[k].load(row, k, start, count, padded);
    };
    load(param);
    T* const p = values[param];
    for (int k = kGrad; k < kExtra; ++k)
      if (is_used(kUsed, k) && !(kUsed & kRests && k == kGrad)) load(k);
    if constexpr (!(kUsed & kRests)) {
      if (row.extra == Extra::kCompensation) {
        load(kExtra);
        join_rest(values[kExtra], count, p);
      }
      apply<T, kUsed % kWithAverage>(scalars, p, values[kGrad], values[kState], values[kState + 1], values[kState + 2],
                                     static_cast<T*>(nullptr), padded);
      if (row.extra == Extra::kCompensation) part_rest(row.dtype[kParam], count, p, values[kExtra]);
      if (row.extra == Extra::kMaster)
        std::copy(p, p + count, operands[kParam].place(row, kParam, start, count, padded));
      for (int k = 0; k < kOperands; ++k)
        if (k == kParam || (k != kGrad && k != kAverage && values[k])) operands[k].store(scalars);
    }
    if constexpr (is_used(kUsed, kAverage)) {
      // Of the parameter as it is stored.
      if (!(kUsed & kRests) && param == kParam)
        values[kParam] = operands[kParam].load(row, kParam, start, count, padded);
      apply_average(scalars.around, values[param], values[kAverage], padded);
      operands[kAverage].store(scalars);
    }
  }
}

// Sets tiles of the gradient to zero.
inline void zero_gradient(const Row& row, int64_t begin, int64_t end) {
  const int64_t start = begin * kTile, stop = std::min(end * kTile, row.numel);
  const int size = size_of(row.dtype[kGrad]);
  char* const base = static_cast<char*>(row.data[kGrad]);
  if (!row.layout || row.layout->strides[kGrad].empty()) {
    std::memset(base + start * size, 0, (stop - start) * size);
    return;
  }
  int64_t offsets[kTile];
  for (int64_t at = start; at < stop; at += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, stop - at));
    locate(row.layout->sizes, row.layout->strides[kGrad], at, count, offsets);
    for (int i = 0; i < count; ++i) std::memset(base + offsets[i] * size, 0, size);
  }
}

template <class T>
__attribute__((noinline)) void multiply(T factor, int count, T* x) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) x[i] = factor * x[i];
}

// Takes the loss scale off tiles of the gradient.
template <class T>
void unscale_gradient(const Row& row, T factor, int64_t begin, int64_t end) {
  constexpr struct {
    uint32_t random = 0, phase = 0;
  } kToNearest;
  TileOperand<T> grad;
  const int64_t stop = std::min(end * kTile, row.numel);
  for (int64_t start = begin * kTile; start < stop; start += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, stop - start));
    const int padded = (count + kLanes - 1) & -kLanes;
    multiply(factor, padded, grad.load(row, kGrad, start, count, padded));
    grad.store(kToNearest);
  }
}

inline void leave_gradient(const Row& row, const Control& control, int64_t begin, int64_t end) {
  if (control.gradients == Gradients::kZeroed) {
    zero_gradient(row, begin, end);
  } else if (row.dtype[kGrad] == DType::kFloat64) {
    unscale_gradient(row, control.unscale, begin, end);
  } else {
    unscale_gradient(row, static_cast<float>(control.unscale), begin, end);
  }
}

// Joins the measures of `count` elements to the sums of their places in a tile, kTile of them in turn.
template <class M, class Codec>
__attribute__((noinline)) void measure_direct(const typename Codec::Stored* x, int64_t count, double* sums) {
  const auto of = [](typename Codec::Stored each) { return M::of(Codec::template decode<double>(each)); };
  for (; count >= 4 * kTile; count -= 4 * kTile, x += 4 * kTile) {
#pragma GCC ivdep
    for (int i = 0; i < kTile; ++i)
      sums[i] = M::join(M::join(M::join(M::join(sums[i], of(x[i])), of(x[i + kTile])), of(x[i + 2 * kTile])),
                        of(x[i + 3 * kTile]));
  }
  for (; count > 0; count -= kTile, x += kTile) {
    const int here = static_cast<int>(std::min<int64_t>(kTile, count));
#pragma GCC ivdep
    for (int i = 0; i < here; ++i) sums[i] = M::join(sums[i], of(x[i]));
  }
}

// One span as a number, in an order that no thread count and no vector width changes: the elements at one place of
// all tiles in turn, then the places by halves.
template <class M, class T>
double measure(const Row& row, int operand, int64_t span) {
  const int64_t start = span * kSpan * kTile, stop = std::min(start + int64_t{kSpan} * kTile, row.numel);
  int places = kTile;
  while (places > 1 && places / 2 >= stop - start) places /= 2;  // nothing stands beyond
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
  for (int half = places / 2; half >= 1; half /= 2)
#pragma GCC ivdep
    for (int i = 0; i < half; ++i) sums[i] = M::join(sums[i], sums[i + half]);
  return sums[0];
}

template <class Rule, unsigned... kMasks>
void fill(KernelTable& table, int rule, StateMasks<kMasks...>) {
  const auto set = [&]<unsigned kUsed>(StateMasks<kUsed>) {
    table.tiles[rule][kUsed] = {walk<Rule, kUsed, float>, walk<Rule, kUsed, double>};
  };
  (set(StateMasks<kMasks>{}), ...);
  (set(StateMasks<kMasks | kWithAverage>{}), ...);
  set(StateMasks<kWithAverage | kRests>{});
}

const KernelTable& kernel_table() {
  static const KernelTable table = [] {
    KernelTable kernels;
    for_each_rule([&]<class Rule, int kIndex>() { fill<Rule>(kernels, kIndex, typename Rule::Masks{}); });
    for (const Norm norm : {Norm::kTwo, Norm::kOne, Norm::kMax})
      with_measure(
          norm, [&]<class M>(M) { kernels.spans[static_cast<int>(norm)] = {measure<M, float>, measure<M, double>}; });
    kernels.leave_gradient = leave_gradient;
    kernels.stream = stream_lines<>;
    return kernels;
  }();
  return table;
}

}  // namespace genopt::GENOPT_CAPABILITY
