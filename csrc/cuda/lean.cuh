// The last kernel of a step, for usual rows: contiguous, aligned, without average, and stored in one of a few ways that
// are known when this is compiled. Load, join, rule, part, round, as cpu/assembly.h; one warp, one tile. The general
// update (update.cuh) has registers for whatever a row may be; this one has what it needs, so that enough warps run to
// keep memory busy. The same rules, codecs and bits.
#pragma once

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

// How many blocks are to run on a processor: up to 80 registers a thread let six, as many as memory needs; codes are
// computed for longer, and need seven, which registers let where a rule has up to nine scalars. With three states
// registers let five, with four four.
template <class Rule>
constexpr int lean_blocks(unsigned used, const Way& way, bool cautious) {
  constexpr bool kFewScalars = sizeof(typename Rule::template Update<float>) <= 9 * sizeof(float);
  return used == 0b1111 ? 4 : used == 0b111 ? 5 : way.state == Form::kCodes && kFewScalars && !cautious ? 7 : 6;
}

// kUsed: a set of the rule's states, as in Rule::Masks.
template <class Rule, unsigned kUsed, int kWay, bool kCautious>
__global__ void __launch_bounds__(kThreads, lean_blocks<Rule>(kUsed, kWays[kWay], kCautious))
    lean_update(const __grid_constant__ Table table, const __grid_constant__ TileRange range) {
  constexpr Way kStored = kWays[kWay];
  constexpr bool kHasMaster = kStored.extra == Extra::kMaster, kHasRest = kStored.extra == Extra::kCompensation;
  constexpr Form kSeen = kHasMaster ? Form::kFloat : kStored.param;  // the parameter as the rule sees it
  constexpr bool kHasFloats = kSeen == Form::kFloat || (kUsed && kStored.state == Form::kFloat);
  constexpr int kPiece = kHasFloats ? 4 : 8;  // 16 bytes of the widest operand
  if (warp_here() >= range.tiles) return;
  const TileHere found = find_lean_tile(table, range);
  const uint64_t grad = table.words[table.grad(found.row)];
  if (!grad) return;
  const DeviceRow& row = *reinterpret_cast<const DeviceRow*>(table.words + table.row(found.row));
  const Tile tile{found.start, count_of(row.numel - found.start), lane_here()};
  const DType dtype = row.dtype[kParam];
  const bool zeroes = table.gradients == Gradients::kZeroed;
  void* const gradient = reinterpret_cast<void*>(grad);
  LeanOperand<kStored.param, kPiece> g;
  float values[kState + kMaxStates][kElements];
  const auto leave_zeros = [&] {
#pragma unroll
    for (int j = 0; j < kElements; ++j) values[kGrad][j] = 0;
    g.encode(values[kGrad], dtype);
    g.store(gradient, tile);
  };
  if (table.may_skip && table.words[Table::kSkip] != 0) {
    if (zeroes) leave_zeros();
    return;
  }

  LeanOperand<kSeen, kPiece> p;
  LeanOperand<kStored.state, kPiece> states[kMaxStates];
  float scales[kMaxStates];
  p.load(row.data[kHasMaster ? kExtra : kParam], tile, kOrdinary);
  g.load(gradient, tile, kOrdinary);
  LeanOperand<kStored.param, kPiece> rest;
  if constexpr (kHasRest) rest.load(row.data[kExtra], tile, kOrdinary);
#pragma unroll
  for (int i = 0; i < kMaxStates; ++i) {
    if (!(kUsed >> i & 1)) continue;
    states[i].load(row.data[kState + i], tile, kOrdinary);
    if constexpr (kStored.state == Form::kCodes) scales[i] = row.scales[i][tile.start / kTile];
  }
  const auto scalars = scalars_of<Scalars<Rule, float>>(table, row, found.row);
  p.decode(values[kParam], dtype);
  g.decode(values[kGrad], dtype);
  if constexpr (kHasRest) {
    float rests[kElements];
    rest.decode(rests, dtype);
#pragma unroll
    for (int j = 0; j < kElements; ++j) values[kParam][j] += rests[j];
  }
#pragma unroll
  for (int i = 0; i < kMaxStates; ++i) {
    if (!(kUsed >> i & 1)) continue;
    if constexpr (kStored.state != Form::kCodes) {
      states[i].decode(values[kState + i], dtype);
    } else {
      with_block_of<Rule>(i, scales[i], [&](const auto& block) { states[i].decode(values[kState + i], block); });
    }
  }
#pragma unroll
  for (int j = 0; j < kElements; ++j)
    scalars.update.template apply<kUsed | (kCautious ? kMayBeCautious : 0u)>(
        values[kParam][j], scalars.around.gradient(values[kGrad][j]), values[kState][j], values[kState + 1][j],
        values[kState + 2][j], values[kState + 3][j]);

  // To one of the neighbours that a 16-bit dtype has. `bits(i)`: 32 for element i of the tile.
  const auto round = [&](float (&x)[kElements], auto bits) {
#pragma unroll
    for (int j = 0; j < kElements; ++j)
      x[j] = round_by(dtype, x[j], bits(static_cast<uint32_t>(tile.template element<kPiece>(j))));
  };
  if constexpr (kHasMaster) {
    LeanOperand<kStored.param, kPiece> narrow;
    narrow.encode(values[kParam], dtype);
    narrow.store(row.data[kParam], tile);
  } else if constexpr (kSeen == Form::kHalf) {
    if (row.unbiased & 1 << kParam) {
      const uint32_t key = tile_key(scalars.random, tile.start);
      round(values[kParam], [key](uint32_t i) { return random_bits(key, i); });
    }
  }
  p.encode(values[kParam], dtype);
  p.store(row.data[kHasMaster ? kExtra : kParam], tile);
  if constexpr (kHasRest) {  // what storing leaves over
    float rounded[kElements];
    p.decode(rounded, dtype);
#pragma unroll
    for (int j = 0; j < kElements; ++j)
      values[kParam][j] = rounded[j] - rounded[j] == 0 ? values[kParam][j] - rounded[j] : 0;
    rest.encode(values[kParam], dtype);
    rest.store(row.data[kExtra], tile);
  }
  const uint32_t phase = tile_phase(scalars.phase, tile.start);
  if constexpr (kStored.state == Form::kCodes) __syncwarp();  // all lanes have read the scales that one writes
#pragma unroll
  for (int i = 0; i < kMaxStates; ++i) {
    if (!(kUsed >> i & 1)) continue;
    float (&x)[kElements] = values[kState + i];
    if constexpr (kStored.state == Form::kCodes) {
      with_block_of<Rule>(i, scales[i], [&]<class Block>(const Block&) {
        const float scale = states[i].template encode_block<Block>(x, phase, tile);
        if (tile.lane == 0) row.scales[i][tile.start / kTile] = scale;
      });
    } else {
      if constexpr (kStored.state == Form::kHalf)
        if (row.unbiased >> (kState + i) & 1) round(x, [phase](uint32_t i) { return threshold_of(phase, i); });
      states[i].encode(x, dtype);
    }
    states[i].store(row.data[kState + i], tile);
  }
  if (zeroes) leave_zeros();
}

// All lean kernels of an optimizer's rule: one for each of its sets of states and each way that these can be stored,
// and of these again for cautious decay, if the rule has it.
template <class Rule>
std::vector<LeanKernel> lean_kernels() {
  std::vector<LeanKernel> kernels;
  const auto add = [&]<unsigned kUsed, int kWay>() {
    if constexpr (!std::is_same_v<Rule, Transfer> && (kUsed || kWays[kWay].state == Form::kFloat))
      kernels.push_back({kUsed, kWay, false, lean_update<Rule, kUsed, kWay, false>});
    if constexpr (kAnyDecay<Rule> && (kUsed || kWays[kWay].state == Form::kFloat))
      kernels.push_back({kUsed, kWay, true, lean_update<Rule, kUsed, kWay, true>});
  };
  [&]<unsigned... kMasks>(StateMasks<kMasks...>) {
    const auto add_ways = [&]<unsigned kUsed, int... kWay>(std::integer_sequence<int, kWay...>) {
      (add.template operator()<kUsed, kWay>(), ...);
    };
    (add_ways.template operator()<kMasks>(std::make_integer_sequence<int, kWayCount>{}), ...);
  }(typename Rule::Masks{});
  return kernels;
}

}  // namespace genopt::cuda
