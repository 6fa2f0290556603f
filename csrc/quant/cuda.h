// Quantization on CUDA: launches on a queue. The kernels: cuda.cu.
#pragma once

#include "../cuda/device_plan.h"
#include "quantization.h"

namespace genopt::quant::cuda {

using genopt::cuda::Queue;

// As cpu.h, on the current device. Nothing is waited for; all throw std::runtime_error where a launch fails.
void quantize_blocks(const Quantization& q, const Queue& queue);
// `ranges`: two words of zero for each unit.
void find_scales(const Quantization& q, void* ranges, const Queue& queue);
void encode(const Quantization& q, const Queue& queue);
void decode(const Quantization& q, const Queue& queue);

}  // namespace genopt::quant::cuda
