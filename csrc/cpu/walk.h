// Which way each part of a row goes on CPU: contiguous tiles of fp32, bf16, fp64 and 8-bit codes are stepped where they
// lie (in_place.h, coded.h), all others by way of buffers (buffered.h); and the table of all kernels. Included once by
// each cpu/walk_*.cpp, which sets the instruction set, GENOPT_VECTOR_BYTES and GENOPT_CAPABILITY, the namespace that
// keeps the copies apart.
#pragma once

#include <algorithm>

#include "buffered.h"
#include "coded.h"
#include "factor.h"
#include "gradient.h"
#include "in_place.h"
#include "kernels.h"
#include "measure.h"
#include "total.h"

namespace genopt::GENOPT_CAPABILITY {

// Whether all there are loops for is compiled. x86-64 without AVX2 is rare, and has the loop for fp32 alone.
#if defined(__x86_64__)
constexpr bool kHasAllLoops = GENOPT_VECTOR_BYTES > 16;
#else
constexpr bool kHasAllLoops = true;
#endif

// Whether this file has the loops of a rule. Under sanitizers, which take ten times as long to compile, it has those of
// rules that differ in kind: in states, numbers, totals and factors. The others are the same text with other
// arithmetic.
template <class Rule, class... Some>
constexpr bool kIsOneOf = (std::is_same_v<Rule, Some> || ...);
#if defined(GENOPT_LOOPS_OF)
template <class Rule>
constexpr bool kHasLoops = kIsOneOf<Rule, GENOPT_LOOPS_OF>;
#else
template <class Rule>
constexpr bool kHasLoops = true;
#endif

// What is stepped where it lies. Returns where that ended. kFlag: kMayBeCautious, of which
// there are fewer loops, or 0.
template <class Rule, unsigned kUsed, unsigned kFlag>
GENOPT_INLINE int64_t run_direct(const Scalars<Rule, double>& scalars, const Row& row, int64_t start, int64_t stop) {
  if constexpr (!kHasAllLoops || kUsed >= kWithAverage || kFlag != 0 || (kUsed & kFactorsOf<Rule>) != 0) return start;
  return run_plain<Rule, kUsed, Float64, Float64, false>(scalars, row, start, stop);
}
template <class Rule, unsigned kUsed, unsigned kFlag>
GENOPT_INLINE int64_t run_direct(const Scalars<Rule, float>& scalars, const Row& row, int64_t start, int64_t stop) {
  if constexpr ((kUsed & kFactorsOf<Rule>) != 0) return start;
  if constexpr (kHasAllLoops || kUsed < kWithAverage)
    start = run_plain<Rule, kUsed | kFlag, Float32, Float32, false>(scalars, row, start, stop);
  if constexpr (kHasAllLoops && kUsed < kWithAverage) {
    if (start == stop) return start;
    const auto run = [&]<bool kHasExtra>(std::bool_constant<kHasExtra>) {
      start = run_plain<Rule, kUsed | kFlag, BFloat16, BFloat16, kHasExtra>(scalars, row, start, stop);
      if constexpr (kUsed != 0) {
        start = run_plain<Rule, kUsed | kFlag, BFloat16, Float32, kHasExtra>(scalars, row, start, stop);
        if constexpr (kFlag == 0) start = run_coded<Rule, kUsed, BFloat16, kHasExtra>(scalars, row, start, stop);
      }
    };
    if (row.extra != Extra::kNone) {
      if constexpr (kFlag == 0) run(std::true_type{});
      return start;
    }
    run(std::false_type{});
    if constexpr (kUsed != 0 && kFlag == 0) {
      start = run_plain<Rule, kUsed, Float32, BFloat16, false>(scalars, row, start, stop);
      start = run_coded<Rule, kUsed, Float32, false>(scalars, row, start, stop);
    }
  }
  return start;
}

// Tiles [begin, end) of a row: where they lie if there is a loop for them, the rest by way of buffers.
template <class Rule, unsigned kUsed, class T>
void walk(const void* storage, const Row& row, int64_t begin, int64_t end) {
  const auto& scalars = *static_cast<const Scalars<Rule, T>*>(storage);
  const int64_t stop = row.start_of(end);
  const auto run = [&]<unsigned kFlag>() {
    const int64_t start = run_direct<Rule, kUsed, kFlag>(scalars, row, row.start_of(begin), stop);
    if (start < stop) run_buffered<Rule, kUsed % kWithAverage | kFlag>(scalars, row, start, stop);
  };
  // Asking each element whether its decay is cautious would be 7 % of all instructions of others.
  if constexpr (kAnyDecay<Rule> != 0)
    if (scalars.update.is_cautious()) return run.template operator()<kMayBeCautious>();
  run.template operator()<0>();
}

template <class Rule, unsigned... kMasks>
void fill(KernelTable& table, int rule, StateMasks<kMasks...>) {
  const auto set = [&]<unsigned kUsed>(StateMasks<kUsed>) {
    table.tiles[rule][kUsed] = {walk<Rule, kUsed, float>, walk<Rule, kUsed, double>};
    if constexpr (kTotalsOf<Rule> > 0 && kUsed < kWithAverage)
      table.totals[rule][kUsed] = {total<Rule, kUsed, float>, total<Rule, kUsed, double>};
  };
  if constexpr (kFactorsOf<Rule> != 0) table.squares[rule] = {add_squares<Rule, float>, add_squares<Rule, double>};
  (set(StateMasks<kMasks>{}), ...);
  (set(StateMasks<kMasks | kWithAverage>{}), ...);
}

const KernelTable& kernel_table() {
  static const KernelTable table = [] {
#if defined(GENOPT_LOOPS_OF)
    KernelTable kernels = baseline::kernel_table();
#else
    KernelTable kernels;
#endif
    for_each_rule([&]<class Rule, int kIndex>() {
      if constexpr (kHasLoops<Rule>) fill<Rule>(kernels, kIndex, typename Rule::Masks{});
    });
    for (const Norm norm : {Norm::kTwo, Norm::kOne, Norm::kMax})
      with_measure(
          norm, [&]<class M>(M) { kernels.spans[static_cast<int>(norm)] = {measure<M, float>, measure<M, double>}; });
    kernels.only_average = {walk_only_average<float>, walk_only_average<double>};
    kernels.leave_gradient = leave_gradient;
    return kernels;
  }();
  return table;
}

}  // namespace genopt::GENOPT_CAPABILITY
