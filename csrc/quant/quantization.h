// One tensor and its codes, as kernels see them: pointers and sizes. The element's arithmetic: code.h; kernels:
// cpu_kernels.h, cuda.cu.
#pragma once

#include <cstdint>
#include <vector>

#include "code.h"

namespace genopt::quant {

// Numbers are contiguous, in row-major order. Element i belongs to unit i / run % units, which shares one scale. A
// block is a unit of one run, a power of two from 32 to 4096; the last one may be short.
struct Quantization {
  void* numbers;  // quantizing reads them, dequantizing writes them
  DType dtype;
  int64_t numel, run, units;
  void* codes;  // null, in blocks: only scales are wanted
  float* scale;
  int8_t* zero_point;  // null: symmetric
  int bits;
  bool stochastic;
  uint64_t seed;
  const uint64_t* seed_address;  // on CUDA: where the seed stands, if not null

  GENOPT_INLINE CodeRange code_range() const {
    return {bits, zero_point == nullptr};
  }
  GENOPT_INLINE int zero_point_at(int64_t unit) const {
    return zero_point ? zero_point[unit] : 0;
  }
};

// On CPU, threads take pieces of this many elements, the last one may be short: a whole number of any blocks.
constexpr int kPiece = 4096, kSmallestBlock = 32;

// How far units reach, a column each for Reach::high and Reach::low; of T = float, or double for float64.
template <class T>
struct Reaches {
  Key<T>*high, *low;
};

// Encoders of units, as columns.
template <class T>
struct Encoders {
  const T *inverse, *lowest, *highest;
  const int* zero_point;

  GENOPT_INLINE Encoder<T> operator[](int64_t i) const {
    return {inverse[i], lowest[i], highest[i], zero_point[i]};
  }
};

// What one instruction set offers, over pieces [begin, end). `reaches` are Reaches<T>, which what is measured is joined
// to; `encoders` are Encoders<T>; with `non_temporal` results are written non-temporally.
struct Kernels {
  void (*quantize_blocks)(const Quantization& q, bool non_temporal, int64_t begin, int64_t end);
  void (*measure)(const Quantization& q, const void* reaches, int64_t begin, int64_t end);
  void (*encode)(const Quantization& q, bool non_temporal, const void* encoders, int64_t begin, int64_t end);
  void (*decode)(const Quantization& q, bool non_temporal, int64_t begin, int64_t end);
};

}  // namespace genopt::quant
