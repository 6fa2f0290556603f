// Codecs: every 16-bit pattern means what IEEE says and survives, and encoding rounds to nearest even. The
// reference knows only the formats' field widths and computes in double, where all of this is exact.
#include <cmath>
#include <random>

#include "check.h"
#include "codecs/plain.h"

using namespace genopt;

struct Format {
  const char* name;
  int fraction_bits, bias;
  uint16_t infinity;  // its pattern: above it lie the NaNs
};

static double value_of(uint16_t pattern, const Format& f) {
  const int magnitude = pattern & 0x7fff, exponent = magnitude >> f.fraction_bits;
  const int fraction = magnitude & ((1 << f.fraction_bits) - 1);
  const double sign = pattern & 0x8000 ? -1 : 1;
  if (magnitude >= f.infinity) return magnitude == f.infinity ? sign * INFINITY : NAN;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - f.bias - f.fraction_bits);
  return sign * std::ldexp(fraction + (1 << f.fraction_bits), exponent - f.bias - f.fraction_bits);
}

// The nearest of all patterns, ties to even; what would follow the largest finite number stands for infinity.
static uint16_t nearest(float x, const Format& f) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(static_cast<double>(x));
  uint16_t low = 0, high = f.infinity;  // patterns of positive values grow with the value
  while (high - low > 1) {
    const uint16_t middle = (low + high) / 2;
    (value_of(middle, f) <= magnitude ? low : high) = middle;
  }
  const double below = value_of(low, f);
  const double above = high == f.infinity ? 2 * below - value_of(low - 1, f) : value_of(high, f);
  const double middle = below + (above - below) / 2;
  return sign | (magnitude > middle || (magnitude == middle && (low & 1)) ? high : low);
}

template <class Codec>
void test(const Format& f) {
  const auto what = [&f](auto bits) { return std::string(f.name) + " bits " + std::to_string(bits); };
  const auto check = [&](float x) {
    CHECK(Codec::encode(x) == nearest(x, f), what(bits_of(x)));
    CHECK(Codec::encode(static_cast<double>(x)) == nearest(x, f), what(bits_of(x)));
  };
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t pattern = static_cast<uint16_t>(bits);
    const float value = Codec::template decode<float>(pattern);
    const double expected = value_of(pattern, f);
    if (std::isnan(expected)) {
      CHECK(std::isnan(value) && std::isnan(Codec::template decode<double>(pattern)), what(bits));
      CHECK(std::isnan(value_of(Codec::encode(value), f)), what(bits));
      continue;
    }
    CHECK(value == expected && std::signbit(value) == std::signbit(expected), what(bits));
    CHECK(Codec::template decode<double>(pattern) == expected, what(bits));
    CHECK(Codec::encode(value) == pattern, what(bits));
    // Halfway to the next pattern, and a little to both sides.
    if ((bits & 0x7fff) >= f.infinity - 1u) continue;
    const float tie = static_cast<float>((expected + value_of(pattern + 1, f)) / 2);
    for (const float x : {tie, std::nextafter(tie, -INFINITY), std::nextafter(tie, INFINITY)}) check(x);
  }
  std::mt19937 random(0);
  for (int i = 0; i < 300000; ++i) {
    uint32_t bits = random();
    if (i % 2) bits = (bits & 0x87ffffff) | 0x38000000;  // around fp16's smaller numbers
    if (const float x = float_of(bits); std::isnan(x)) {
      CHECK(std::isnan(value_of(Codec::encode(x), f)), what(bits));
    } else {
      check(x);
    }
  }
  // The ends: overflow, the largest and smallest floats, signed zeros, and NaNs whose payload would round away.
  for (const float x : {65504.0f, 65519.996f, 65520.0f, 65536.0f, 0x1.fep127f, 0x1.fefffep127f, 0x1.ffp127f,
                        0x1.fffffep127f, 1e-45f, 0x1p-126f, 0x1p-25f, 0x1.000002p-25f, 0x1.8p-24f, 0.0f, INFINITY}) {
    check(x);
    check(-x);
  }
  for (const uint32_t bits : {0x7f800001u, 0x7f80ffffu, 0x7fffffffu, 0xff800001u, 0xffffffffu, 0x7fc00000u})
    CHECK(std::isnan(value_of(Codec::encode(float_of(bits)), f)), what(bits));
}

int main() {
  test<BFloat16>({"bf16", 7, 127, 0x7f80});
  test<Float16>({"fp16", 10, 15, 0x7c00});
}
