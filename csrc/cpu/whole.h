// The usual rows without buffers: operands that lie dense and are stored as a rule computes, or as vectors can be made
// of them. The rest is walk.h's.
#pragma once

#include <type_traits>

#include "operand.h"

namespace genopt::GENOPT_CAPABILITY {

// The rule over `count` elements, a multiple of kLanes, of operands stored as T.
template <class T, unsigned kUsed, class Scalars>
__attribute__((noinline)) void apply(const Scalars& shared, T* p, const T* g, T* s0, T* s1, T* s2, T* average,
                                     int64_t count) {
  constexpr bool kHas0 = is_used(kUsed, kState), kHas1 = is_used(kUsed, kState + 1), kHas2 = is_used(kUsed, kState + 2),
                 kHasAverage = is_used(kUsed, kAverage);
  const Scalars scalars = shared;  // a copy, which no store below can change
  count &= -kLanes;                // tells the compiler that there is no tail
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    T param = p[i], x0 = kHas0 ? s0[i] : T(0), x1 = kHas1 ? s1[i] : T(0), x2 = kHas2 ? s2[i] : T(0);
    scalars.update.template apply<kUsed % kWithAverage>(param, scalars.around.gradient(g[i]), x0, x1, x2);
    p[i] = param;
    if constexpr (kHas0) s0[i] = x0;
    if constexpr (kHas1) s1[i] = x1;
    if constexpr (kHas2) s2[i] = x2;
    if constexpr (kHasAverage) average[i] = scalars.around.average(average[i], param);
  }
}

template <class T>
using Values = std::conditional_t<sizeof(T) == 8, Float64, Float32>;

// Runs whole vectors from element `start` on in memory, without buffers, and returns where it ended.
template <class T, unsigned kUsed, class Scalars>
int64_t run_direct(const Scalars& scalars, const Row& row, int64_t start, int64_t stop) {
  using Codec = Values<T>;
  for (int k = 0; k < kOperands; ++k)
    if (is_used(kUsed, k) && !is_direct<Codec>(row, k)) return start;
  const int64_t count = (stop - start) & -int64_t{kLanes};
  const auto at = [&](int operand) { return element<Codec>(row, operand, start); };
  apply<T, kUsed>(scalars, at(kParam), at(kGrad), at(kState), at(kState + 1), at(kState + 2), at(kAverage), count);
  return start + count;
}

// What storing x as `rounded` leaves over: nothing of infinity.
template <class V>
GENOPT_INLINE V rest_of(V x, V rounded) {
  return choose(rounded - rounded == V(0), x - rounded, V(0));
}

