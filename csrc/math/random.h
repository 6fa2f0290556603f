// What decides which way to round: random bits for weights, evenly spread thresholds for moments. Functions of step and
// element (bits: and of the seed) alone, so that a run repeats and every backend draws the same. 32-bit integer
// arithmetic, which vectorizes everywhere.
#pragma once

#include "numbers.h"

namespace genopt {

// A bijection of 32 bits of which every input bit changes every output bit with probability near 1/2 (the constants are
// those of C. Wellons' "lowbias32").
template <class U>
GENOPT_INLINE U mix(U x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// What all draws of one step share. `t`: the step count.
GENOPT_INLINE uint32_t step_key(double seed, double t) {
  const auto low = [](double x) { return static_cast<uint32_t>(static_cast<uint64_t>(x > 0 ? x : 0)); };
  return mix(low(seed) ^ mix(low(t)));
}

// Of the elements of a tile that begins at element `start`. That of a part of a larger tensor may begin anywhere: where
// it crosses a multiple of 2^32, the last of its elements draw other bits than they would in the whole.
GENOPT_INLINE uint32_t tile_key(uint32_t step_key, int64_t start) {
  return mix(step_key ^ static_cast<uint32_t>(start >> 32)) + static_cast<uint32_t>(start);
}

// 32 bits for element i of a tile; `U`: uint32_t, or several.
template <class U>
GENOPT_INLINE U random_bits(uint32_t tile_key, U i) {
  return mix(tile_key + i);
}

// Moments move by a small part of what separates two codes. For them evenly spread thresholds do better than random
// bits: a Weyl sequence, frac(phase + t · φ) with the golden ratio φ, in units of 2^-32, by which an element is rounded
// up in as many of a hundred steps as it is hundredths above the lower code. All moments of an element share its
// threshold. The phase changes every 256 steps: gradients that return after a Fibonacci number of steps would else meet
// the same thresholds.
GENOPT_INLINE uint32_t step_phase(double t) {
  const uint32_t step = static_cast<uint32_t>(static_cast<uint64_t>(t > 0 ? t : 0));
  return step * 0x9e3779b9u + mix(step >> 8);
}
constexpr uint32_t kPhaseStride = 0x91e10da5u;  // from one element to the next
GENOPT_INLINE uint32_t tile_phase(uint32_t step_phase, int64_t start) {
  return step_phase + static_cast<uint32_t>(start) * kPhaseStride;
}
template <class U>
GENOPT_INLINE U threshold_of(uint32_t tile_phase, U i) {
  return tile_phase + i * kPhaseStride;
}

}  // namespace genopt
