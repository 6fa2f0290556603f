// What decides on the way to round, for weights (random bits) and for moments (evenly spread ones): a function of seed,
// step and element alone, so that a run repeats and every backend draws the same. 32-bit integer arithmetic, which
// vectorizes everywhere.
#pragma once

#include "math.h"

namespace genopt {

// A bijection of 32 bits of which every input bit changes every output bit with probability near 1/2 (the constants are
// those of C. Wellons' "lowbias32").
GENOPT_INLINE uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// What all draws of one step share. `t`: the step count.
GENOPT_INLINE uint32_t step_key(double seed, double t) {
  const auto low = [](double x) { return static_cast<uint32_t>(static_cast<uint64_t>(x > 0 ? x : 0)); };
  return mix(low(seed) ^ mix(low(t)));
}

// Of the elements of a tile that begins at element `start` of a row.
GENOPT_INLINE uint32_t tile_key(uint32_t step_key, int64_t start) {
  return mix(step_key ^ static_cast<uint32_t>(start >> 32)) + static_cast<uint32_t>(start);
}

// 32 bits for element i of a tile.
GENOPT_INLINE uint32_t random_bits(uint32_t tile_key, int i) {
  return mix(tile_key + static_cast<uint32_t>(i));
}

// Moments move by a small part of what separates two codes. For them evenly spread numbers do better than random ones:
// an element turns round the circle by the golden section at every step (Weyl's sequence), and so is rounded up in as
// many of a hundred steps as it is hundredths above the lower code. All moments of an element share its turn. Every 256
// steps it begins elsewhere: gradients that return after a Fibonacci number of steps would else meet the same turns.
GENOPT_INLINE uint32_t step_turn(double t) {
  const uint32_t step = static_cast<uint32_t>(static_cast<uint64_t>(t > 0 ? t : 0));
  return step * 0x9e3779b9u + mix(step >> 8);
}
GENOPT_INLINE uint32_t tile_turn(uint32_t step_turn, int64_t start) {
  return step_turn + static_cast<uint32_t>(start) * 0x91e10da5u;
}
GENOPT_INLINE uint32_t turn_of(uint32_t tile_turn, int i) {
  return tile_turn + static_cast<uint32_t>(i) * 0x91e10da5u;
}

}  // namespace genopt
