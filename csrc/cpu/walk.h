// How one row's tiles are walked on CPU: load into stack arrays, apply the rule, store.
// Included once by each cpu/walk_*.cpp, which sets the instruction set and GENOPT_CAPABILITY, the
// namespace that keeps the copies apart. Loops are plain C++; the compiler vectorizes them.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../plan.h"

namespace genopt::GENOPT_CAPABILITY {

// Tiles are padded to a whole number of the widest vectors, so the rule has no scalar tail.
constexpr int kLanes = 16;

template <class T>
constexpr DType kComputeDType = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// Where `count` elements from element `start` of a strided operand lie, in elements from its base.
inline void locate(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int64_t start, int count,
                   int64_t* offsets) {
  constexpr int kMaxDims = 64;  // torch's own limit
  int64_t index[kMaxDims];
  const int dims = static_cast<int>(sizes.size());
  int64_t offset = 0, rest = start;
  for (int d = dims - 1; d >= 0; --d) {
    index[d] = rest % sizes[d];
    rest /= sizes[d];
    offset += index[d] * strides[d];
  }
  for (int i = 0; i < count; ++i) {
    offsets[i] = offset;
    for (int d = dims - 1; d >= 0; --d) {
      offset += strides[d];
      if (++index[d] < sizes[d]) break;
      offset -= strides[d] * sizes[d];
      index[d] = 0;
    }
  }
}

template <class Codec>
GENOPT_INLINE typename Codec::Stored peek(const char* address) {
  typename Codec::Stored value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

template <class Codec>
GENOPT_INLINE void poke(char* address, typename Codec::Stored value) {
  std::memcpy(address, &value, sizeof value);
}

// The loops stand in functions of their own, not inlined: the compiler then vectorizes each of them.

template <class Codec, class T>
__attribute__((noinline)) void decode(const char* from, int count, T* to) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i)
    to[i] = Codec::template decode<T>(peek<Codec>(from + i * sizeof(typename Codec::Stored)));
}

template <class Codec, class T>
__attribute__((noinline)) void encode(const T* from, int count, char* to) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) poke<Codec>(to + i * sizeof(typename Codec::Stored), Codec::encode(from[i]));
}

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

// The average alone, after p has been rounded as it is stored.
template <class T>
__attribute__((noinline)) void apply_average(const Around<T>& shared, const T* p, T* average, int count) {
  const Around<T> around = shared;
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) average[i] = around.average(average[i], p[i]);
}

template <class Block>
__attribute__((noinline)) void decode_block(const Block& shared, const typename Block::Stored* codes, int count,
                                            float* to) {
  const Block block = shared;
  // First all to the size of a float: a loop over elements of one size vectorizes well.
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) to[i] = float_of(static_cast<uint32_t>(static_cast<int32_t>(codes[i])));
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) to[i] = block.decode(static_cast<int32_t>(bits_of(to[i])));
}

// Stores values as codes and returns their scale. `turn`: the tile's.
template <class Block>
__attribute__((noinline)) float encode_block(const float* from, int count, uint32_t turn,
                                             typename Block::Stored* codes) {
  uint32_t largest = 0;
  for (int i = 0; i < count; ++i) largest = std::max(largest, Block::magnitude(from[i]));
  const float scale = Block::scale_for(largest);
  const Block block(scale);
#pragma GCC ivdep
  for (int i = 0; i < count; ++i)
    codes[i] = static_cast<typename Block::Stored>(block.encode(from[i], turn_of(turn, i)));
  return scale;
}

// Rounds values to one of the neighbours that a 16-bit dtype has; `bits`: 32 for each element.
template <class Codec, class Bits>
__attribute__((noinline)) void round_by(Bits bits, int count, float* values) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) values[i] = Codec::round_by(values[i], bits(i));
}

