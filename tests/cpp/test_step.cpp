// Whole steps against the rule applied element by element: every rule, set of states, dtype and tail, with buffers
// of exactly the right size, so that a sanitizer sees every read or write beside them.
#include <cstring>
#include <random>

#include "check.h"
#include "cpu/run.h"

using namespace genopt;

static std::mt19937 random_bits(0);

struct Buffer {
  std::vector<unsigned char> bytes;
  DType dtype;

  Buffer(DType dtype, int64_t count, bool positive) : bytes(count * size_of(dtype)), dtype(dtype) {
    std::uniform_real_distribution<double> uniform(positive ? 0.01 : -1, 1);
    for (int64_t i = 0; i < count; ++i) set(i, uniform(random_bits) + (positive ? 0 : 2));
  }
  double get(int64_t i) const {
    return with_codec(dtype, [&](auto codec) {
      typename decltype(codec)::Stored value;
      std::memcpy(&value, bytes.data() + i * sizeof value, sizeof value);
      return decltype(codec)::template decode<double>(value);
    });
  }
  template <class T>
  void set(int64_t i, T x) {
    with_codec(dtype, [&](auto codec) {
      const auto value = decltype(codec)::encode(x);
      std::memcpy(bytes.data() + i * sizeof value, &value, sizeof value);
    });
  }
};

// One tensor: its operands, and how far apart their elements lie (1: dense).
struct Tensor {
  std::vector<Buffer> operands;
  std::vector<int64_t> gaps;
  Layout layout;
  float step = 4;
  int64_t numel;
  bool active;

  Tensor(DType dtype, int64_t numel, unsigned used, bool strided, bool active) : numel(numel), active(active) {
    std::array<std::vector<int64_t>, kOperands> strides;
    std::array<const int64_t*, kOperands> pointers{};
    for (int k = 0; k < kOperands; ++k) {
      const bool in_use = k < kState || (used >> (k - kState) & 1);
      gaps.push_back(strided ? 1 + k % 3 : 1);
      operands.emplace_back(dtype, in_use && numel ? (numel - 1) * gaps[k] + 1 : 0, k >= kState);
      strides[k] = {gaps[k]};
      if (in_use) pointers[k] = strides[k].data();
    }
    layout = make_layout({numel}, pointers);
  }
  Row row(bool strided) {
    Row row;
    row.numel = numel;
    row.active = active;
    row.step = &step;
    row.layout = strided ? &layout : nullptr;
    for (int k = 0; k < kOperands; ++k) {
      row.dtype[k] = operands[k].dtype;
      row.data[k] = operands[k].bytes.empty() ? nullptr : operands[k].bytes.data();
    }
    return row;
  }
};

template <class Rule, unsigned kUsed, class T>
void expect(Tensor& t, const Options& options) {
  typename Rule::Options typed;
  std::memcpy(&typed, options.data(), sizeof typed);
  t.step += 1;
  const typename Rule::template Update<T> update(typed, t.step, false);
  int64_t moved = 0;  // weight decay may cancel a gradient here and there
  for (int64_t i = 0; i < t.numel; ++i) {
    T x[kOperands] = {};
    for (int k = 0; k < kOperands; ++k)
      if (!t.operands[k].bytes.empty()) x[k] = static_cast<T>(t.operands[k].get(i * t.gaps[k]));
    const T before = x[kParam];
    update.template apply<kUsed>(x[kParam], x[kGrad], x[kState], x[kState + 1], x[kState + 2]);
    moved += x[kParam] != before;
    for (int k = 0; k < kOperands; ++k)
      if (k != kGrad && !t.operands[k].bytes.empty()) t.operands[k].set(i * t.gaps[k], x[k]);
  }
  CHECK(moved * 10 >= t.numel * 9 - 20, Rule::kName);
}

template <class Rule, unsigned kUsed>
void test(Options options) {
  const RuleInfo& info = rule_info(Rule::kName);
  if (info.used_states(options) != kUsed) return;
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16})
    for (const bool strided : {false, true})
      for (const int threads : {1, 3}) {
        std::vector<Tensor> tensors;
        for (const int64_t numel : {1, 7, 255, 256, 257, 0, 4099, threads > 1 && dtype == DType::kFloat32 ? 70000 : 16})
          for (const bool active : {true, false}) tensors.emplace_back(dtype, numel, kUsed, strided, active);
        std::vector<Tensor> expected = tensors;
        Plan plan(info);
        plan.groups = {options};
        for (Tensor& t : tensors) plan.rows.push_back(t.row(strided));
        plan.prepare(cpu::kernel_table());
        cpu::run(plan, threads);
        const std::string what = std::string(info.name) + " states " + std::to_string(kUsed) + " dtype " +
                                 std::to_string(static_cast<int>(dtype)) + (strided ? " strided" : "");
        for (size_t i = 0; i < tensors.size(); ++i) {
          if (expected[i].active) {
            if (dtype == DType::kFloat64) {
              expect<Rule, kUsed, double>(expected[i], options);
            } else {
              expect<Rule, kUsed, float>(expected[i], options);
            }
          }
          CHECK(tensors[i].step == expected[i].step, what);
          for (int k = 0; k < kOperands; ++k)
            CHECK(tensors[i].operands[k].bytes == expected[i].operands[k].bytes,
                  what + " numel " + std::to_string(tensors[i].numel) + " operand " + std::to_string(k));
        }
      }
}

template <class Rule, unsigned... kMasks>
void test_all(StateMasks<kMasks...>) {
  // Every combination of a few values for every option.
  const size_t count = std::size(Rule::kOptions);
  for (unsigned bits = 0; bits < 1u << count; ++bits) {
    Options options{};
    for (size_t i = 0; i < count; ++i) {
      const std::string key = Rule::kOptions[i].key;
      const bool flag = key == "amsgrad" || key == "maximize" || key == "decoupled_weight_decay" || key == "nesterov" ||
                        key == "centered";
      const bool on = bits >> i & 1;
      options[i] = flag ? on : key == "lr" ? 0.25 : key == "eps" ? 1e-8 : on ? 0.75 : 0.0;
    }
    if (bits % 5 == 0 || bits + 1 == 1u << count) (test<Rule, kMasks>(options), ...);
  }
}

int main() {
  const char* variable = std::getenv("GENOPT_CPU_CAPABILITY");
  const std::string wanted = variable ? variable : "default";
  bool found = false;
  for (const std::string& name : cpu::capabilities()) found = found || name == wanted;
  if (!found) return 77;  // this processor lacks it
  for_each_rule([]<class Rule, int kIndex>() { test_all<Rule>(typename Rule::Masks{}); });
}
