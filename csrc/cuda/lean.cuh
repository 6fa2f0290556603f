// The last kernel of a step, for usual rows: contiguous, aligned, without average, and stored in one of a few ways that
// are known when this is compiled. Load, join, rule, part, round, as cpu/assembly.h; one warp, one tile. The general
// update (update.cuh) has registers for whatever a row may be; this one has what it needs, so that enough warps run to
// keep memory busy. The same rules, codecs and bits.
#pragma once

#include "factor.cuh"
#include "lean_operand.cuh"

namespace genopt::cuda {

// Calls visit(block) with the codec of a rule's i-th state in codes.
template <class Rule, class Visit>
__device__ void with_block_of(int i, float scale, Visit visit) {
  if (Rule::kSquares >> i & 1) {
    visit(UInt8(scale));
  } else {
    visit(Int8(scale));
  }
}

// What a lane has of a tile's operands that are read: those in kRead, a mask of kParam, kGrad and states. The parameter
// as the rule sees it: its master, or with what a compensation adds. All of it is under way before any is waited for.
template <class Rule, unsigned kRead, int kWay, int kPiece>
struct LeanTile {
  static constexpr Way kStored = kWays[kWay];
  static constexpr bool kHasMaster = kStored.extra == Extra::kMaster, kHasRest = kStored.extra == Extra::kCompensation;
  static constexpr Form kSeen = kHasMaster ? Form::kFloat : kStored.param;

  LeanOperand<kSeen, kPiece> p;
  LeanOperand<kStored.param, kPiece> g, rest;
  LeanOperand<kStored.state, kPiece> states[kMaxStates];
  float scales[kMaxStates];

