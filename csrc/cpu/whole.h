// The usual rows without buffers: operands that lie dense and are stored as a rule computes, or as vectors can be made
// of them. The rest is walk.h's.
#pragma once

#include <type_traits>

#include "operand.h"

namespace genopt::GENOPT_CAPABILITY {

// Load, rule, store over `count` elements, a multiple of kLanes, that all operands store with one codec.
template <class T, class Codec, unsigned kUsed, class Scalars, class Stored = typename Codec::Stored>
__attribute__((noinline)) void apply(const Scalars& shared, Stored* p, const Stored* g, Stored* s0, Stored* s1,
                                     Stored* s2, Stored* average, int64_t count) {
  constexpr bool kHas0 = is_used(kUsed, kState), kHas1 = is_used(kUsed, kState + 1), kHas2 = is_used(kUsed, kState + 2),
                 kHasAverage = is_used(kUsed, kAverage);
  const auto load = [](Stored x) { return Codec::template decode<T>(x); };
  const Scalars scalars = shared;  // a copy, which no store below can change
  count &= -kLanes;                // tells the compiler that there is no tail
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    T param = load(p[i]), x0 = kHas0 ? load(s0[i]) : T(0), x1 = kHas1 ? load(s1[i]) : T(0),
      x2 = kHas2 ? load(s2[i]) : T(0);
    scalars.update.template apply<kUsed % kWithAverage>(param, scalars.around.gradient(load(g[i])), x0, x1, x2);
    p[i] = Codec::encode(param);
    if constexpr (kHas0) s0[i] = Codec::encode(x0);
    if constexpr (kHas1) s1[i] = Codec::encode(x1);
    if constexpr (kHas2) s2[i] = Codec::encode(x2);
    if constexpr (kHasAverage)
      average[i] = Codec::encode(scalars.around.average(load(average[i]), load(Codec::encode(param))));
  }
}

// Runs whole vectors from element `start` on in memory, without buffers, and returns where it ended.
template <class Codec, class T, unsigned kUsed, class Scalars>
int64_t run_direct(const Scalars& scalars, const Row& row, int64_t start, int64_t stop) {
  for (int k = 0; k < kOperands; ++k)
    if (is_used(kUsed, k) && !is_direct<Codec>(row, k)) return start;
  const int64_t count = (stop - start) & -int64_t{kLanes};
  apply<T, Codec, kUsed>(scalars, element<Codec>(row, kParam, start), element<Codec>(row, kGrad, start),
                         element<Codec>(row, kState, start), element<Codec>(row, kState + 1, start),
                         element<Codec>(row, kState + 2, start), element<Codec>(row, kAverage, start), count);
  return start + count;
}

template <class T>
using Values = std::conditional_t<sizeof(T) == 8, Float64, Float32>;

template <class Codec>
GENOPT_INLINE Floats load_values(const typename Codec::Stored* from) {
  if constexpr (std::is_same_v<Codec, BFloat16>) return float_of(load_ints(from) << 16);
  return load<Floats>(from);
}
template <class Codec>
GENOPT_INLINE void store_values(typename Codec::Stored* to, Floats x) {
  if constexpr (std::is_same_v<Codec, BFloat16>) {
    store_ints(to, as_signed(BFloat16::encode_bits(x)));
  } else {
    store(to, x);
  }
}

// Calls visit(k, codec) for each state of a rule, with what codes it would have.
template <class Rule, unsigned kUsed, class Visit>
GENOPT_INLINE void each_state(Visit&& visit) {
  const auto visit_used = [&]<int k>(std::integral_constant<int, k> state) {
    if constexpr (is_used(kUsed, kState + k)) visit(state, Int8Block<!(Rule::kSquares >> k & 1)>(0));
  };
  visit_used(std::integral_constant<int, 0>{});
  visit_used(std::integral_constant<int, 1>{});
  visit_used(std::integral_constant<int, 2>{});
}

// What whole tiles of a dense row go through in registers, a vector of elements at a time: parameter and gradient
// stored with the codec Param, states given and taken as values.
template <class Rule, unsigned kUsed, class Param>
class VectorStep {
 public:
  GENOPT_INLINE VectorStep(const Scalars<Rule, float>& scalars, const Row& row)
      : scalars_(scalars), random_(row.unbiased >> kParam & 1), row_(row) {
  }
  static bool takes(const Row& row) {
    return is_direct<Param>(row, kParam) && is_direct<Param>(row, kGrad);
  }

