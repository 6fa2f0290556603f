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
template <class T, class Codec, unsigned kUsed, class Update, class Stored = typename Codec::Stored>
__attribute__((noinline)) void apply(const Update& shared, Stored* p, const Stored* g, Stored* s0, Stored* s1,
                                     Stored* s2, int64_t count) {
  constexpr bool kHas0 = (kUsed & 1) != 0, kHas1 = (kUsed & 2) != 0, kHas2 = (kUsed & 4) != 0;
  const auto load = [](Stored x) { return Codec::template decode<T>(x); };
  const Update update = shared;  // a copy, which no store below can change
  count &= -kLanes;              // tells the compiler that there is no tail
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    T param = load(p[i]), x0 = kHas0 ? load(s0[i]) : T(0), x1 = kHas1 ? load(s1[i]) : T(0),
      x2 = kHas2 ? load(s2[i]) : T(0);
    update.template apply<kUsed>(param, load(g[i]), x0, x1, x2);
    p[i] = Codec::encode(param);
    if constexpr (kHas0) s0[i] = Codec::encode(x0);
    if constexpr (kHas1) s1[i] = Codec::encode(x1);
    if constexpr (kHas2) s2[i] = Codec::encode(x2);
  }
}

// One operand of one tile, as values of the compute type: in place where it is stored so, else in a buffer.
template <class T>
class TileOperand {
 public:
  T* load(const Row& row, int operand, int64_t start, int count, int padded) {
    dtype_ = row.dtype[operand];
    count_ = count;
    strides_ = row.layout && !row.layout->strides[operand].empty() ? &row.layout->strides[operand] : nullptr;
    base_ = static_cast<char*>(row.data[operand]);
    in_place_ = false;
    if (strides_) {
      locate(row.layout->sizes, *strides_, start, count, offsets_);
      with_codec(dtype_, [this](auto codec) {
        using Codec = decltype(codec);
        for (int i = 0; i < count_; ++i)
          buffer_[i] = Codec::template decode<T>(peek<Codec>(base_ + offsets_[i] * sizeof(typename Codec::Stored)));
      });
    } else {
      base_ += start * size_of(dtype_);
      in_place_ = dtype_ == kComputeDType<T> && count == padded && reinterpret_cast<uintptr_t>(base_) % alignof(T) == 0;
      if (in_place_) return reinterpret_cast<T*>(base_);
      with_codec(dtype_, [this](auto codec) { decode<decltype(codec)>(base_, count_, buffer_); });
    }
    std::fill(buffer_ + count, buffer_ + padded, T(0));
    return buffer_;
  }

  void store() {
    if (in_place_) return;
    if (!strides_) {
      with_codec(dtype_, [this](auto codec) { encode<decltype(codec)>(buffer_, count_, base_); });
      return;
    }
    with_codec(dtype_, [this](auto codec) {
      using Codec = decltype(codec);
      for (int i = 0; i < count_; ++i)
        poke<Codec>(base_ + offsets_[i] * sizeof(typename Codec::Stored), Codec::encode(buffer_[i]));
    });
  }

 private:
  alignas(64) T buffer_[kTile];
  int64_t offsets_[kTile];
  char* base_;
  const std::vector<int64_t>* strides_;
  DType dtype_;
  int count_;
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

// Whether all operands in use lie dense and aligned, stored with one codec.
template <class Codec, unsigned kUsed>
bool is_direct(const Row& row) {
  if (row.layout) return false;
  bool direct = true;
  for (int k = 0; k < kOperands; ++k)
    if (k < kState || (kUsed >> (k - kState) & 1))
      direct = direct && row.dtype[k] == Codec::kDType &&
               reinterpret_cast<uintptr_t>(row.data[k]) % sizeof(typename Codec::Stored) == 0;
  return direct;
}

// Runs whole vectors from element `start` on in memory, without buffers, and returns where it ended.
template <class Codec, class T, unsigned kUsed, class Update>
int64_t run_direct(const Update& update, const Row& row, int64_t start, int64_t stop) {
  if (!is_direct<Codec, kUsed>(row)) return start;
  const int64_t count = (stop - start) & -int64_t{kLanes};
  apply<T, Codec, kUsed>(update, element<Codec>(row, kParam, start), element<Codec>(row, kGrad, start),
                         element<Codec>(row, kState, start), element<Codec>(row, kState + 1, start),
                         element<Codec>(row, kState + 2, start), count);
  return start + count;
}

template <class Rule, unsigned kUsed, class T>
void walk(const void* storage, const Row& row, int64_t begin, int64_t end) {
  using Values = std::conditional_t<sizeof(T) == 8, Float64, Float32>;
  const auto& update = *static_cast<const typename Rule::template Update<T>*>(storage);
  const int64_t stop = std::min(end * kTile, row.numel);
  // The usual cases first: all in the compute type, or all bf16.
  int64_t start = run_direct<Values, T, kUsed>(update, row, begin * kTile, stop);
  if constexpr (sizeof(T) == 4) start = run_direct<BFloat16, T, kUsed>(update, row, start, stop);
  if (start == stop) return;

  TileOperand<T> operands[kOperands];
  for (; start < stop; start += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, stop - start));
    const int padded = (count + kLanes - 1) & -kLanes;
    T* values[kOperands] = {};
    for (int k = 0; k < kOperands; ++k) {
      if (start + kTile < stop) prefetch(row, k, start + kTile, kTile);
      if (k < kState || (kUsed >> (k - kState) & 1)) values[k] = operands[k].load(row, k, start, count, padded);
    }
    apply<T, Values, kUsed>(update, values[kParam], values[kGrad], values[kState], values[kState + 1],
                            values[kState + 2], padded);
    for (int k = 0; k < kOperands; ++k)
      if (k != kGrad && values[k]) operands[k].store();
  }
}

template <class Rule, unsigned... kMasks>
void fill(std::array<std::array<TileKernel, 2>, 1 << kMaxStates>& table, StateMasks<kMasks...>) {
  ((table[kMasks] = {walk<Rule, kMasks, float>, walk<Rule, kMasks, double>}), ...);
}

const KernelTable& kernel_table() {
  static const KernelTable table = [] {
    KernelTable kernels{};
    for_each_rule([&]<class Rule, int kIndex>() { fill<Rule>(kernels[kIndex], typename Rule::Masks{}); });
    return kernels;
  }();
  return table;
}

}  // namespace genopt::GENOPT_CAPABILITY
