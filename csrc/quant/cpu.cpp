// See cpu.h.
#include "cpu.h"

#include <mutex>

#include "../cpu/run.h"
#include "../cpu/threads.h"

namespace genopt::quant {

namespace baseline {
const Kernels& kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
#endif

namespace cpu {
namespace {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__x86_64__)
    if (genopt::cpu::capability() == "avx512") return avx512::kernels();
    if (genopt::cpu::capability() == "avx2") return avx2::kernels();
#endif
    return baseline::kernels();
  }();
  return chosen;
}

bool writes_codes_non_temporally(const Quantization& q, int threads) {
  return genopt::cpu::writes_non_temporally(q.numel * q.bits / 8, threads);
}

// Calls work(begin, end) with pieces of `q`, on several threads.
template <class Work>
void for_pieces(const Quantization& q, int threads, Work work) {
  constexpr int64_t kPiecesPerThread = 8;
  genopt::cpu::in_parallel((q.numel + kPiece - 1) / kPiece, kPiecesPerThread, threads, work);
}

template <class T>
void find_scales_in(const Quantization& q, int threads) {
  const size_t units = q.units;
  std::vector<Key<T>> high(units), low(units);
  std::mutex mutex;
  for_pieces(q, threads, [&](int64_t begin, int64_t end) {
    std::vector<Key<T>> high_here(units), low_here(units);
    const Reaches<T> reaches{high_here.data(), low_here.data()};
    kernels().measure(q, &reaches, begin, end);
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < units; ++i) {  // of maxima, any order of threads does
      high[i] = std::max(high[i], high_here[i]);
      low[i] = std::max(low[i], low_here[i]);
    }
  });
  const CodeRange range = q.code_range();
  for (size_t i = 0; i < units; ++i) {
    const Reach<T> reach{high[i], low[i]};
    q.scale[i] = scale_of(reach, range);
    if (q.zero_point) q.zero_point[i] = static_cast<int8_t>(zero_point_of(reach, q.scale[i], range));
  }
}

template <class T>
void encode_in(const Quantization& q, int threads) {
  std::vector<T> inverse, lowest, highest;
  std::vector<int> zero_point;
  for (int64_t unit = 0; unit < q.units; ++unit) {
    const Encoder<T> encoder(q.scale[unit], q.zero_point_at(unit), q.code_range());
    inverse.push_back(encoder.inverse);
    lowest.push_back(encoder.lowest);
    highest.push_back(encoder.highest);
    zero_point.push_back(encoder.zero_point);
  }
  const Encoders<T> encoders{inverse.data(), lowest.data(), highest.data(), zero_point.data()};
  const bool non_temporal = writes_codes_non_temporally(q, threads);
  for_pieces(q, threads, [&](int64_t begin, int64_t end) { kernels().encode(q, non_temporal, &encoders, begin, end); });
}

}  // namespace

void quantize_blocks(const Quantization& q, int threads) {
  const bool non_temporal = writes_codes_non_temporally(q, threads);
  for_pieces(q, threads, [&](int64_t begin, int64_t end) { kernels().quantize_blocks(q, non_temporal, begin, end); });
}

void find_scales(const Quantization& q, int threads) {
  q.dtype == DType::kFloat64 ? find_scales_in<double>(q, threads) : find_scales_in<float>(q, threads);
}

void encode(const Quantization& q, int threads) {
  q.dtype == DType::kFloat64 ? encode_in<double>(q, threads) : encode_in<float>(q, threads);
}

void decode(const Quantization& q, int threads) {
  const bool non_temporal = genopt::cpu::writes_non_temporally(q.numel * size_of(q.dtype), threads);
  for_pieces(q, threads, [&](int64_t begin, int64_t end) { kernels().decode(q, non_temporal, begin, end); });
}

}  // namespace cpu
}  // namespace genopt::quant
