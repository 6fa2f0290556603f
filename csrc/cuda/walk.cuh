// How tiles are walked on CUDA: one warp, one tile of 256 elements, 8 of them in each lane's registers.
// Load, rule, store, as cpu/walk.h, with the same rules and codecs. Included once by each rule's .cu.
//
// A lane holds pieces of 2, 4 or 8 elements that lie side by side, as many as make 16 bytes of the row's
// widest operand, and the warp's pieces lie side by side too: so every access of a warp is one dense
// range. What can not be accessed so (a short last tile, odd addresses, strides) is loaded element by
// element, an operand at a time; the arithmetic knows nothing of it.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <iterator>

#include "kernels.h"
#include "table.h"

namespace genopt::cuda {

constexpr int kWarps = kThreads / kWarp;
constexpr int kElements = kTile / kWarp;  // of a lane

// The row of a tile or span: the last one that starts at or before it in its column. The warp looks at 32 candidates
// at a time.
__device__ inline int find_row(const uint64_t* first, int rows, int64_t tile, int lane) {
  int low = 0;
  for (int count = rows; count > 1;) {
    const int stride = (count + kWarp - 1) / kWarp;
    const int at = lane * stride;
    const bool starts = at < count && static_cast<int64_t>(first[low + at]) <= tile;
    const int last = __popc(__ballot_sync(~0u, starts)) - 1;  // starts holds for the lanes up to one
    low += last * stride;
    count = count - last * stride < stride ? count - last * stride : stride;
  }
  return low;
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

// A tile of one row.
struct Tile {
  const DeviceRow& row;
  const uint64_t* layout;
  int64_t start;
  int count, lane;

  // Which element of the tile is a lane's j-th.
  __device__ int element(int j) const {
    return j / row.piece * (kWarp * row.piece) + lane * row.piece + j % row.piece;
  }
  __device__ float* scale(int operand) const {
    return row.scales[operand - kState] + start / kTile;
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

  __device__ void load(const Tile& tile, int operand, void* data) {
    load(tile, operand, data, tile.row.dtype[operand]);
  }
  // For an operand of which only a choice is known when this is compiled: arrays of the row stay in registers.
  __device__ void load(const Tile& tile, int operand, void* data, DType dtype) {
    dtype_ = dtype;
    is_block_ = may_be_block<T>(operand) && is_block(dtype_);
    if (is_block_) scale_ = *tile.scale(operand);
    const int size = size_of(dtype_), bytes = size * tile.row.piece;
    strided_ = tile.row.strided >> operand & 1;
    base_ = static_cast<char*>(data) + (strided_ ? 0 : tile.start * size);
    // fp64 parameters with states of another dtype, and the reverse, are rare enough for the slots.
    whole_ = tile.count == kTile && !strided_ && reinterpret_cast<uintptr_t>(base_) % bytes == 0 &&
             (sizeof(T) == 8 ? size == 8 : size <= 4);
    if (!whole_) return;
    if (bytes == 16) {
      load_pieces<uint4>(tile);
    } else if constexpr (sizeof(T) == 4) {
      is_block_&& bytes == 4 ? load_pieces<uint1>(tile) : load_pieces<uint2>(tile);
    }
  }

  __device__ void load_slots(const Tile& tile, int operand, T (*slots)[kThreads]) const {
    if (whole_) return;
#pragma unroll 1
    for (int j = 0; j < kElements; ++j) {
      const bool exists = tile.element(j) < tile.count;
      if (is_block_) {
        slots[j][threadIdx.x] = with_block(dtype_, scale_, [&]<class Block>(const Block& block) {
          return exists ? static_cast<T>(block.decode(int32_t{*place<Block>(tile, operand, j)})) : T(0);
        });
        continue;
      }
      slots[j][threadIdx.x] = with_codec(dtype_, [&](auto codec) {
        using Codec = decltype(codec);
        return exists ? Codec::template decode<T>(*place<Codec>(tile, operand, j)) : T(0);
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
            values[j] = block.decode(int32_t{static_cast<typename Block::Stored>(raw_[j / 4] >> (j % 4 * 8))});
        });
        return;
      }
    with_fast_codec([&](auto codec) {
      using Codec = decltype(codec);
#pragma unroll
      for (int j = 0; j < kElements; ++j) values[j] = Codec::template decode<T>(stored<typename Codec::Stored>(j));
    });
  }

  // Rounds the values to one of the neighbours that a 16-bit dtype has. `bits(i)`: 32 for element i of the tile.
  template <class Bits>
  __device__ void round_by(const Tile& tile, Bits bits) {
    if constexpr (sizeof(T) == 4) {
      const bool is_bfloat16 = dtype_ == DType::kBFloat16;
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        const uint32_t given = bits(tile.element(j));
        values[j] = is_bfloat16 ? BFloat16::round_by(values[j], given) : Float16::round_by(values[j], given);
      }
    }
  }

  // Finds the scale of a tile of codes, and encodes what goes out in pieces. All lanes call it. `phase`: the tile's.
  __device__ void encode_block(const Tile& tile, int operand, uint32_t phase) {
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
    if (tile.lane == 0) *tile.scale(operand) = scale_;
  }

  // For an operand that was not loaded.
  __device__ void place(const Tile& tile, int operand, void* data) {
    load(tile, operand, data);
  }

  __device__ void store(const Tile& tile, T (*slots)[kThreads]) {
    if (!whole_) {
#pragma unroll
      for (int j = 0; j < kElements; ++j) slots[j][threadIdx.x] = values[j];
      return;
    }
    if (!is_block_)
      with_fast_codec([&](auto codec) {
#pragma unroll
        for (int j = 0; j < kElements; ++j) set_stored(j, decltype(codec)::encode(values[j]));
      });
    const int bytes = size_of(dtype_) * tile.row.piece;
    if (bytes == 16) {
      store_pieces<uint4>(tile);
    } else if constexpr (sizeof(T) == 4) {
      is_block_&& bytes == 4 ? store_pieces<uint1>(tile) : store_pieces<uint2>(tile);
    }
  }

  __device__ void store_slots(const Tile& tile, int operand, const T (*slots)[kThreads], uint32_t phase = 0) const {
    if (whole_) return;
#pragma unroll 1
    for (int j = 0; j < kElements; ++j) {
      if (tile.element(j) >= tile.count) continue;
      const T value = slots[j][threadIdx.x];
      if (is_block_) {
        with_block(dtype_, scale_, [&]<class Block>(const Block& block) {
          *place<Block>(tile, operand, j) = static_cast<typename Block::Stored>(
              block.encode(static_cast<float>(value), threshold_of(phase, static_cast<uint32_t>(tile.element(j)))));
        });
        continue;
      }
      with_codec(dtype_, [&](auto codec) {
        using Codec = decltype(codec);
        *place<Codec>(tile, operand, j) = Codec::encode(value);
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
  __device__ typename Codec::Stored* place(const Tile& tile, int operand, int j) const {
    const int i = tile.element(j);
    return reinterpret_cast<typename Codec::Stored*>(base()) +
           (strided_ ? offset_of(tile.layout, operand, tile.start + i) : i);
  }

  // How many pieces a lane has: all that fit, but one of two where eight bf16 or fp16 make one of 16 bytes.
  static constexpr int kPieces = sizeof(T) == 8 ? 4 : 2;
  static __device__ bool has_piece(const Tile& tile, int i) {
    return i == 0 || sizeof(T) == 8 || tile.row.piece != kElements;
  }

  template <class Piece>
  __device__ void load_pieces(const Tile& tile) {
    constexpr int kEach = sizeof(Piece) / 4;
    const Piece* from = reinterpret_cast<const Piece*>(base()) + tile.lane;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (!has_piece(tile, i)) continue;
      const Piece piece = from[i * kWarp];
      raw_[i * kEach] = piece.x;
      if constexpr (kEach >= 2) raw_[i * kEach + 1] = piece.y;
      if constexpr (kEach == 4) raw_[i * kEach + 2] = piece.z, raw_[i * kEach + 3] = piece.w;
    }
  }

  template <class Piece>
  __device__ void store_pieces(const Tile& tile) {
    constexpr int kEach = sizeof(Piece) / 4;
    Piece* to = reinterpret_cast<Piece*>(base()) + tile.lane;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (!has_piece(tile, i)) continue;
      Piece piece;
      piece.x = raw_[i * kEach];
      if constexpr (kEach >= 2) piece.y = raw_[i * kEach + 1];
      if constexpr (kEach == 4) piece.z = raw_[i * kEach + 2], piece.w = raw_[i * kEach + 3];
      to[i * kWarp] = piece;
    }
  }

  template <class Stored>
  __device__ Stored stored(int j) const {
    Stored x;
    if constexpr (sizeof(Stored) == 2) {
      x = static_cast<Stored>(raw_[j / 2] >> (j % 2 * 16));
    } else if constexpr (sizeof(Stored) == 4) {
      memcpy(&x, &raw_[j], sizeof x);
    } else {
      const uint64_t bits = raw_[2 * j] | static_cast<uint64_t>(raw_[2 * j + 1]) << 32;
      memcpy(&x, &bits, sizeof x);
    }
    return x;
  }

  template <class Stored>
  __device__ void set_stored(int j, Stored x) {
    if constexpr (sizeof(Stored) == 2) {
      raw_[j / 2] = j % 2 ? raw_[j / 2] | static_cast<uint32_t>(x) << 16 : static_cast<uint32_t>(x);
    } else if constexpr (sizeof(Stored) == 4) {
      memcpy(&raw_[j], &x, sizeof x);
    } else {
      uint64_t bits;
      memcpy(&bits, &x, sizeof x);
      raw_[2 * j] = static_cast<uint32_t>(bits);
      raw_[2 * j + 1] = static_cast<uint32_t>(bits >> 32);
    }
  }

  uint32_t raw_[kWords];
  char* base_;
  float scale_;  // of codes
  DType dtype_;
  bool strided_, whole_, is_block_;
};

template <unsigned kUsed, class T, class Scalars>
__device__ void apply(const Scalars& scalars, LaneOperand<T> (&x)[kOperands]) {
#pragma unroll
  for (int j = 0; j < kElements; ++j)
    scalars.update.template apply<kUsed>(x[kParam].values[j], scalars.around.gradient(x[kGrad].values[j]),
                                         x[kState].values[j], x[kState + 1].values[j], x[kState + 2].values[j]);
}

// Loads one operand at once, for what is rare or comes late.
template <class T>
__device__ void load_whole(LaneOperand<T>& x, const Tile& tile, int operand, void* data, T (*slots)[kThreads]) {
  x.load(tile, operand, data);
  x.load_slots(tile, operand, slots);
  x.decode(slots);
}

template <class T>
__device__ void store_whole(LaneOperand<T>& x, const Tile& tile, int operand, T (*slots)[kThreads]) {
  x.store(tile, slots);
  x.store_slots(tile, operand, slots);
}

__device__ inline double as_double(uint64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Writes what the step leaves in the gradient. `grad`: as it was loaded, where that is not zero.
template <class T>
__device__ void leave_gradient(const Table& table, Gradients left, LaneOperand<T>& grad, const Tile& tile,
                               T (*slots)[kThreads]) {
  const bool zeroes = left == Gradients::kZeroed;
  const T unscale = static_cast<T>(as_double(table.words[Table::kUnscale]));
#pragma unroll
  for (int j = 0; j < kElements; ++j) grad.values[j] = zeroes ? T(0) : unscale * grad.values[j];
  store_whole(grad, tile, kGrad, slots);
}

// The average of the weights, from p as it has been stored.
template <class T>
__device__ void average(const Around<T>& around, LaneOperand<T>& param, const Tile& tile, T (*slots)[kThreads]) {
  LaneOperand<T> e;
  load_whole(e, tile, kAverage, tile.row.data[kAverage], slots);
  const bool has_master = tile.row.extra == Extra::kMaster;
  with_codec(has_master ? tile.row.dtype[kExtra] : tile.row.dtype[kParam], [&](auto codec) {
#pragma unroll
    for (int j = 0; j < kElements; ++j)
      e.values[j] =
          around.average(e.values[j], decltype(codec)::template decode<T>(decltype(codec)::encode(param.values[j])));
  });
  store_whole(e, tile, kAverage, slots);
}

// Before the rule, for a parameter with a compensation: p + c.
template <class T>
__device__ void join_rest(LaneOperand<T>& param, const Tile& tile, T (*slots)[kThreads]) {
  LaneOperand<T> rest;
  load_whole(rest, tile, kExtra, tile.row.data[kExtra], slots);
#pragma unroll
  for (int j = 0; j < kElements; ++j) param.values[j] += rest.values[j];
}

// After it: p as it will be stored, and c as what that leaves over.
template <class T>
__device__ void part_rest(LaneOperand<T>& param, const Tile& tile, T (*slots)[kThreads]) {
  LaneOperand<T> rest;
  rest.place(tile, kExtra, tile.row.data[kExtra]);
  with_codec(tile.row.dtype[kParam], [&](auto codec) {
    using Codec = decltype(codec);
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const T rounded = Codec::template decode<T>(Codec::encode(param.values[j]));
      rest.values[j] = rounded - rounded == T(0) ? param.values[j] - rounded : T(0);
      param.values[j] = rounded;
    }
  });
  store_whole(rest, tile, kExtra, slots);
}

// The parameter, rounded from its master.
template <class T>
__device__ void store_rounded(const LaneOperand<T>& master, const Tile& tile, T (*slots)[kThreads]) {
  LaneOperand<T> param;
  param.place(tile, kParam, tile.row.data[kParam]);
#pragma unroll
  for (int j = 0; j < kElements; ++j) param.values[j] = master.values[j];
  store_whole(param, tile, kParam, slots);
}

// One warp takes one tile, of rows that compute in T.
template <class Rule, class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3) update(const __grid_constant__ Table table) {
  const int lane = threadIdx.x % kWarp;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (tile >= table.tiles) return;
  const int r = find_row(table.words + table.first_tile(0), table.rows, tile, lane);
  const uint64_t grad = table.words[table.grad(r)];
  const DeviceRow& row = *reinterpret_cast<const DeviceRow*>(table.words + table.row(r));
  if (!grad || (row.dtype[kParam] == DType::kFloat64) != (sizeof(T) == 8)) return;
  const bool skips = table.may_skip && table.words[Table::kSkip] != 0, rests = (row.used & kRests) != 0;
  if (skips && (rests || table.gradients != Gradients::kZeroed)) return;
  auto scalars = *reinterpret_cast<const Scalars<Rule, T>*>(table.words + table.scalars(r));
  if (table.measures) {
    const NormColumns norms(table);
    scalars.around.factor *= static_cast<T>(row.by_tensor ? norms.row_factors[r] : norms.group_factors[row.group]);
  }
  if constexpr (requires { scalars.update.is_idle(scalars.around); })
    if (scalars.update.is_idle(scalars.around)) return;

  constexpr int kUsable = kState + static_cast<int>(std::size(Rule::kStates));
  const int64_t start = (tile - static_cast<int64_t>(table.words[table.first_tile(r)])) * kTile;
  const int64_t rest = row.numel - start;
  const Tile here{row, table.words + table.layouts() + row.layout, start, rest < kTile ? static_cast<int>(rest) : kTile,
                  lane};
  const auto loads = [&](int k) { return k == kParam || (!rests && is_used(row.used, k)); };
  // What is loaded as operand k: the parameter is its master, where it has one.
  const auto source = [&](int k) { return k == kParam ? row.param() : k; };
  const bool has_master = row.extra == Extra::kMaster;
  const auto dtype = [&](int k) { return k == kParam && has_master ? row.dtype[kExtra] : row.dtype[k]; };
  const auto address = [&](int k) {
    return k == kGrad ? reinterpret_cast<void*>(grad) : k == kParam && has_master ? row.data[kExtra] : row.data[k];
  };
  __shared__ Slots<T, kUsable> slots;

  LaneOperand<T> x[kOperands];
  if (skips) {
    x[kGrad].load(here, kGrad, address(kGrad));
    leave_gradient(table, Gradients::kZeroed, x[kGrad], here, slots.values[kGrad]);
    return;
  }
#pragma unroll
  for (int k = 0; k < kUsable; ++k)
    if (loads(k)) x[k].load(here, source(k), address(k), dtype(k));
#pragma unroll
  for (int k = 0; k < kUsable; ++k)
    if (loads(k)) x[k].load_slots(here, source(k), slots.values[k]);
#pragma unroll
  for (int k = 0; k < kUsable; ++k)
    if (loads(k)) x[k].decode(slots.values[k]);
  if (!rests) {
    if (row.extra == Extra::kCompensation) join_rest(x[kParam], here, slots.values[kParam]);
    [&]<unsigned... kMasks>(StateMasks<kMasks...>) {
      ((row.used % kWithAverage == kMasks ? apply<kMasks>(scalars, x) : void()), ...);
    }(typename Rule::Masks{});
    if (row.extra == Extra::kCompensation) part_rest(x[kParam], here, slots.values[kParam]);
    if (has_master) store_rounded(x[kParam], here, slots.values[kParam]);
    if (row.unbiased & 1 << kParam) {
      const uint32_t key = tile_key(scalars.random, start);
      x[kParam].round_by(here, [key](uint32_t i) { return random_bits(key, i); });
    }
    const uint32_t phase = tile_phase(scalars.phase, start);
#pragma unroll
    for (int k = kState; k < kUsable; ++k) {
      if (!loads(k)) continue;
      if (is_block(row.dtype[k])) {
        x[k].encode_block(here, k, phase);
      } else if (row.unbiased >> k & 1) {
        x[k].round_by(here, [phase](uint32_t i) { return threshold_of(phase, i); });
      }
    }
#pragma unroll
    for (int k = 0; k < kUsable; ++k)
      if (k != kGrad && loads(k)) x[k].store(here, slots.values[k]);
#pragma unroll
    for (int k = 0; k < kUsable; ++k)
      if (k != kGrad && loads(k)) x[k].store_slots(here, source(k), slots.values[k], phase);
  }
  if (is_used(row.used, kAverage)) average(scalars.around, x[kParam], here, slots.values[kParam]);
  if (!rests && table.gradients != Gradients::kKept)
    leave_gradient(table, table.gradients, x[kGrad], here, slots.values[kGrad]);
}

__device__ inline double read_number(uint64_t word) {
  return with_codec(dtype_in(word), [word](auto codec) {
    using Codec = decltype(codec);
    return Codec::template decode<double>(*static_cast<const typename Codec::Stored*>(address_in(word)));
  });
}

// The reciprocal of a loss scale, which torch rounds to float.
template <class Word>
__device__ double loss_unscale(const Table& table, Word word) {
  const uint64_t loss_scale = word(table.tensor(kGradScale));
  return loss_scale ? static_cast<double>(static_cast<float>(1.0 / read_number(loss_scale))) : 1.0;
}

// Of all gradients: 1 / micro-batches, and 1 / loss scale.
template <class Word>
__device__ double common_scale(const Table& table, Word word) {
  return as_double(word(table.control(kScale))) * loss_unscale(table, word);
}

// A group's scale, from the device where it is given there.
template <class Word>
__device__ double group_scale(const Table& table, Word word, int group) {
  const double scale = common_scale(table, word);
  const uint64_t given = word(table.tensor(kGroupScales));
  return given ? scale * static_cast<const double*>(address_in(given))[group] : scale;
}

// Adds to a step counter in its own precision, as torch does, and returns it.
__device__ inline double advance(const DeviceRow& row, float by) {
  if (!row.step) return 0;
  if (row.step_dtype == DType::kFloat64) return *static_cast<double*>(row.step) += by;
  return *static_cast<float*>(row.step) += by;
}

// Writes `payload` into the table; then, for the first `rows` rows, advances the step counters and
// derives their scalars. What may be in the payload is read from there: the table has it only later.
template <class Rule, int kWords>
__global__ void __launch_bounds__(kThreads, 4)
    prologue(const __grid_constant__ Table table, const __grid_constant__ Payload<kWords> payload, int rows) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < payload.count) table.words[payload.at + i] = payload.words[i];
  if (i >= rows) return;
  const auto word = [&](int64_t at) {
    const bool travels = at >= payload.at && at < payload.at + payload.count;
    return travels ? payload.words[at - payload.at] : table.words[at];
  };
  const int r = static_cast<int>(i);
  const uint64_t found_inf = word(table.tensor(kFoundInf));
  const bool skips = found_inf && read_number(found_inf) != 0;
  if (i == 0) {
    table.words[Table::kSkip] = skips;
    table.words[Table::kRowsDone] = 0;
    const double unscale = loss_unscale(table, word);
    memcpy(&table.words[Table::kUnscale], &unscale, sizeof unscale);
  }
  if (table.measures) {
    const NormColumns norms(table);
    norms.spans_done[r] = 0;
    norms.row_sums[r] = norms.row_weights[r] = 0;
  }
  if (!word(table.grad(r))) return;

  const DeviceRow& row = *reinterpret_cast<const DeviceRow*>(table.words + table.row(r));
  // A step that the norm turns out to skip takes this back: see norm.cuh.
  const double t = advance(row, skips ? 0 : 1);

  const double factor = table.measures ? 1.0 : group_scale(table, word, row.group);
  double options[kAllOptions];
  constexpr int kCount = static_cast<int>(std::size(Rule::kOptions));
#pragma unroll
  for (int k = 0; k < kAllOptions; ++k) {
    options[k] = kUnset;
    if (k >= kCount && k < kMaxOptions) continue;
    const uint64_t source = k < kMaxOptions ? word(table.source(k, row.group)) : 0;
    options[k] = source ? read_number(source) : as_double(word(table.option(k, row.group)));
  }
  const auto derive = [&]<class T>(T) {
    Scalars<Rule, T> scalars(options, t);
    scalars.around.factor *= static_cast<T>(factor);
    *reinterpret_cast<Scalars<Rule, T>*>(table.words + table.scalars(r)) = scalars;
  };
  if (row.dtype[kParam] == DType::kFloat64) {
    derive(double{});
  } else {
    derive(float{});
  }
}

template <class Rule>
RuleKernels make_rule_kernels() {
  return {prologue<Rule, kSmallPayload>, prologue<Rule, kLargePayload>, update<Rule, float>, update<Rule, double>};
}

}  // namespace genopt::cuda
