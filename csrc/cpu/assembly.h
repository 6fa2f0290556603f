// Load, join, rule, part, round, average: all that a step does to elements of one row, some at a time. What the
// operands are stored as is a choice of types here; in_place.h, coded.h and buffered.h go over a row's tiles with it.
#pragma once

#include <type_traits>

#include "prefetch.h"
#include "values.h"

namespace genopt::GENOPT_CAPABILITY {

// A tile's values of type T, in a buffer or in place (TileOperand), of a parameter of any dtype.
template <class T>
struct Buffered {
  using Stored = T;
};

// What storing x as `rounded` leaves over: nothing of infinity.
template <class V>
GENOPT_INLINE V rest_of(V x, V rounded) {
  return choose(rounded - rounded == V(0), x - rounded, V(0));
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
  visit_used(std::integral_constant<int, 3>{});
}

// Parameter and gradient are stored with the codec Param, states are given and taken as values. kHasExtra: whether the
// row may keep its parameter more precisely.
template <class Rule, unsigned kUsed, class T, class Param, bool kHasExtra>
class Assembly {
 public:
  using V = ValuesOf<T>;

  GENOPT_INLINE Assembly(const Scalars<Rule, T>& scalars, const Row& row)
      : scalars_(scaled(scalars, row)),
        plain_(scalars_.around.is_plain()),
        random_(row.unbiased >> kParam & 1),
        row_(row) {
  }
  // Whether a row's operands but for its states can be stepped where they lie.
  static bool takes(const Row& row) {
    if (!is_direct<Param>(row, kParam) || !is_direct<Param>(row, kGrad)) return false;
    if (is_used(kUsed, kAverage) && !is_direct<Wide>(row, kAverage)) return false;
    if (!kHasExtra) return row.extra == Extra::kNone;
    return row.extra == Extra::kMaster ? is_direct<Float32>(row, kExtra) : is_direct<Param>(row, kExtra);
  }

  // Goes to the whole tile that begins at element `start`, where it lies.
  GENOPT_INLINE void begin(int64_t start, int64_t stop) {
    prefetcher_.begin(start, stop);
    begin(start, [&]<class Codec>(int operand, Codec) { return element<Codec>(row_, operand, start); });
  }
  // Goes to a tile whose operands are elsewhere: at(operand, codec).
  template <class At>
  GENOPT_INLINE void begin(int64_t start, At at) {
    p_ = at(kParam, Param{});
    g_ = at(kGrad, Param{});
    master_ = row_.extra == Extra::kMaster ? at(kExtra, Wide{}) : nullptr;
    rest_ = row_.extra == Extra::kCompensation ? at(kExtra, Param{}) : nullptr;
    average_ = is_used(kUsed, kAverage) || kIsBuffered ? at(kAverage, Wide{}) : nullptr;
    key_ = tile_key(scalars_.random, row_.place_of(start));
  }
  const Prefetcher& prefetcher() const {
    return prefetcher_;
  }
  GENOPT_INLINE void prefetch_operands(int64_t i) const {
    prefetcher_.prefetch(p_, i);
    prefetcher_.prefetch(g_, i);
    if (kHasExtra && master_) prefetcher_.prefetch(master_, i);
    if (kHasExtra && rest_) prefetcher_.prefetch(rest_, i);
    if (is_used(kUsed, kAverage)) prefetcher_.prefetch(average_, i);
  }
  // Elements of the tile from i on; `states`: theirs.
  GENOPT_INLINE void step(int64_t i, V (&states)[kMaxStates]) const {
    V p = kHasExtra && master_ ? load_values<Wide>(master_ + i) : load_values<Param>(p_ + i);
    if (kHasExtra && rest_) p = p + load_values<Param>(rest_ + i);
    V g = load_values<Param>(g_ + i);
    if (!plain_) g = scalars_.around.gradient(g);
    scalars_.update.template apply<kOfRule>(p, g, states[0], states[1], states[2], states[3]);
    if (kHasExtra && master_) store_values<Wide>(master_ + i, p);
    const V rounded = store_param(i, p);
    if (kHasExtra && rest_) store_values<Param>(rest_ + i, rest_of(p, rounded));
    if constexpr (is_used(kUsed, kAverage))
      store_values<Wide>(average_ + i,
                         scalars_.around.average(load_values<Wide>(average_ + i), kHasExtra && master_ ? p : rounded));
  }

 private:
  using Wide = Values<T>;
  static constexpr bool kIsBuffered = std::is_same_v<Param, Buffered<T>>;
  static constexpr unsigned kOfRule = kUsed & ((kWithAverage - 1) | kMayBeCautious);

  static GENOPT_INLINE Scalars<Rule, T> scaled(Scalars<Rule, T> scalars, const Row& row) {
    scalars.around.factor *= static_cast<T>(row.factor);
    return scalars;
  }
  // Returns the parameter as its dtype has it, where that is asked for.
  GENOPT_INLINE V store_param(int64_t i, V& p) const {
    constexpr bool kMayRound = sizeof(T) == 4 && !std::is_same_v<Param, Float32>;
    if constexpr (kMayRound)
      if (random_) p = round_by(p, random_bits(key_ + static_cast<uint32_t>(i), count_up()));
    if constexpr (kMayRound && kIsBuffered)
      if (rest_ || average_)  // that is averaged after the tile
        return store_values<Wide>(p_ + i, is_bfloat16()  ? BFloat16::nearest(p)
                                          : is_float16() ? Float16::nearest(p)
                                                         : p);
    return store_values<Param>(p_ + i, p);
  }
  GENOPT_INLINE V round_by(V p, Words bits) const {
    if constexpr (!kIsBuffered) {
      return Param::round_by(p, bits);
    } else {
      return genopt::round_by(row_.dtype[kParam], p, bits);
    }
  }
  bool is_bfloat16() const {
    return row_.dtype[kParam] == DType::kBFloat16;
  }
  bool is_float16() const {
    return row_.dtype[kParam] == DType::kFloat16;
  }

  const Scalars<Rule, T> scalars_;
  const bool plain_, random_;
  const Row& row_;
  Prefetcher prefetcher_;
  typename Param::Stored *p_, *rest_;
  T *master_, *average_;
  const typename Param::Stored* g_;
  uint32_t key_;
};

}  // namespace genopt::GENOPT_CAPABILITY
