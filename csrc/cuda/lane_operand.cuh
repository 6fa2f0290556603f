// A lane's elements of one operand: loaded, decoded, encoded and stored. What can be accessed as pieces (tile.cuh) is;
// what can not (a short last tile, odd addresses, strides) is loaded element by element, an operand at a time. The
// arithmetic knows nothing of it.
#pragma once

#include "pieces.cuh"
#include "tile.cuh"

namespace genopt::cuda {

// Whether a row's kernels are those that compute in T.
template <class T>
__device__ bool computes_in(const DeviceRow& row) {
  return (row.dtype[kParam] == DType::kFloat64) == (sizeof(T) == 8);
}

// Elements of a row's tiles. What computes in double has neither codes nor runs that end.
template <class T>
__device__ int tile_of(const DeviceRow& row) {
  return sizeof(T) == 8 ? kTile : row.tile;
}

// Where element i of a row with a layout lies, in elements from the operand's base.
__device__ inline int64_t offset_of(const uint64_t* layout, int operand, int64_t i) {
  const int64_t dims = static_cast<int64_t>(layout[0]);
  const uint64_t *sizes = layout + 1, *strides = sizes + dims * (1 + operand);
  int64_t offset = 0;
#pragma unroll 1
  for (int64_t d = dims; d-- > 0;) {
    const int64_t size = static_cast<int64_t>(sizes[d]), next = i / size;
    offset += (i - next * size) * static_cast<int64_t>(strides[d]);
    i = next;
  }
  return offset;
}

// A tile of any row.
struct RowTile : Tile {
  const DeviceRow& row;
  const uint64_t* layout;

  // Which element of the tile is a lane's j-th.
  __device__ int element(int j) const {
    return element_of(j, lane, row.piece_bits);
  }
  __device__ float* scale(int operand) const {
    return row.scales[operand - kState] + number;
  }
};

// States may be stored in codes, where the rule computes in float.
template <class T>
__device__ constexpr bool may_be_block(int operand) {
  return sizeof(T) == 4 && operand >= kState && operand < kAverage;
}

// Elements that can not be accessed as pieces pass through here one by one, in rolled loops: unrolled for
// every dtype and operand they would be most of the program. Each thread has slots of its own.
template <class T, int kCount>
struct Slots {
  T values[kCount][kElements][kThreads];
};

// A lane's elements of one operand: as they are stored until decode(), so that the loads of all operands
// are under way before the first is waited for.
template <class T>
class LaneOperand {
 public:
  T values[kElements];

  __device__ void load(const RowTile& tile, int operand, void* data) {
    load(tile, operand, data, tile.row.dtype[operand]);
  }
  // For an operand of which only a choice is known when this is compiled: arrays of the row stay in registers.
  __device__ void load(const RowTile& tile, int operand, void* data, DType dtype) {
    dtype_ = dtype;
    is_block_ = may_be_block<T>(operand) && is_block(dtype_);
    if (is_block_) scale_ = *tile.scale(operand);
    const int size = size_of(dtype_), bytes = size << tile.row.piece_bits;
    strided_ = tile.row.strided >> operand & 1;
    base_ = static_cast<char*>(data) + (strided_ ? 0 : tile.start * size);
    // fp64 parameters with states of another dtype, and the reverse, are rare enough for the slots.
    whole_ = tile.count == kTile && !strided_ && (reinterpret_cast<uintptr_t>(base_) & (bytes - 1)) == 0 &&
             (sizeof(T) == 8 ? size == 8 : size <= 4);
    if (!whole_) return;
    if (bytes == 16) {
      load_pieces<uint4>(tile);
    } else if constexpr (sizeof(T) == 4) {
      (is_block_ && bytes == 4) ? load_pieces<uint1>(tile) : load_pieces<uint2>(tile);
    }
  }

  __device__ void load_slots(const RowTile& tile, int operand, T (*slots)[kThreads]) const {
    if (whole_) return;
#pragma unroll 1
    for (int j = 0; j < kElements; ++j) {
      const bool exists = tile.element(j) < tile.count;
      if (is_block_) {
        slots[j][threadIdx.x] = with_block(dtype_, scale_, [&]<class Block>(const Block& block) {
          return exists ? static_cast<T>(block.decode(int32_t{*address_of<Block>(tile, operand, j)})) : T(0);
        });
        continue;
      }
      slots[j][threadIdx.x] = with_codec(dtype_, [&](auto codec) {
        using Codec = decltype(codec);
        return exists ? Codec::template decode<T>(*address_of<Codec>(tile, operand, j)) : T(0);
      });
    }
  }

  __device__ void decode(const T (*slots)[kThreads]) {
    if (!whole_) {
#pragma unroll
      for (int j = 0; j < kElements; ++j) values[j] = slots[j][threadIdx.x];
      return;
    }
    if constexpr (sizeof(T) == 4)
      if (is_block_) {
        with_block(dtype_, scale_, [&]<class Block>(const Block& block) {
#pragma unroll
          for (int j = 0; j < kElements; ++j)
            values[j] = block.decode(int32_t{value_in<typename Block::Stored>(raw_, j)});
        });
        return;
      }
    with_fast_codec([&](auto codec) {
      using Codec = decltype(codec);
#pragma unroll
      for (int j = 0; j < kElements; ++j)
        values[j] = Codec::template decode<T>(value_in<typename Codec::Stored>(raw_, j));
    });
  }

