// A lane's elements of an operand that is contiguous and aligned, and stored in a way that is known when this is
// compiled: what LaneOperand (lane_operand.cuh) does for whatever a row may be, in fewer instructions and registers.
#pragma once

#include "pieces.cuh"
#include "tile.cuh"

namespace genopt::cuda {

// What there is no element for, in update(): ordinary numbers in every format, for which no operation takes longer.
constexpr uint32_t kOrdinary = 0x3c003c00;

// A lane's elements of one operand, in pieces of kPiece side by side. kHalf: bf16 or fp16, as the row says.
template <Form kForm, int kPiece>
class LeanOperand {
 public:
  // Elements that the tile has not are made of `fill`.
  __device__ void load(const void* data, const Tile& tile, uint32_t fill) {
    const char* const from = at(data, tile);
    if (tile.count == kTile) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) load_piece(piece<const Piece>(from, tile, i), raw_ + i * kPieceWords);
      return;
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) raw_[w] = fill;
    if (tile.count % kPiece == 0) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (tile.template element<kPiece>(i * kPiece) < tile.count)
          load_piece(piece<const Piece>(from, tile, i), raw_ + i * kPieceWords);
      return;
    }
#pragma unroll
    for (int j = 0; j < kElements; ++j)
      if (const int e = tile.template element<kPiece>(j); e < tile.count)
        replace_value(raw_, j, reinterpret_cast<const Stored*>(from)[e]);
  }

  __device__ void store(void* data, const Tile& tile) const {
    char* const to = at(data, tile);
    if (tile.count == kTile) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) store_piece(piece<Piece>(to, tile, i), raw_ + i * kPieceWords);
      return;
    }
    if (tile.count % kPiece == 0) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (tile.template element<kPiece>(i * kPiece) < tile.count)
          store_piece(piece<Piece>(to, tile, i), raw_ + i * kPieceWords);
      return;
    }
#pragma unroll
    for (int j = 0; j < kElements; ++j)
      if (const int e = tile.template element<kPiece>(j); e < tile.count)
        reinterpret_cast<Stored*>(to)[e] = value_in<Stored>(raw_, j);
  }

  // Calls visit(codec) with the codec of a plain number.
  template <class Visit>
  __device__ static void with_codec_of(DType dtype, Visit visit) {
    if constexpr (kForm == Form::kFloat) {
      visit(Float32{});
    } else if (dtype == DType::kBFloat16) {
      visit(BFloat16{});
    } else {
      visit(Float16{});
    }
  }

  __device__ void decode(float (&values)[kElements], DType dtype) const {
    with_codec_of(dtype, [&](auto codec) {
#pragma unroll
      for (int j = 0; j < kElements; ++j)
        values[j] = decltype(codec)::template decode<float>(value_in<typename decltype(codec)::Stored>(raw_, j));
    });
  }
  __device__ void encode(const float (&values)[kElements], DType dtype) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kElements; ++j) sum += values[j];
    const bool all_numbers = kForm == Form::kFloat || sum == sum;
    with_codec_of(dtype, [&](auto codec) {
      using Codec = decltype(codec);
      if (all_numbers) {
#pragma unroll
        for (int j = 0; j < kElements; ++j) set_value(raw_, j, encode_number<Codec>(values[j]));
      } else {
#pragma unroll
        for (int j = 0; j < kElements; ++j) set_value(raw_, j, Codec::encode(values[j]));
      }
    });
  }

  // Of codes in blocks.
  template <class Block>
  __device__ void decode(float (&values)[kElements], const Block& block) const {
    with_usual(block, [&]<bool kUsual>() {
#pragma unroll
      for (int j = 0; j < kElements; ++j)
        values[j] = block.template decode<kUsual>(int32_t{value_in<typename Block::Stored>(raw_, j)});
    });
  }
  // Returns the tile's scale. `phase`: the tile's.
  template <class Block>
  __device__ float encode_block(float (&values)[kElements], uint32_t phase, const Tile& tile) {
    if (tile.count < kTile)
#pragma unroll
      for (int j = 0; j < kElements; ++j)
        if (tile.template element<kPiece>(j) >= tile.count) values[j] = 0;
    uint32_t largest = 0;
#pragma unroll
    for (int j = 0; j < kElements; ++j) largest = larger(largest, static_cast<uint32_t>(Block::magnitude(values[j])));
    const float scale = Block::scale_for(__reduce_max_sync(~0u, largest));
    const Block block(scale);
    with_usual(block, [&]<bool kUsual>() {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        uint32_t codes[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t element = static_cast<uint32_t>(tile.template element<kPiece>(4 * w + j));
          codes[j] =
              static_cast<uint32_t>(block.template encode<kUsual>(values[4 * w + j], threshold_of(phase, element)));
        }
        // The low bytes of all four.
        raw_[w] = __byte_perm(__byte_perm(codes[0], codes[1], 0x0040), __byte_perm(codes[2], codes[3], 0x0040), 0x5410);
      }
    });
    return scale;
  }

 private:
  static constexpr int kBytes = kForm == Form::kFloat ? 4 : kForm == Form::kHalf ? 2 : 1;
  static constexpr int kPieceWords = kPiece * kBytes / 4, kPieces = kElements / kPiece;
  static constexpr int kWords = kElements * kBytes / 4;
  using Stored = std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>;
  using Piece = std::conditional_t<kPieceWords == 4, uint4, std::conditional_t<kPieceWords == 2, uint2, uint1>>;

  // All lanes of a warp go the same way.
  template <class Block, class Visit>
  __device__ static void with_usual(const Block& block, Visit visit) {
    if (block.is_usual()) {
      visit.template operator()<true>();
    } else {
      visit.template operator()<false>();
    }
  }

  template <class Bytes>
  __device__ static Bytes* global(Bytes* data) {
    // The compiler can not know where a pointer that was itself loaded leads to.
    __builtin_assume(__isGlobal(data));
    return data;
  }
  __device__ static const char* at(const void* data, const Tile& tile) {
    return global(static_cast<const char*>(data)) + tile.start * kBytes;
  }
  __device__ static char* at(void* data, const Tile& tile) {
    return global(static_cast<char*>(data)) + tile.start * kBytes;
  }
  template <class P, class Bytes>
  __device__ static P* piece(Bytes* base, const Tile& tile, int i) {
    return reinterpret_cast<P*>(base) + i * kWarp + tile.lane;
  }

  uint32_t raw_[kWords];
};

}  // namespace genopt::cuda
