// Quantization's torch side: tensors as quant/quantization.h wants them, on the device where they are. What tensors
// have to be like is checked in genopt_ext/quant.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <stdexcept>

#include "../quant/cpu.h"
#include "devices.h"
#ifdef GENOPT_CUDA
#include "../quant/cuda.h"
#endif

namespace genopt::quant {

// Contiguous tensors of one device; where `seed` stands on the CPU it is read at once. Those not needed are undefined.
struct Tensors {
  at::Tensor numbers, codes, scale, zero_point, seed;
};

inline DType number_dtype(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      throw std::invalid_argument("genopt_ext: kernels quantize floating-point tensors alone");
  }
}

inline Quantization read(const Tensors& tensors, int bits, int64_t run) {
  const auto address = [](const at::Tensor& t) { return t.defined() && t.numel() ? t.data_ptr() : nullptr; };
  Quantization q{};
  q.numbers = address(tensors.numbers);
  q.dtype = number_dtype(tensors.numbers);
  q.numel = tensors.numbers.numel();
  q.run = run;
  q.units = tensors.scale.numel();
  q.codes = address(tensors.codes);
  q.scale = static_cast<float*>(address(tensors.scale));
  q.zero_point = static_cast<int8_t*>(address(tensors.zero_point));
  q.bits = bits;
  q.stochastic = tensors.seed.defined();
  if (q.stochastic && tensors.seed.is_cpu()) q.seed = *static_cast<const uint64_t*>(address(tensors.seed));
  if (q.stochastic && !tensors.seed.is_cpu()) q.seed_address = static_cast<const uint64_t*>(address(tensors.seed));
  return q;
}

// Calls on_host(threads), or where kernels serve the device on_device(queue).
template <class OnHost, class OnDevice>
void dispatch(const Tensors& tensors, OnHost on_host, OnDevice on_device) {
#ifdef GENOPT_CUDA
  const int device = kernel_device(tensors.numbers);
  if (device != kHost) return genopt::cuda::with_queue(device, on_device);
#endif
  on_host(at::get_num_threads());
}

#ifdef GENOPT_CUDA
namespace device = cuda;
#else
namespace device {  // never called
template <class... Arguments>
void quantize_blocks(const Arguments&...) {
}
template <class... Arguments>
void find_scales(const Arguments&...) {
}
template <class... Arguments>
void encode(const Arguments&...) {
}
template <class... Arguments>
void decode(const Arguments&...) {
}
}  // namespace device
#endif

inline void quantize_blocks(const Tensors& tensors, int bits, int64_t run) {
  const Quantization q = read(tensors, bits, run);
  if (q.numel == 0) return;
  dispatch(
      tensors, [&](int threads) { cpu::quantize_blocks(q, threads); },
      [&](const auto& queue) { device::quantize_blocks(q, queue); });
}

// `ranges`: on CUDA, two int64 of zero for each unit, of which the kernels make use.
inline void find_scales(const Tensors& tensors, const at::Tensor& ranges, int bits, int64_t run) {
  const Quantization q = read(tensors, bits, run);
  if (q.units == 0) return;
  dispatch(
      tensors, [&](int threads) { cpu::find_scales(q, threads); },
      [&](const auto& queue) { device::find_scales(q, ranges.data_ptr(), queue); });
}

inline void encode(const Tensors& tensors, int bits, int64_t run) {
  const Quantization q = read(tensors, bits, run);
  if (q.numel == 0) return;
  dispatch(
      tensors, [&](int threads) { cpu::encode(q, threads); }, [&](const auto& queue) { device::encode(q, queue); });
}

inline void decode(const Tensors& tensors, int bits, int64_t run) {
  const Quantization q = read(tensors, bits, run);
  if (q.numel == 0) return;
  dispatch(
      tensors, [&](int threads) { cpu::decode(q, threads); }, [&](const auto& queue) { device::decode(q, queue); });
}

}  // namespace genopt::quant
