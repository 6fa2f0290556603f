// Steps and quantization on the CPU, without torch, for callgrind to count: see instructions.py.
#include <valgrind/callgrind.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "cpu/run.h"
#include "quant/cpu.h"

using namespace genopt;

namespace {

// One optimizer and its rows of `numel` elements each.
struct Steps {
  Plan plan;
  std::vector<std::vector<float>> memory;  // of every operand of every row; large enough for any dtype
  std::vector<float> counters;

  Steps(const char* rule, Options options, int rows, int64_t numel, DType weights = DType::kFloat32, bool codes = false)
      : plan(rule_info(rule)), counters(rows) {
    plan.groups = {options};
    for (int r = 0; r < rows; ++r) {
      Row& row = plan.rows.emplace_back();
      row.numel = numel;
      row.active = true;
      row.used = plan.rule.used_states(options);
      if (plan.rule.has_step) row.step = &counters[r];
      for (int k = 0; k < kState + static_cast<int>(plan.rule.states.size()); ++k) {
        if (!is_used(row.used, k)) continue;
        const bool square = k >= kState && plan.rule.squares >> (k - kState) & 1;
        row.dtype[k] = k < kState || !codes ? weights : square ? DType::kUInt8 : DType::kInt8;
        std::vector<float>& operand = memory.emplace_back(numel);
        row.data[k] = operand.data();
        for (int64_t i = 0; k < kState && i < numel; ++i)
          with_codec(weights, [&]<class Codec>(Codec) {
            static_cast<typename Codec::Stored*>(row.data[k])[i] = Codec::encode(0.5f + static_cast<float>(i % 97));
          });
        if (k >= kState && codes) row.scales[k - kState] = memory.emplace_back(tiles_of(numel)).data();
      }
    }
  }
  void operator()() {
    cpu::step(plan, 1);
  }
};

// {lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay}
Options adamw() {
  Options options = kNoOptions;
  const double own[] = {1e-3, 0.9, 0.999, 1e-8, 0.01, 0, 0, 1};
  std::copy(std::begin(own), std::end(own), options.begin());
  return options;
}

// {lr, momentum, dampening, weight_decay, nesterov, maximize}
Options sgd() {
  Options options = kNoOptions;
  const double own[] = {1e-2, 0.9, 0, 0.01, 0, 0};
  std::copy(std::begin(own), std::end(own), options.begin());
  return options;
}

// Counts of one and of three runs: their difference is free of what a count itself costs.
void count(const std::string& name, int64_t elements, const std::function<void()>& run) {
  run();  // a first step is another one: states are unset
  for (const int runs : {1, 3}) {
    CALLGRIND_ZERO_STATS;
    for (int i = 0; i < runs; ++i) run();
    const std::string label = name + "@" + std::to_string(runs);
    CALLGRIND_DUMP_STATS_AT(label.c_str());
  }
  std::printf("case\t%s\t%lld\n", name.c_str(), static_cast<long long>(elements));
}

void count_steps(const std::string& name, Steps steps) {
  count(name, steps.plan.rows.size() * steps.plan.rows[0].numel, std::ref(steps));
}

}  // namespace

int main() {
  std::printf("compiler\t%s\ncapability\t%s\n", __VERSION__, cpu::capability().c_str());
  constexpr int64_t kLarge = 1 << 18;
  count_steps("AdamW 256K", {"adam", adamw(), 1, kLarge});
  count_steps("AdamW 2000x64", {"adam", adamw(), 2000, 64});
  count_steps("AdamW bf16 20x4096", {"adam", adamw(), 20, 4096, DType::kBFloat16});
  count_steps("AdamW int8 256K", {"adam", adamw(), 1, kLarge, DType::kFloat32, true});
  Steps clipped("adam", adamw(), 20, 4096);
  clipped.plan.control.max_norm = 1;
  clipped.plan.control.measure = true;
  count_steps("AdamW clipped 20x4096", std::move(clipped));
  count_steps("SGD momentum 256K", {"sgd", sgd(), 1, kLarge});

  std::vector<float> numbers(kLarge), scale(kLarge / 256);
  std::vector<int8_t> codes(kLarge);
  for (int64_t i = 0; i < kLarge; ++i) numbers[i] = static_cast<float>(i % 97) - 48;
  quant::Quantization q{};
  q.numbers = numbers.data();
  q.dtype = DType::kFloat32;
  q.numel = kLarge;
  q.run = 256;
  q.units = kLarge / 256;
  q.codes = codes.data();
  q.scale = scale.data();
  q.bits = 8;
  count("quantize block 256 256K", kLarge, [&] { quant::cpu::quantize_blocks(q, 1); });
  count("dequantize block 256 256K", kLarge, [&] { quant::cpu::decode(q, 1); });
}
