// Pieces of 4, 8 or 16 bytes, each of which a lane accesses at once, as words; and the values in these.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace genopt::cuda {

// `Piece`: uint1, uint2 or uint4.
template <class Piece>
__device__ void load_piece(const Piece* from, uint32_t* words) {
  constexpr int kWords = sizeof(Piece) / 4;
  const Piece piece = *from;
  words[0] = piece.x;
  if constexpr (kWords >= 2) words[1] = piece.y;
  if constexpr (kWords == 4) words[2] = piece.z, words[3] = piece.w;
}

template <class Piece>
__device__ void store_piece(Piece* to, const uint32_t* words) {
  constexpr int kWords = sizeof(Piece) / 4;
  Piece piece;
  piece.x = words[0];
  if constexpr (kWords >= 2) piece.y = words[1];
  if constexpr (kWords == 4) piece.z = words[2], piece.w = words[3];
  *to = piece;
}

// The i-th of the values that lie side by side in `words`.
template <class Stored>
__device__ Stored value_in(const uint32_t* words, int i) {
  Stored x;
  if constexpr (sizeof(Stored) <= 2) {
    constexpr int kInWord = 4 / sizeof(Stored);
    x = static_cast<Stored>(words[i / kInWord] >> (i % kInWord * 8 * sizeof(Stored)));
  } else if constexpr (sizeof(Stored) == 4) {
    memcpy(&x, &words[i], sizeof x);
  } else {
    const uint64_t bits = words[2 * i] | static_cast<uint64_t>(words[2 * i + 1]) << 32;
    memcpy(&x, &bits, sizeof x);
  }
  return x;
}

// Keeps the others of its word.
template <class Stored>
__device__ void replace_value(uint32_t* words, int i, Stored x) {
  static_assert(sizeof(Stored) <= 4);
  if constexpr (sizeof(Stored) == 4) {
    words[i] = x;
  } else {
    constexpr int kInWord = 4 / sizeof(Stored), kBits = 8 * sizeof(Stored);
    const int shift = i % kInWord * kBits;
    words[i / kInWord] = (words[i / kInWord] & ~(((1u << kBits) - 1) << shift)) | static_cast<uint32_t>(x) << shift;
  }
}

// In the order of i: the first value of a word clears the others.
template <class Stored>
__device__ void set_value(uint32_t* words, int i, Stored x) {
  if constexpr (sizeof(Stored) <= 2) {
    constexpr int kInWord = 4 / sizeof(Stored);
    uint32_t& word = words[i / kInWord];
    const int shift = i % kInWord * 8 * sizeof(Stored);
    word = shift ? word | static_cast<uint32_t>(x) << shift : static_cast<uint32_t>(x);
  } else if constexpr (sizeof(Stored) == 4) {
    memcpy(&words[i], &x, sizeof x);
  } else {
    uint64_t bits;
    memcpy(&bits, &x, sizeof x);
    words[2 * i] = static_cast<uint32_t>(bits);
    words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
  }
}

}  // namespace genopt::cuda
