// Quantization on the CPU without torch, for sanitizers: memory of exactly the size needed, and every code, scale and
// number as code.h gives it element by element, whatever the walk. Values are tested in tests/test_quant.py.
#include <cstdlib>
#include <random>

#include "check.h"
#include "cpu/run.h"
#include "quant/cpu.h"

using namespace genopt;
using namespace genopt::quant;

int threads = 2;

struct Shape {
  int64_t outer, units, run;
};

template <class Codec, class T>
void test(int64_t numel, int64_t run, int64_t units, bool blocks, int bits, bool symmetric, bool stochastic) {
  using Stored = typename Codec::Stored;
  const std::string what = std::to_string(sizeof(Stored)) + " bytes, numel " + std::to_string(numel) + ", run " +
                           std::to_string(run) + ", units " + std::to_string(units) + ", bits " + std::to_string(bits) +
                           (symmetric ? ", symmetric" : "") + (stochastic ? ", stochastic" : "");
  std::mt19937 random(static_cast<unsigned>(numel));
  std::normal_distribution<double> normal(0.3);
  std::vector<Stored> x(numel), back(numel);
  for (Stored& each : x) each = Codec::encode(normal(random));
  std::vector<uint8_t> codes(bits == 8 ? numel : (numel + 1) / 2);
  std::vector<float> scale(units);
  std::vector<int8_t> zero_point(symmetric ? 0 : units);
  Quantization q{};
  q.numbers = x.data();
  q.dtype = Codec::kDType;
  q.numel = numel;
  q.run = run;
  q.units = units;
  q.codes = codes.data();
  q.scale = scale.data();
  q.zero_point = symmetric ? nullptr : zero_point.data();
  q.bits = bits;
  q.stochastic = stochastic;
  q.seed = 0x123456789abcdef0;
  if (blocks) {
    quant::cpu::quantize_blocks(q, threads);
  } else {
    quant::cpu::find_scales(q, threads);
    quant::cpu::encode(q, threads);
  }
  const CodeRange range = q.code_range();
  std::vector<Reach<T>> reach(units);
  for (int64_t i = 0; i < numel; ++i) {
    const T value = Codec::template decode<T>(x[i]);
    symmetric ? reach[i / run % units].template add<true>(value) : reach[i / run % units].template add<false>(value);
  }
  const auto code_at = [&](int64_t i) {
    return bits == 8 ? static_cast<int8_t>(codes[i]) : unpack(codes[i / 2], static_cast<int>(i % 2));
  };
  for (int64_t i = 0; i < numel; ++i) {
    const int64_t unit = i / run % units;
    const float expected = scale_of(reach[unit], range);
    const int point = zero_point_of(reach[unit], expected, range);
    CHECK(scale[unit] == expected && q.zero_point_at(unit) == point, what);
    const Encoder<T> encoder(expected, point, range);
    const T value = Codec::template decode<T>(x[i]);
    const float u = random_number(random_key(q.seed, 0), static_cast<uint32_t>(i));
    CHECK(code_at(i) ==
              (stochastic ? encoder.template operator()<true>(value, u) : encoder.template operator()<false>(value, u)),
          what + ", element " + std::to_string(i));
  }
  q.numbers = back.data();
  quant::cpu::decode(q, threads);
  for (int64_t i = 0; i < numel; ++i) {
    const int64_t unit = i / run % units;
    const T number = number_behind<T>(code_at(i), q.zero_point_at(unit), scale[unit], largest_of<T>(Codec::kDType));
    CHECK(back[i] == Codec::encode(number), what + ", element " + std::to_string(i));
  }
}

int main() {
  if (const char* wanted = std::getenv("GENOPT_CPU_CAPABILITY")) {
    bool found = false;
    for (const std::string& name : genopt::cpu::capabilities()) found = found || name == wanted;
    if (!found) return 77;  // this processor lacks it
  }
  for (const int bits : {8, 4})
    for (const int flags : {0, 1, 2, 3}) {
      const auto all = [&](int64_t numel, int64_t run, int64_t units, bool blocks) {
        test<Float32, float>(numel, run, units, blocks, bits, flags & 1, flags & 2);
        test<Float64, double>(numel, run, units, blocks, bits, flags & 1, flags & 2);
        test<BFloat16, float>(numel, run, units, blocks, bits, flags & 1, flags & 2);
        test<Float16, float>(numel, run, units, blocks, bits, flags & 1, flags & 2);
      };
      for (const int64_t block : {32, 256, 4096})
        for (const int64_t numel : {1, 7, 31, 33, 255, 257, 4099, 70001})
          all(numel, block, (numel + block - 1) / block, true);
      for (const Shape& s :
           {Shape{1, 1, 1}, {3, 5, 7}, {2, 40, 1}, {300, 33, 1}, {4, 3, 2000}, {1, 1, 4099}, {9, 700, 5}})
        all(s.outer * s.units * s.run, s.run, s.units, false);
    }
  // Large enough, and by enough threads, to be stored non-temporally.
  threads = 8;
  test<Float32, float>((4 << 20) + 77, 256, (4 << 12) + 1, true, 8, true, false);
}
