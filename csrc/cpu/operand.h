// One operand of one tile: decoded from whatever way it is stored into values of the compute type, and encoded again.
// Included (through buffered.h) by walk.h, once for each GENOPT_CAPABILITY. Plain loops stand in functions of their
// own, not inlined: the compiler then vectorizes each of them.
#pragma once

#include <algorithm>
#include <cstring>

#include "../plan/row.h"
#include "prefetch.h"
#include "values.h"

namespace genopt::GENOPT_CAPABILITY {

// Tiles are padded to a whole number of the widest vectors, so the rule has no scalar tail.
constexpr int kLanes = 16;

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

// `count` values; `to` has room for whole vectors, and codes are copied where they have not.
template <class Block>
__attribute__((noinline)) void decode_block(const Block& shared, const typename Block::Stored* codes, int count,
                                            float* to) {
  const Block block = shared;
  typename Block::Stored padded[kTile];
  if (count % kWidth) codes = std::copy(codes, codes + count, padded) - count;
  for (int i = 0; i < count; i += kWidth) store(to + i, block.decode(load_ints(codes + i)));
}

// Stores values, zeros up to a whole vector, as codes and returns their scale. `phase`: the tile's.
template <class Block>
__attribute__((noinline)) float encode_block(const float* from, int count, uint32_t phase,
                                             typename Block::Stored* codes) {
  Words most(0);
  for (int i = 0; i < count; i += kWidth) most = larger(most, as_unsigned(Block::magnitude(load<Floats>(from + i))));
  const float scale = Block::scale_for(largest(most));
  const Block block(scale);
  typename Block::Stored padded[kTile];
  auto* const to = count % kWidth ? padded : codes;
  for (int i = 0; i < count; i += kWidth)
    store_ints(to + i, block.encode(load<Floats>(from + i), thresholds_from(phase, i)));
  if (to != codes) std::copy(to, to + count, codes);
  return scale;
}

// Rounds values to one of the neighbours that a 16-bit dtype has. `phase`: the tile's.
template <class Codec>
__attribute__((noinline)) void round_by_thresholds(uint32_t phase, int count, float* values) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) values[i] = Codec::round_by(values[i], threshold_of(phase, static_cast<uint32_t>(i)));
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
    in_place_ = dtype_ == Values<T>::kDType && count == padded && reinterpret_cast<uintptr_t>(base_) % alignof(T) == 0;
    return in_place_ ? reinterpret_cast<T*>(base_) : buffer_;
  }

  T* load(const Row& row, int operand, int64_t start, int count, int padded) {
    if (row.is_factor(operand)) return load_factor(row, operand, start, count, padded);
    T* const values = place(row, operand, start, count, padded);
    if (in_place_) return values;
    if (operand >= kState && is_block(dtype_)) {
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
    const uint32_t phase = tile_phase(keys.phase, row_->place_of(start_));
    if (operand_ >= kState && is_block(dtype_)) {
      store_block(phase);
      return;
    }
    with_codec(dtype_, [&]<class Codec>(Codec) {
      if constexpr (sizeof(T) == 4 && sizeof(typename Codec::Stored) == 2) {
        // The parameter has been rounded.
        if (operand_ != kParam && row_->unbiased >> operand_ & 1) round_by_thresholds<Codec>(phase, count_, buffer_);
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
    return row_->scales[operand_ - kState][start_ / row_->tile];
  }
  // What each element of the tile has of its row or column. It is never stored.
  T* load_factor(const Row& row, int operand, int64_t start, int count, int padded) {
    in_place_ = true;
    std::fill(buffer_ + count, buffer_ + padded, T(0));
    const bool are_rows = operand == row.factors;
    const auto& [matrices, rows, columns] = row.matrices;
    const T* const numbers = static_cast<const T*>(row.data[operand]);
    const T* const divisors = static_cast<const T*>(row.divisors);
    int64_t at = start / columns, column = start % columns, matrix = at / rows, row_of_next = (matrix + 1) * rows;
    for (int i = 0; i < count; column = 0, ++at) {
      if (at == row_of_next) {
        ++matrix;
        row_of_next += rows;
      }
      const int some = static_cast<int>(std::min<int64_t>(count - i, columns - column));
      if (are_rows) {
        std::fill_n(buffer_ + i, some, numbers[at] / divisors[matrix]);
      } else {
        std::copy_n(numbers + matrix * columns + column, some, buffer_ + i);
      }
      i += some;
    }
    return buffer_;
  }
  // Codes are contiguous, and only beside parameters that compute in float.
  void load_block() {
    if constexpr (sizeof(T) == 4)
      with_block(dtype_, scale(), [this]<class Block>(const Block& block) {
        decode_block(block, reinterpret_cast<const typename Block::Stored*>(base_), count_, buffer_);
      });
  }
  void store_block(uint32_t phase) {
    // What a rule makes of padding (0 / 0, say) is no part of the tile.
    std::fill(buffer_ + count_, buffer_ + (count_ + kWidth - 1) / kWidth * kWidth, T(0));
    if constexpr (sizeof(T) == 4)
      with_block(dtype_, 0, [&]<class Block>(const Block&) {
        scale() = encode_block<Block>(buffer_, count_, phase, reinterpret_cast<typename Block::Stored*>(base_));
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

}  // namespace genopt::GENOPT_CAPABILITY