// One operand of one tile, as values of the compute type: in place where it is stored so, else in a buffer.
template <class T>
class TileOperand {
 public:
  // Where the values are, before load() reads them or after another hand has written them.
  T* place(const Row& row, int operand, int64_t start, int count, int padded) {
    row_ = &row;
    operand_ = operand;
    dtype_ = row.dtype[operand];
    start_ = start;
    count_ = count;
    strides_ = row.layout && !row.layout->strides[operand].empty() ? &row.layout->strides[operand] : nullptr;
    base_ = static_cast<char*>(row.data[operand]);
    in_place_ = false;
    if (strides_) {
      locate(row.layout->sizes, *strides_, start, count, offsets_);
      return buffer_;
    }
    base_ += start * size_of(dtype_);
    in_place_ = dtype_ == kComputeDType<T> && count == padded && reinterpret_cast<uintptr_t>(base_) % alignof(T) == 0;
    return in_place_ ? reinterpret_cast<T*>(base_) : buffer_;
  }

  T* load(const Row& row, int operand, int64_t start, int count, int padded) {
    T* const values = place(row, operand, start, count, padded);
    if (in_place_) return values;
    if (is_block(dtype_)) {
      load_block();
    } else if (strides_) {
      with_codec(dtype_, [this](auto codec) {
        using Codec = decltype(codec);
        for (int i = 0; i < count_; ++i)
          buffer_[i] = Codec::template decode<T>(peek<Codec>(base_ + offsets_[i] * sizeof(typename Codec::Stored)));
      });
    } else {
      with_codec(dtype_, [this](auto codec) { decode<decltype(codec)>(base_, count_, buffer_); });
    }
    std::fill(buffer_ + count, buffer_ + padded, T(0));
    return buffer_;
  }

  // `keys`: Scalars, for what is not rounded to the nearest.
  template <class Keys>
  void store(const Keys& keys) {
    if (in_place_) return;
    const uint32_t key = tile_key(keys.random, start_), turn = tile_turn(keys.turn, start_);
    if (is_block(dtype_)) {
      store_block(turn);
      return;
    }
    with_codec(dtype_, [&]<class Codec>(Codec) {
      if constexpr (sizeof(T) == 4 && sizeof(typename Codec::Stored) == 2) {
        const bool unbiased = row_->unbiased >> operand_ & 1;
        if (unbiased && operand_ == kParam)
          round_by<Codec>([key](int i) { return random_bits(key, i); }, count_, buffer_);
        if (unbiased && operand_ != kParam)
          round_by<Codec>([turn](int i) { return turn_of(turn, i); }, count_, buffer_);
      }
      if (!strides_) {
        encode<Codec>(buffer_, count_, base_);
        return;
      }
      for (int i = 0; i < count_; ++i)
        poke<Codec>(base_ + offsets_[i] * sizeof(typename Codec::Stored), Codec::encode(buffer_[i]));
    });
  }

 private:
  float& scale() const {
    return row_->scales[operand_ - kState][start_ / kTile];
  }
  // Codes lie dense, and only beside parameters that compute in float.
  void load_block() {
    if constexpr (sizeof(T) == 4)
      with_block(dtype_, scale(), [this]<class Block>(const Block& block) {
        decode_block(block, reinterpret_cast<const typename Block::Stored*>(base_), count_, buffer_);
      });
  }
  void store_block(uint32_t turn) {
    if constexpr (sizeof(T) == 4)
      with_block(dtype_, 0, [&]<class Block>(const Block&) {
        scale() = encode_block<Block>(buffer_, count_, turn, reinterpret_cast<typename Block::Stored*>(base_));
      });
  }

  alignas(64) T buffer_[kTile];
  int64_t offsets_[kTile];
  const Row* row_;
  char* base_;
  const std::vector<int64_t>* strides_;
  int64_t start_;
  int operand_, count_;
  DType dtype_;
  bool in_place_;
};

