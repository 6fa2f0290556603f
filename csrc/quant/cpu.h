// Quantization on the CPU: chooses the instruction set as cpu/run.h does, and spreads pieces over threads.
#pragma once

#include "quantization.h"

namespace genopt::quant::cpu {

// All work on up to `threads` threads; results do not depend on their number.

// Scales, zero points and codes of blocks, in one pass; without codes: scales and zero points alone.
void quantize_blocks(const Quantization& q, int threads);

// Scales and zero points of units that are no blocks.
void find_scales(const Quantization& q, int threads);

// Codes with the scales and zero points that are there.
void encode(const Quantization& q, int threads);

// Numbers from codes.
void decode(const Quantization& q, int threads);

}  // namespace genopt::quant::cpu