  // Rounds the values to one of the neighbours that a 16-bit dtype has. `bits(i)`: 32 for element i of the tile.
  template <class Bits>
  __device__ void round_by(const RowTile& tile, Bits bits) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int j = 0; j < kElements; ++j) values[j] = genopt::round_by(dtype_, values[j], bits(tile.element(j)));
    }
  }

  // Finds the scale of a tile of codes, and encodes what goes out in pieces. All lanes call it. `phase`: the tile's.
  __device__ void encode_block(const RowTile& tile, int operand, uint32_t phase) {
    if (!is_block_) return;
    uint32_t largest = 0;
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const uint32_t magnitude = static_cast<uint32_t>(Int8::magnitude(values[j]));
      if ((whole_ || tile.element(j) < tile.count) && magnitude > largest) largest = magnitude;
    }
    largest = __reduce_max_sync(~0u, largest);
    with_block(dtype_, 0.0f, [&]<class Block>(const Block&) {
      scale_ = Block::scale_for(largest);
      if (!whole_) return;
      const Block block(scale_);
      raw_[0] = raw_[1] = 0;
#pragma unroll
      for (int j = 0; j < kElements; ++j)
        raw_[j / 4] |= static_cast<uint32_t>(
                           block.encode(values[j], threshold_of(phase, static_cast<uint32_t>(tile.element(j)))) & 0xff)
                       << (j % 4 * 8);
    });
    __syncwarp();  // all lanes have read the one before
    if (tile.lane == 0) *tile.scale(operand) = scale_;
  }

  // For an operand that is stored and not loaded.
  __device__ void point_to(const RowTile& tile, int operand, void* data) {
    load(tile, operand, data);
  }

  __device__ void store(const RowTile& tile, T (*slots)[kThreads]) {
    if (!whole_) {
#pragma unroll
      for (int j = 0; j < kElements; ++j) slots[j][threadIdx.x] = values[j];
      return;
    }
    if (!is_block_)
      with_fast_codec([&](auto codec) {
#pragma unroll
        for (int j = 0; j < kElements; ++j) set_value(raw_, j, decltype(codec)::encode(values[j]));
      });
    const int bytes = size_of(dtype_) << tile.row.piece_bits;
    if (bytes == 16) {
      store_pieces<uint4>(tile);
    } else if constexpr (sizeof(T) == 4) {
      (is_block_ && bytes == 4) ? store_pieces<uint1>(tile) : store_pieces<uint2>(tile);
    }
  }

  __device__ void store_slots(const RowTile& tile, int operand, const T (*slots)[kThreads], uint32_t phase = 0) const {
    if (whole_) return;
#pragma unroll 1
    for (int j = 0; j < kElements; ++j) {
      if (tile.element(j) >= tile.count) continue;
      const T value = slots[j][threadIdx.x];
      if (is_block_) {
        with_block(dtype_, scale_, [&]<class Block>(const Block& block) {
          *address_of<Block>(tile, operand, j) = static_cast<typename Block::Stored>(
              block.encode(static_cast<float>(value), threshold_of(phase, static_cast<uint32_t>(tile.element(j)))));
        });
        continue;
      }
      with_codec(dtype_, [&](auto codec) {
        using Codec = decltype(codec);
        *address_of<Codec>(tile, operand, j) = Codec::encode(value);
      });
    }
  }

 private:
  static constexpr int kWords = kElements * sizeof(T) / 4;

  __device__ char* base() const {
    // The compiler can not know where a pointer that was itself loaded leads to.
    __builtin_assume(__isGlobal(base_));
    return base_;
  }

  // The codecs of operands that are accessed in pieces.
  template <class Visit>
  __device__ void with_fast_codec(Visit visit) const {
    if constexpr (sizeof(T) == 8) {
      visit(Float64{});
    } else if (dtype_ == DType::kFloat32) {
      visit(Float32{});
    } else if (dtype_ == DType::kBFloat16) {
      visit(BFloat16{});
    } else {
      visit(Float16{});
    }
  }

  template <class Codec>
  __device__ typename Codec::Stored* address_of(const RowTile& tile, int operand, int j) const {
    const int i = tile.element(j);
    return reinterpret_cast<typename Codec::Stored*>(base()) +
           (strided_ ? offset_of(tile.layout, operand, tile.start + i) : i);
  }

  // How many pieces a lane has: all that fit, but one of two where eight bf16 or fp16 make one of 16 bytes.
  static constexpr int kPieces = sizeof(T) == 8 ? 4 : 2;
  static __device__ bool has_piece(const RowTile& tile, int i) {
    return i == 0 || sizeof(T) == 8 || tile.row.piece_bits != 3;
  }

  template <class Piece>
  __device__ void load_pieces(const RowTile& tile) {
    const Piece* from = reinterpret_cast<const Piece*>(base()) + tile.lane;
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (has_piece(tile, i)) load_piece(from + i * kWarp, raw_ + i * (sizeof(Piece) / 4));
  }

  template <class Piece>
  __device__ void store_pieces(const RowTile& tile) {
    Piece* to = reinterpret_cast<Piece*>(base()) + tile.lane;
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (has_piece(tile, i)) store_piece(to + i * kWarp, raw_ + i * (sizeof(Piece) / 4));
  }

  uint32_t raw_[kWords];
  char* base_;
  float scale_;  // of codes
  DType dtype_;
  bool strided_, whole_, is_block_;
};

// Loads one operand, for what is rare or comes late.
template <class T>
__device__ void load_one(LaneOperand<T>& x, const RowTile& tile, int operand, void* data, T (*slots)[kThreads]) {
  x.load(tile, operand, data);
  x.load_slots(tile, operand, slots);
  x.decode(slots);
}

template <class T>
__device__ void store_one(LaneOperand<T>& x, const RowTile& tile, int operand, T (*slots)[kThreads]) {
  x.store(tile, slots);
  x.store_slots(tile, operand, slots);
}

}  // namespace genopt::cuda
