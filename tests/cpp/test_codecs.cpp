// Codecs: every 16-bit pattern survives, and encoding rounds to nearest even as a slow search in double does.
#include <algorithm>
#include <cmath>
#include <random>

#include "check.h"
#include "codecs/plain.h"

using namespace genopt;

// The nearest of a codec's finite values, ties to the even pattern, overflow as IEEE says.
template <class Codec>
uint16_t nearest(float x, uint16_t infinity) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(static_cast<double>(x));
  uint16_t low = 0, high = infinity;  // patterns of positive values grow with the value
  while (high - low > 1) {
    const uint16_t middle = (low + high) / 2;
    (Codec::template decode<double>(middle) <= magnitude ? low : high) = middle;
  }
  const double below = Codec::template decode<double>(low);
  // What would follow the largest number stands for infinity.
  const double above =
      high == infinity ? 2 * below - Codec::template decode<double>(low - 1) : Codec::template decode<double>(high);
  const double middle = below + (above - below) / 2;
  if (std::isinf(magnitude) || magnitude > middle || (magnitude == middle && (low & 1))) return sign | high;
  return sign | low;
}

template <class Codec>
void test(uint16_t infinity, const char* name) {
  for (uint32_t pattern = 0; pattern < 65536; ++pattern) {
    const float value = Codec::template decode<float>(static_cast<uint16_t>(pattern));
    const uint16_t back = Codec::encode(value);
    if (std::isnan(value)) {
      CHECK(std::isnan(Codec::template decode<float>(back)), pattern);
    } else {
      CHECK(back == pattern, std::string(name) + " " + std::to_string(pattern));
    }
  }
  std::mt19937 random(0);
  for (int i = 0; i < 300000; ++i) {
    uint32_t bits = random();
    if (i % 3 == 0) bits &= 0xffff8000;                       // ties
    if (i % 3 == 1) bits = (bits & 0x87ffffff) | 0x38000000;  // around fp16's smaller numbers
    const float x = float_of(bits);
    if (std::isnan(x)) continue;
    CHECK(Codec::encode(x) == nearest<Codec>(x, infinity), std::string(name) + " " + std::to_string(bits));
  }
  for (const float x : {65504.0f, 65519.996f, 65520.0f, 3.4e38f, 1e-45f, 0x1p-25f, 0x1.8p-25f, -0.0f, INFINITY})
    CHECK(Codec::encode(x) == nearest<Codec>(x, infinity), x);
}

int main() {
  test<BFloat16>(0x7f80, "bf16");
  test<Float16>(0x7c00, "fp16");
}