  // Goes to the tile that begins at element `start`.
  GENOPT_INLINE void begin(int64_t start) {
    p_ = element<Param>(row_, kParam, start);
    g_ = element<Param>(row_, kGrad, start);
    key_ = tile_key(scalars_.random, start);
  }
  // Asks for the next tile's.
  GENOPT_INLINE void prefetch(int i) const {
    __builtin_prefetch(p_ + kTile + i);
    __builtin_prefetch(g_ + kTile + i);
  }
  // Elements of the tile from i on; `states`: theirs.
  GENOPT_INLINE void step(int i, Floats (&states)[kMaxStates]) const {
    Floats p = load_values<Param>(p_ + i);
    const Floats g = scalars_.around.gradient(load_values<Param>(g_ + i));
    scalars_.update.template apply<kUsed>(p, g, states[0], states[1], states[2]);
    if constexpr (!std::is_same_v<Param, Float32>)
      if (random_) p = Param::round_by(p, random_bits(key_ + i, count_up()));
    store_values<Param>(p_ + i, p);
  }

 private:
  const Scalars<Rule, float> scalars_;
  const bool random_;
  const Row& row_;
  typename Param::Stored* p_;
  const typename Param::Stored* g_;
  uint32_t key_;
};

// Whole tiles whose states are all stored with the codec State. Returns where it ended.
template <class Rule, unsigned kUsed, class Param, class State>
__attribute__((noinline)) int64_t run_plain(const Scalars<Rule, float>& scalars, const Row& row, int64_t start,
                                            int64_t stop) {
  bool fits = VectorStep<Rule, kUsed, Param>::takes(row);
  each_state<Rule, kUsed>([&](auto k, auto) { fits = fits && is_direct<State>(row, kState + k); });
  if (!fits) return start;
  VectorStep<Rule, kUsed, Param> step(scalars, row);
  const bool turned = row.unbiased >> kState;
  for (; stop - start >= kTile; start += kTile) {
    const uint32_t turn = tile_turn(scalars.turn, start);
    typename State::Stored* states[kMaxStates];
    each_state<Rule, kUsed>([&](auto k, auto) { states[k] = element<State>(row, kState + k, start); });
    step.begin(start);
    for (int i = 0; i < kTile; i += kWidth) {
      Floats x[kMaxStates];
      each_state<Rule, kUsed>([&](auto k, auto) { x[k] = load_values<State>(states[k] + i); });
      step.step(i, x);
      each_state<Rule, kUsed>([&](auto k, auto) {
        if constexpr (!std::is_same_v<State, Float32>)
          if (turned) x[k] = State::round_by(x[k], turns_from(turn, i));
        store_values<State>(states[k] + i, x[k]);
      });
    }
  }
  return start;
}

// Whole tiles whose states are all in codes. Returns where it ended.
template <class Rule, unsigned kUsed, class Param>
__attribute__((noinline)) int64_t run_coded(const Scalars<Rule, float>& scalars, const Row& row, int64_t start,
                                            int64_t stop) {
  bool fits = VectorStep<Rule, kUsed, Param>::takes(row);
  each_state<Rule, kUsed>([&]<class Block>(auto k, Block) { fits = fits && is_direct<Block>(row, kState + k); });
  if (!fits) return start;
  VectorStep<Rule, kUsed, Param> step(scalars, row);
  alignas(64) float values[kMaxStates][kTile];
  for (; stop - start >= kTile; start += kTile) {
    float scales[kMaxStates];
    void* codes[kMaxStates];
    Words most[kMaxStates];
    each_state<Rule, kUsed>([&]<class Block>(auto k, Block) {
      scales[k] = row.scales[k][start / kTile];
      codes[k] = element<Block>(row, kState + k, start);
      most[k] = Words(0);
    });
    step.begin(start);
    for (int i = 0; i < kTile; i += kWidth) {
      step.prefetch(i);  // a little at a time: a core has room for some ten lines under way
      Floats x[kMaxStates];
      each_state<Rule, kUsed>([&]<class Block>(auto k, Block) {
        x[k] = Block(scales[k]).decode(load_ints(static_cast<const typename Block::Stored*>(codes[k]) + i));
      });
      step.step(i, x);
      each_state<Rule, kUsed>([&]<class Block>(auto k, Block) {
        store(values[k] + i, x[k]);
        most[k] = larger(most[k], as_unsigned(Block::magnitude(x[k])));
      });
    }
    each_state<Rule, kUsed>([&]<class Block>(auto k, Block) {
      prefetch(row, kState + k, start + kTile, kTile);
      row.scales[k][start / kTile] = scales[k] = Block::scale_for(largest(most[k]));
    });
    const uint32_t turn = tile_turn(scalars.turn, start);
    for (int i = 0; i < kTile; i += kWidth) {
      const Words turns = turns_from(turn, i);
      each_state<Rule, kUsed>([&]<class Block>(auto k, Block) {
        store_ints(static_cast<typename Block::Stored*>(codes[k]) + i,
                   Block(scales[k]).encode(load<Floats>(values[k] + i), turns));
      });
    }
  }
  return start;
}

}  // namespace genopt::GENOPT_CAPABILITY
