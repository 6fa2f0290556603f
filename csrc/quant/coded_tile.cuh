// A warp's tile of 256 numbers and their codes on CUDA: loaded, encoded, stored. The kernels: cuda.cu.
#pragma once

#include <cstring>
#include <type_traits>

#include "../cuda/pieces.cuh"
#include "../cuda/tile.cuh"
#include "quantization.h"

namespace genopt::quant::cuda {

using genopt::cuda::kElements;
using genopt::cuda::kWarp;
using genopt::cuda::load_piece;
using genopt::cuda::store_piece;

// A lane has pieces of 16 bytes of numbers, and the warp's pieces lie side by side: kRows rows of them.
template <class Codec>
struct CodedTile {
  using Stored = typename Codec::Stored;
  using T = Compute<Codec>;
  static constexpr int kPiece = 16 / sizeof(Stored), kRows = kElements / kPiece, kRow = kWarp * kPiece;

  const Quantization& q;
  int64_t start;
  int lane;
  int count;
  bool whole;  // and can be accessed in pieces

  __device__ CodedTile(const Quantization& q, int64_t start, int lane) : q(q), start(start), lane(lane) {
    const int64_t rest = q.numel - start;
    count = genopt::cuda::count_of(rest);
    whole = rest >= kTile && reinterpret_cast<uintptr_t>(q.numbers) % 16 == 0 &&
            reinterpret_cast<uintptr_t>(q.codes) % 8 == 0;
  }

  // Which element of the tile is a lane's j-th.
  __device__ int element(int j) const {
    return j / kPiece * kRow + lane * kPiece + j % kPiece;
  }

  __device__ Stored* numbers() const {
    return static_cast<Stored*>(q.numbers) + start;
  }
  __device__ uint4* piece(int r) const {
    return reinterpret_cast<uint4*>(numbers()) + r * kWarp + lane;
  }

  __device__ void load_numbers(T (&x)[kElements]) const {
    if (!whole) {
#pragma unroll
      for (int j = 0; j < kElements; ++j)
        x[j] = element(j) < count ? Codec::template decode<T>(numbers()[element(j)]) : T(0);
      return;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Stored stored[kPiece];
      uint32_t words[4];
      load_piece(piece(r), words);
      memcpy(stored, words, sizeof stored);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) x[r * kPiece + i] = Codec::template decode<T>(stored[i]);
    }
  }

  __device__ void store_numbers(const T (&x)[kElements]) const {
    if (!whole) {
#pragma unroll
      for (int j = 0; j < kElements; ++j)
        if (element(j) < count) numbers()[element(j)] = Codec::encode(x[j]);
      return;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Stored stored[kPiece];
#pragma unroll
      for (int i = 0; i < kPiece; ++i) stored[i] = Codec::encode(x[r * kPiece + i]);
      uint32_t words[4];
      memcpy(words, stored, sizeof stored);
      store_piece(piece(r), words);
    }
  }

  // A lane's codes of one row, as an integer of 8 or 4 bits each.
  template <int kBits>
  using Packed = std::conditional_t<
      kPiece * kBits == 64, uint64_t,
      std::conditional_t<kPiece * kBits == 32, uint32_t, std::conditional_t<kPiece * kBits == 16, uint16_t, uint8_t>>>;

  template <int kBits>
  __device__ void store_codes_of(const int8_t (&codes)[kElements]) const {
    uint8_t* const to = static_cast<uint8_t*>(q.codes) + start * kBits / 8;
    if (whole) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        Packed<kBits> packed = 0;
#pragma unroll
        for (int i = 0; i < kPiece; ++i)
          packed |= static_cast<Packed<kBits>>(static_cast<Packed<kBits>>(codes[r * kPiece + i] & ((1 << kBits) - 1))
                                               << (kBits * i));
        reinterpret_cast<Packed<kBits>*>(to)[r * kWarp + lane] = packed;
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const int i = element(j);
      if (i >= count) continue;
      if constexpr (kBits == 8) {
        to[i] = static_cast<uint8_t>(codes[j]);
      } else if (j % 2 == 0) {
        to[i / 2] = pack(codes[j], i + 1 < count ? codes[j + 1] : 0);
      }
    }
  }

  template <int kBits>
  __device__ void load_codes_of(int8_t (&codes)[kElements]) const {
    const uint8_t* const from = static_cast<const uint8_t*>(q.codes) + start * kBits / 8;
    if (whole) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Packed<kBits> packed = reinterpret_cast<const Packed<kBits>*>(from)[r * kWarp + lane];
#pragma unroll
        for (int i = 0; i < kPiece; ++i) {
          const int bits = static_cast<int>(packed >> (kBits * i)) & ((1 << kBits) - 1);
          codes[r * kPiece + i] = static_cast<int8_t>(kBits == 8 ? bits : (bits ^ 8) - 8);
        }
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const int i = element(j);
      codes[j] = 0;
      if (i < count) codes[j] = static_cast<int8_t>(kBits == 8 ? from[i] : unpack(from[i / 2], i % 2));
    }
  }

  __device__ void store_codes(const int8_t (&codes)[kElements]) const {
    q.bits == 8 ? store_codes_of<8>(codes) : store_codes_of<4>(codes);
  }
  __device__ void load_codes(int8_t (&codes)[kElements]) const {
    q.bits == 8 ? load_codes_of<8>(codes) : load_codes_of<4>(codes);
  }

  // The lane's numbers of row r as codes.
  __device__ void encode_row(const Encoder<T>& encoder, const T (&x)[kElements], int r, uint32_t key,
                             int8_t (&codes)[kElements]) const {
    if (q.stochastic) {
#pragma unroll
      for (int i = r * kPiece; i < (r + 1) * kPiece; ++i)
        codes[i] = encoder.template operator()<true>(
            x[i], random_number(key, static_cast<uint32_t>(start) + static_cast<uint32_t>(element(i))));
    } else {
#pragma unroll
      for (int i = r * kPiece; i < (r + 1) * kPiece; ++i) codes[i] = encoder.template operator()<false>(x[i], 0.0f);
    }
  }

  // All of them.
  __device__ void encode(const Encoder<T>& encoder, const T (&x)[kElements], uint32_t key,
                         int8_t (&codes)[kElements]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) encode_row(encoder, x, r, key, codes);
  }

  // Of the random numbers. A tile never crosses an index whose upper half changes.
  __device__ uint32_t key() const {
    if (!q.stochastic) return 0;
    return random_key(q.seed_address ? *q.seed_address : q.seed, static_cast<uint64_t>(start));
  }
};

}  // namespace genopt::quant::cuda
