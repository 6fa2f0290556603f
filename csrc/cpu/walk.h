// How one row's tiles are walked on CPU: load into stack arrays, apply the rule, store.
// Included once by each cpu/walk_*.cpp, which sets the instruction set and GENOPT_CAPABILITY, the
// namespace that keeps the copies apart. Loops are plain C++; the compiler vectorizes them.
#pragma once

#include <algorithm>
#include <cstring>

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

// One operand of one tile: loaded on construction, stored back by store().
template <class T>
class TileOperand {
 public:
  GENOPT_INLINE void load(const Row& row, int operand, int64_t start, int count, int padded) {
    dtype_ = row.dtype[operand];
    count_ = count;
    strides_ = row.layout && !row.layout->strides[operand].empty() ? &row.layout->strides[operand] : nullptr;
    base_ = static_cast<char*>(row.data[operand]);
    if (strides_) {
      locate(row.layout->sizes, *strides_, start, count, offsets_);
    } else {
      base_ += start * size_of(dtype_);
      const bool aligned = reinterpret_cast<uintptr_t>(base_) % alignof(T) == 0;
      if (dtype_ == kComputeDType<T> && count == padded && aligned) {
        values = reinterpret_cast<T*>(base_);  // in place: no copy, nothing to store
        return;
      }
    }
    values = buffer_;
    with_codec(dtype_, [&](auto codec) {
      using Codec = decltype(codec);
      constexpr int kSize = sizeof(typename Codec::Stored);
      if (strides_) {
        for (int i = 0; i < count; ++i)
          buffer_[i] = Codec::template decode<T>(peek<Codec>(base_ + offsets_[i] * kSize));
      } else {
        for (int i = 0; i < count; ++i) buffer_[i] = Codec::template decode<T>(peek<Codec>(base_ + i * kSize));
      }
    });
    for (int i = count; i < padded; ++i) buffer_[i] = T(0);
  }

  GENOPT_INLINE void store() {
    if (values != buffer_) return;
    with_codec(dtype_, [&](auto codec) {
      using Codec = decltype(codec);
      constexpr int kSize = sizeof(typename Codec::Stored);
      if (strides_) {
        for (int i = 0; i < count_; ++i) poke<Codec>(base_ + offsets_[i] * kSize, Codec::encode(buffer_[i]));
      } else {
        for (int i = 0; i < count_; ++i) poke<Codec>(base_ + i * kSize, Codec::encode(buffer_[i]));
      }
    });
  }

  T* values;

 private:
  alignas(64) T buffer_[kTile];
  int64_t offsets_[kTile];
  char* base_;
  const std::vector<int64_t>* strides_;
  DType dtype_;
  int count_;
};

template <class T, unsigned kUsed, class Update>
GENOPT_INLINE void apply(const Update& update, T* p, const T* g, T* const (&states)[kMaxStates], int count) {
  T *const s0 = states[0], *const s1 = states[1], *const s2 = states[2];
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {
    T param = p[i], state[kMaxStates] = {};
    if constexpr ((kUsed & 1) != 0) state[0] = s0[i];
    if constexpr ((kUsed & 2) != 0) state[1] = s1[i];
    if constexpr ((kUsed & 4) != 0) state[2] = s2[i];
    update.template apply<kUsed>(param, g[i], state);
    p[i] = param;
    if constexpr ((kUsed & 1) != 0) s0[i] = state[0];
    if constexpr ((kUsed & 2) != 0) s1[i] = state[1];
    if constexpr ((kUsed & 4) != 0) s2[i] = state[2];
  }
}

template <class Rule, unsigned kUsed, class T>
void walk(const void* storage, const Row& row, int64_t begin, int64_t end) {
  const auto update = *static_cast<const typename Rule::template Update<T>*>(storage);
  TileOperand<T> p, g, state[kMaxStates];
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t start = tile * kTile;
    const int count = static_cast<int>(std::min<int64_t>(kTile, row.numel - start));
    const int padded = (count + kLanes - 1) & ~(kLanes - 1);
    T* states[kMaxStates] = {};
    p.load(row, kParam, start, count, padded);
    g.load(row, kGrad, start, count, padded);
    for (int k = 0; k < kMaxStates; ++k) {
      if (!(kUsed >> k & 1)) continue;
      state[k].load(row, kState + k, start, count, padded);
      states[k] = state[k].values;
    }
    apply<T, kUsed>(update, p.values, g.values, states, padded);
    p.store();
    for (int k = 0; k < kMaxStates; ++k)
      if (kUsed >> k & 1) state[k].store();
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