  __device__ static constexpr bool reads(int k) {
    return kRead >> k & 1;
  }
  __device__ void load(const DeviceRow& row, const void* gradient, const Tile& tile) {
    if constexpr (reads(kParam)) p.load(row.data[kHasMaster ? kExtra : kParam], tile, kOrdinary);
    g.load(gradient, tile, kOrdinary);
    if constexpr (reads(kParam) && kHasRest) rest.load(row.data[kExtra], tile, kOrdinary);
#pragma unroll
    for (int i = 0; i < kMaxStates; ++i) {
      if (!reads(kState + i)) continue;
      states[i].load(row.data[kState + i], tile, kOrdinary);
      if constexpr (kStored.state == Form::kCodes) scales[i] = row.scales[i][tile.number];
    }
  }
  __device__ void decode(float (&values)[kState + kMaxStates][kElements], DType dtype) const {
    if constexpr (reads(kParam)) p.decode(values[kParam], dtype);
    g.decode(values[kGrad], dtype);
    if constexpr (reads(kParam) && kHasRest) {
      float rests[kElements];
      rest.decode(rests, dtype);
#pragma unroll
      for (int j = 0; j < kElements; ++j) values[kParam][j] += rests[j];
    }
#pragma unroll
    for (int i = 0; i < kMaxStates; ++i) {
      if (!reads(kState + i)) continue;
      if constexpr (kStored.state != Form::kCodes) {
        states[i].decode(values[kState + i], dtype);
      } else {
        with_block_of<Rule>(i, scales[i], [&](const auto& block) { states[i].decode(values[kState + i], block); });
      }
    }
  }
};

// How many blocks are to run on a processor: up to 80 registers a thread let six, as many as memory needs; codes are
// computed for longer, and need seven, which registers let where a rule has up to nine scalars. With three states
// registers let five, with four, or with factors, four. Where they are tight codes get one block less.
template <class Rule>
constexpr int lean_blocks(unsigned used, const Way& way, bool cautious) {
  constexpr bool kFewScalars = sizeof(typename Rule::template Update<float>) <= 9 * sizeof(float);
  if (used & kFactorsOf<Rule>) return 4;
  const int most = used == 0b1111                                          ? 4
                   : used == 0b111                                         ? 5
                   : way.state == Form::kCodes && kFewScalars && !cautious ? 7
                                                                           : 6;
  return way.state == Form::kCodes && kIsTight ? most - 1 : most;
}

// kUsed: a set of the rule's states, as in Rule::Masks.
template <class Rule, unsigned kUsed, int kWay, bool kCautious>
__global__ void __launch_bounds__(kThreads, lean_blocks<Rule>(kUsed, kWays[kWay], kCautious))
    lean_update(const __grid_constant__ Table table, const __grid_constant__ TileRange range) {
  constexpr Way kStored = kWays[kWay];
  constexpr bool kHasMaster = kStored.extra == Extra::kMaster, kHasRest = kStored.extra == Extra::kCompensation;
  constexpr Form kSeen = kHasMaster ? Form::kFloat : kStored.param;  // the parameter as the rule sees it
  constexpr unsigned kGiven = kUsed & kFactorsOf<Rule>, kKept = kUsed & ~kGiven;
  constexpr bool kHasFloats = kSeen == Form::kFloat || (kKept && kStored.state == Form::kFloat);
  constexpr int kPiece = kHasFloats ? 4 : 8;  // 16 bytes of the widest operand
  if (warp_here() >= range.tiles) return;
  const TileHere found = find_lean_tile(table, range);
  const uint64_t grad = table.words[table.grad(found.row)];
  if (!grad) return;
  const DeviceRow& row = *reinterpret_cast<const DeviceRow*>(table.words + table.row(found.row));
  const int size = kStored.state == Form::kCodes ? row.tile : kTile;
  const int64_t start = int64_t{found.number} * size;
  const Tile tile{start, count_of(row.numel - start, size), lane_here(), found.number};
  const DType dtype = row.dtype[kParam];
  const bool zeroes = table.gradients == Gradients::kZeroed;
  void* const gradient = reinterpret_cast<void*>(grad);
  LeanTile<Rule, kOfParam | kOfGrad | kKept * kOfFirstState, kWay, kPiece> x;
  float values[kState + kMaxStates][kElements];
  const auto leave_zeros = [&] {
#pragma unroll
    for (int j = 0; j < kElements; ++j) values[kGrad][j] = 0;
    x.g.encode(values[kGrad], dtype);
    x.g.store(gradient, tile);
  };
  if (table.may_skip && table.words[Table::kSkip] != 0) {
    if (zeroes) leave_zeros();
    return;
  }

  x.load(row, gradient, tile);
  const auto scalars = scalars_of<Scalars<Rule, float>>(table, row, found.row);
  if constexpr (kGiven != 0)
    load_factors(values[kState + kFirstFactor<Rule>], values[kState + kFirstFactor<Rule> + 1], table, row, tile,
                 [&](int j) { return tile.template element<kPiece>(j); });
  x.decode(values, dtype);
#pragma unroll
  for (int j = 0; j < kElements; ++j)
    scalars.update.template apply<kUsed | (kCautious ? kMayBeCautious : 0u)>(
        values[kParam][j], scalars.around.gradient(values[kGrad][j]), values[kState][j], values[kState + 1][j],
        values[kState + 2][j], values[kState + 3][j]);

  // To one of the neighbours that a 16-bit dtype has. `bits(i)`: 32 for element i of the tile.
  const auto round = [&](float (&of)[kElements], auto bits) {
#pragma unroll
    for (int j = 0; j < kElements; ++j)
      of[j] = round_by(dtype, of[j], bits(static_cast<uint32_t>(tile.template element<kPiece>(j))));
  };
  if constexpr (kHasMaster) {
    LeanOperand<kStored.param, kPiece> narrow;
    narrow.encode(values[kParam], dtype);
    narrow.store(row.data[kParam], tile);
  } else if constexpr (kSeen == Form::kHalf) {
    if (row.unbiased & 1 << kParam) {
      const uint32_t key = tile_key(scalars.random, row.origin + tile.start);
      round(values[kParam], [key](uint32_t i) { return random_bits(key, i); });
    }
  }
  x.p.encode(values[kParam], dtype);
  x.p.store(row.data[kHasMaster ? kExtra : kParam], tile);
  if constexpr (kHasRest) {  // what storing leaves over
    float rounded[kElements];
    x.p.decode(rounded, dtype);
#pragma unroll
    for (int j = 0; j < kElements; ++j)
      values[kParam][j] = rounded[j] - rounded[j] == 0 ? values[kParam][j] - rounded[j] : 0;
    x.rest.encode(values[kParam], dtype);
    x.rest.store(row.data[kExtra], tile);
  }
  const uint32_t phase = tile_phase(scalars.phase, row.origin + tile.start);
  if constexpr (kStored.state == Form::kCodes) __syncwarp();  // all lanes have read the scales that one writes
#pragma unroll
  for (int i = 0; i < kMaxStates; ++i) {
    if (!(kKept >> i & 1)) continue;
    float (&state)[kElements] = values[kState + i];
    if constexpr (kStored.state == Form::kCodes) {
      with_block_of<Rule>(i, x.scales[i], [&]<class Block>(const Block&) {
        const float scale = x.states[i].template encode_block<Block>(state, phase, tile);
        if (tile.lane == 0) row.scales[i][tile.number] = scale;
      });
    } else {
      if constexpr (kStored.state == Form::kHalf)
        if (row.unbiased >> (kState + i) & 1) round(state, [phase](uint32_t i) { return threshold_of(phase, i); });
      x.states[i].encode(state, dtype);
    }
    x.states[i].store(row.data[kState + i], tile);
  }
  if (zeroes) leave_zeros();
}

}  // namespace genopt::cuda