template <class Codec>
GENOPT_INLINE Floats load_values(const typename Codec::Stored* from) {
  if constexpr (std::is_same_v<Codec, BFloat16>) return float_of(load_ints(from) << 16);
  return load<Floats>(from);
}
// Returns what is stored.
template <class Codec>
GENOPT_INLINE Floats store_values(typename Codec::Stored* to, Floats x) {
  if constexpr (std::is_same_v<Codec, BFloat16>) {
    const Words bits = BFloat16::encode_bits(x);
    store_ints(to, as_signed(bits));
    return float_of(bits << 16);
  } else {
    store(to, x);
    return x;
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

// While a tile is stepped, a later one of the row is asked for, a line or less with each vector: a core has room for
// some ten lines under way, and its own prefetchers stop at the end of a page.
class Ahead {
 public:
  // For the tile at `start` of those that end at `stop`.
  GENOPT_INLINE void begin(int64_t start, int64_t stop) {
    distance_ = stop - start > kTilesAhead * kTile ? kTilesAhead * kTile : 0;  // else what is there anyway
  }
  // For the element i of the tile. Narrow operands come slowly enough to be left to the processor.
  template <class Stored>
  GENOPT_INLINE void ask(const Stored* tile, int i) const {
    if constexpr (sizeof(Stored) == 4) __builtin_prefetch(tile + distance_ + i);
  }

 private:
  static constexpr int kTilesAhead = 2;
  int distance_ = 0;
};

// What whole tiles of a dense row go through in registers, a vector of elements at a time: parameter and gradient
// stored with the codec Param, and what a parameter of 16 bits has beside it; states given and taken as values.
template <class Rule, unsigned kUsed, class Param, bool kHasExtra>
class VectorStep {
 public:
  GENOPT_INLINE VectorStep(const Scalars<Rule, float>& scalars, const Row& row)
      : scalars_(scalars), plain_(scalars.around.is_plain()), random_(row.unbiased >> kParam & 1), row_(row) {
  }
  static bool takes(const Row& row) {
    if (!is_direct<Param>(row, kParam) || !is_direct<Param>(row, kGrad)) return false;
    if (is_used(kUsed, kAverage) && !is_direct<Float32>(row, kAverage)) return false;
    if (!kHasExtra) return row.extra == Extra::kNone;
    return row.extra == Extra::kMaster ? is_direct<Float32>(row, kExtra) : is_direct<Param>(row, kExtra);
  }

  // Goes to the tile that begins at element `start`.
  GENOPT_INLINE void begin(int64_t start, int64_t stop) {
    ahead_.begin(start, stop);
    p_ = element<Param>(row_, kParam, start);
    g_ = element<Param>(row_, kGrad, start);
    master_ = row_.extra == Extra::kMaster ? element<Float32>(row_, kExtra, start) : nullptr;
    rest_ = row_.extra == Extra::kCompensation ? element<Param>(row_, kExtra, start) : nullptr;
    average_ = is_used(kUsed, kAverage) ? element<Float32>(row_, kAverage, start) : nullptr;
    key_ = tile_key(scalars_.random, start);
  }
  const Ahead& ahead() const {
    return ahead_;
  }
  // Elements of the tile from i on; `states`: theirs.
  GENOPT_INLINE void step(int i, Floats (&states)[kMaxStates]) const {
    ahead_.ask(p_, i);
    ahead_.ask(g_, i);
    if (kHasExtra && master_) ahead_.ask(master_, i);
    if (kHasExtra && rest_) ahead_.ask(rest_, i);
    if (is_used(kUsed, kAverage)) ahead_.ask(average_, i);
    Floats p = kHasExtra && master_ ? load<Floats>(master_ + i) : load_values<Param>(p_ + i);
    if (kHasExtra && rest_) p = p + load_values<Param>(rest_ + i);
    Floats g = load_values<Param>(g_ + i);
    if (!plain_) g = scalars_.around.gradient(g);
    scalars_.update.template apply<kUsed % kWithAverage>(p, g, states[0], states[1], states[2]);
    if (kHasExtra && master_) store(master_ + i, p);
    if constexpr (!std::is_same_v<Param, Float32>)
      if (random_) p = Param::round_by(p, random_bits(key_ + i, count_up()));
    const Floats rounded = store_values<Param>(p_ + i, p);
    if (kHasExtra && rest_) store_values<Param>(rest_ + i, rest_of(p, rounded));
    if constexpr (is_used(kUsed, kAverage))
      store(average_ + i, scalars_.around.average(load<Floats>(average_ + i), rounded));
  }

 private:
  const Scalars<Rule, float> scalars_;
  const bool plain_, random_;
  const Row& row_;
  Ahead ahead_;
  typename Param::Stored *p_, *rest_;
  float *master_, *average_;
  const typename Param::Stored* g_;
  uint32_t key_;
};

// Whole tiles whose states are all stored with the codec State. Returns where it ended.
template <class Rule, unsigned kUsed, class Param, class State, bool kHasExtra>
__attribute__((noinline)) int64_t run_plain(const Scalars<Rule, float>& scalars, const Row& row, int64_t start,
                                            int64_t stop) {
  bool fits = VectorStep<Rule, kUsed, Param, kHasExtra>::takes(row);
  each_state<Rule, kUsed>([&](auto k, auto) { fits = fits && is_direct<State>(row, kState + k); });
  if (!fits) return start;
  VectorStep<Rule, kUsed, Param, kHasExtra> step(scalars, row);
  const bool by_threshold = row.unbiased >> kState;
  for (; stop - start >= kTile; start += kTile) {
    const uint32_t phase = tile_phase(scalars.phase, start);
    typename State::Stored* states[kMaxStates];
    each_state<Rule, kUsed>([&](auto k, auto) { states[k] = element<State>(row, kState + k, start); });
    step.begin(start, stop);
    for (int i = 0; i < kTile; i += kWidth) {
      Floats x[kMaxStates];
      each_state<Rule, kUsed>([&](auto k, auto) {
        step.ahead().ask(states[k], i);
        x[k] = load_values<State>(states[k] + i);
      });
      step.step(i, x);
      each_state<Rule, kUsed>([&](auto k, auto) {
        if constexpr (!std::is_same_v<State, Float32>)
          if (by_threshold) x[k] = State::round_by(x[k], thresholds_from(phase, i));
        store_values<State>(states[k] + i, x[k]);
      });
    }
  }
  return start;
}

// Whole tiles whose states are all in codes. Returns where it ended.
template <class Rule, unsigned kUsed, class Param, bool kHasExtra>
__attribute__((noinline)) int64_t run_coded(const Scalars<Rule, float>& scalars, const Row& row, int64_t start,
                                            int64_t stop) {
  bool fits = VectorStep<Rule, kUsed, Param, kHasExtra>::takes(row);
  each_state<Rule, kUsed>([&]<class Block>(auto k, Block) { fits = fits && is_direct<Block>(row, kState + k); });
  if (!fits) return start;
  VectorStep<Rule, kUsed, Param, kHasExtra> step(scalars, row);
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
    step.begin(start, stop);
    for (int i = 0; i < kTile; i += kWidth) {
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
    const uint32_t phase = tile_phase(scalars.phase, start);
    for (int i = 0; i < kTile; i += kWidth) {
      const Words thresholds = thresholds_from(phase, i);
      each_state<Rule, kUsed>([&]<class Block>(auto k, Block) {
        store_ints(static_cast<typename Block::Stored*>(codes[k]) + i,
                   Block(scales[k]).encode(load<Floats>(values[k] + i), thresholds));
      });
    }
  }
  return start;
}

// Whole tiles of which something is not fp32, if there is a loop for them. Returns where it ended.
template <class Rule, unsigned kUsed>
int64_t run_narrow(const Scalars<Rule, float>& scalars, const Row& row, int64_t start, int64_t stop) {
  const auto run = [&]<bool kHasExtra>(std::bool_constant<kHasExtra>) {
    start = run_plain<Rule, kUsed, BFloat16, BFloat16, kHasExtra>(scalars, row, start, stop);
    if constexpr (kUsed != 0) {
      start = run_plain<Rule, kUsed, BFloat16, Float32, kHasExtra>(scalars, row, start, stop);
      start = run_coded<Rule, kUsed, BFloat16, kHasExtra>(scalars, row, start, stop);
    }
  };
  if (row.extra != Extra::kNone) {
    run(std::true_type{});
    return start;
  }
  run(std::false_type{});
  if constexpr (kUsed != 0) {
    start = run_plain<Rule, kUsed, Float32, BFloat16, false>(scalars, row, start, stop);
    start = run_coded<Rule, kUsed, Float32, false>(scalars, row, start, stop);
  }
  return start;
}

// Whole tiles that one of the loops above takes. Returns where it ended.
template <class Rule, unsigned kUsed>
int64_t run_whole(const Scalars<Rule, float>& scalars, const Row& row, int64_t start, int64_t stop) {
  if (stop - start < kTile) return start;
  start = run_plain<Rule, kUsed, Float32, Float32, false>(scalars, row, start, stop);
  if constexpr (kUsed < kWithAverage)
    if (stop - start >= kTile) start = run_narrow<Rule, kUsed>(scalars, row, start, stop);
  return start;
}

}  // namespace genopt::GENOPT_CAPABILITY
