// The floor that benchmarks compare with: a walk that moves the bytes of a step and computes nothing.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace genopt::cpu {

// Reads `bytes` (a multiple of 64) of every array together, front to back, and writes back those whose
// second member is true. Arrays are addresses, at most 8, each aligned to 64. `fresh`: these are not read but only
// written, past the caches where that is faster.
void stream(const std::vector<std::pair<uintptr_t, bool>>& arrays, int64_t bytes, int threads, bool fresh);

}  // namespace genopt::cpu