// Asks for an operand's memory from element `start` on. Loading, computing and storing a tile take turns;
// with the next tile under way the memory is not idle while the rule computes.
inline void prefetch(const Row& row, int operand, int64_t start, int count) {
  if (!row.data[operand] || (row.layout && !row.layout->strides[operand].empty())) return;
  const int size = size_of(row.dtype[operand]);
  const char* const from = static_cast<const char*>(row.data[operand]) + start * size;
  for (int byte = 0; byte < count * size; byte += 64) __builtin_prefetch(from + byte);
}

template <class Codec>
typename Codec::Stored* element(const Row& row, int operand, int64_t i) {
  return row.data[operand] ? static_cast<typename Codec::Stored*>(row.data[operand]) + i : nullptr;
}

// Whether an operand lies dense and aligned, stored with a codec.
template <class Codec>
bool is_direct(const Row& row, int operand) {
  return !row.layout && row.dtype[operand] == Codec::kDType &&
         reinterpret_cast<uintptr_t>(row.data[operand]) % sizeof(typename Codec::Stored) == 0;
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

// Whole tiles of rows with parameter and gradient in float and all states in codes; returns where it ended.
template <unsigned kUsed, class Scalars>
int64_t run_coded(const Scalars& scalars, const Row& row, int64_t start, int64_t stop) {
  bool fits = is_direct<Float32>(row, kParam) && is_direct<Float32>(row, kGrad);
  for (int k = kState; k < kAverage; ++k) fits = fits && (!is_used(kUsed, k) || is_block(row.dtype[k]));
  if (!fits) return start;
  alignas(64) float values[kMaxStates][kTile];
  const auto each_state = [&](auto visit) {
    for (int k = 0; k < kMaxStates; ++k)
      if (is_used(kUsed, kState + k))
        with_block(row.dtype[kState + k], row.scales[k][start / kTile],
                   [&]<class Block>(const Block& block) { visit(k, block, element<Block>(row, kState + k, start)); });
  };
  for (; stop - start >= kTile; start += kTile) {
    // The next tile is asked for a little at a time: a core has room for some ten lines under way.
    prefetch(row, kParam, start + kTile, kTile);
    each_state([&](int k, const auto& block, auto* codes) { decode_block(block, codes, kTile, values[k]); });
    prefetch(row, kGrad, start + kTile, kTile);
    apply<float, Float32, kUsed>(scalars, element<Float32>(row, kParam, start), element<Float32>(row, kGrad, start),
                                 values[0], values[1], values[2], static_cast<float*>(nullptr), kTile);
    const uint32_t turn = tile_turn(scalars.turn, start);
    each_state([&]<class Block>(int k, const Block&, auto* codes) {
      prefetch(row, kState + k, start + kTile, kTile);
      row.scales[k][start / kTile] = encode_block<Block>(values[k], kTile, turn, codes);
    });
  }
  return start;
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
      rest[i] = rounded - rounded == T(0) ? p[i] - rounded : T(0);  // infinity leaves nothing over
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
  const bool is_plain = row.extra == Extra::kNone && !row.unbiased;
  if constexpr (!(kUsed & kRests)) {
    // The usual cases first: all in the compute type, or all bf16.
    if (is_plain) start = run_direct<Values<T>, T, kUsed>(scalars, row, start, stop);
    if constexpr (sizeof(T) == 4)
      if (is_plain) start = run_direct<BFloat16, T, kUsed>(scalars, row, start, stop);
    if constexpr (sizeof(T) == 4 && kUsed != 0 && kUsed < kWithAverage)
      if (is_plain) start = run_coded<kUsed>(scalars, row, start, stop);
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
      apply<T, Values<T>, kUsed % kWithAverage>(scalars, p, values[kGrad], values[kState], values[kState + 1],
                                                values[kState + 2], static_cast<T*>(nullptr), padded);
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
inline void zero(const Row& row, int64_t begin, int64_t end) {
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
    kernels.zero = zero;
    return kernels;
  }();
  return table;
}

}  // namespace genopt::GENOPT_CAPABILITY
