// Whole steps against the rule applied element by element, bit for bit: every rule, set of states, dtype, layout
// and tail in one plan per set of options, with heap buffers of exactly the right size, so that a sanitizer sees
// every access beside them. A backend's test says how it runs the steps: see test_backend.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "check.h"
#include "plan/plan.h"

using namespace genopt;

constexpr DType k32 = DType::kFloat32, k64 = DType::kFloat64, kB16 = DType::kBFloat16, kF16 = DType::kFloat16;
constexpr DType kDTypes[][3] = {{k32, k32, k32},    {k64, k64, k64},   {kB16, kB16, kB16},
                                {kF16, kF16, kF16}, {kB16, kB16, k32}, {k32, kB16, kF16},
                                {kF16, k32, kB16},  {k64, k32, kB16}};  // of param, grad, states
constexpr int64_t kSizes[] = {1, 7, 255, 256, 257, 4099, 0, 4096};
enum Kind { kContiguous, kOneElementOn, kTransposed, kSliced, kOneByteOn, kKinds };

struct Buffer {
  std::vector<unsigned char> bytes;
  DType dtype = k32;
  int64_t shift = 0;                 // in bytes, from the start of the allocation
  std::array<int64_t, 2> strides{};  // of the tensor's two dimensions

  template <class T>
  T get(int64_t at) const {
    return with_codec(dtype, [&](auto codec) {
      typename decltype(codec)::Stored value;
      std::memcpy(&value, bytes.data() + shift + at * sizeof value, sizeof value);
      return decltype(codec)::template decode<T>(value);
    });
  }
  template <class T>
  void set(int64_t at, T x) {
    with_codec(dtype, [&](auto codec) {
      const auto value = decltype(codec)::encode(x);
      std::memcpy(bytes.data() + shift + at * sizeof value, &value, sizeof value);
    });
  }
};

struct Tensor {
  int64_t numel;
  Kind kind;
  bool active, unset, double_step;
  unsigned used;
  std::array<int64_t, 2> sizes;
  std::array<Buffer, kOperands> operands;
  Layout layout;
  float step;
  double step64;
  std::array<float, kMaxRunning> running{0.5f, 0.75f};
  int runs = 0;  // how many of them the rule has

  // `turn` varies what need not be combined with all else. Gradients have the sign under which no term of an
  // update can cancel another, unless `any_sign`; every 17th is zero.
  Tensor(const DType (&dtypes)[3], int64_t numel, Kind kind, int turn, unsigned used, double sign, bool any_sign)
      : numel(numel), kind(kind), active(turn % 4 != 3), unset(turn % 3 == 1), double_step(turn % 5 == 2), used(used) {
    static std::minstd_rand random(1);
    step64 = step = static_cast<float>(turn % 2 + (turn % 7 == 0 ? 0 : 4));
    int64_t rows = static_cast<int64_t>(std::sqrt(static_cast<double>(numel)));
    while (rows > 1 && numel % rows) --rows;
    rows = std::max<int64_t>(rows, 1);
    sizes = {rows, numel / rows};
    std::array<const int64_t*, kOperands> pointers{};
    for (int k = 0; k < kOperands; ++k) {
      if (k >= kState && !(used >> (k - kState) & 1)) continue;
      Buffer& buffer = operands[k];
      buffer.dtype = dtypes[std::min<int>(k, kState)];
      buffer.shift = kind == kOneElementOn ? size_of(buffer.dtype) : kind == kOneByteOn ? 1 : 0;
      buffer.strides = {sizes[1], 1};
      const int way = (k + turn) % 3;  // operands of one tensor lie differently
      if (kind == kTransposed && way != 0) buffer.strides = {1, sizes[0]};
      if (kind == kSliced && way != 0) buffer.strides = {sizes[1] * way + 3, way};
      pointers[k] = buffer.strides.data();
      const int64_t span = numel ? buffer.strides[0] * (sizes[0] - 1) + buffer.strides[1] * (sizes[1] - 1) + 1 : 0;
      buffer.bytes = std::vector<unsigned char>(buffer.shift + span * size_of(buffer.dtype), 0x55);
      for (int64_t i = 0; i < span; ++i) {
        const double uniform = (random() % 65536) / 65536.0;
        if (k == kGrad) {
          const bool flip = any_sign && random() % 2;
          buffer.set(i, i % 17 == 16 ? 0.0 : (flip ? -sign : sign) * (1 + uniform));
        } else {
          buffer.set(i, k == kParam ? 1 + uniform : unset ? -0.0 : 0.01 + uniform);
        }
      }
    }
    layout = make_layout({sizes[0], sizes[1]}, pointers);
  }

  Row row(int group) {
    Row row;
    row.numel = numel;
    row.active = active;
    row.used = used;
    row.group = group;
    row.step = double_step ? static_cast<void*>(&step64) : &step;
    row.step_dtype = double_step ? k64 : k32;
    for (int i = 0; i < runs; ++i) row.running[i] = &running[i];
    row.layout = kind == kTransposed || kind == kSliced ? &layout : nullptr;
    for (int k = 0; k < kOperands; ++k) {
      row.dtype[k] = operands[k].dtype;
      row.data[k] = operands[k].bytes.empty() ? nullptr : operands[k].bytes.data() + operands[k].shift;
    }
    return row;
  }

  // The reference: one step, element by element in the order of plain indexing. Counts what did not move.
  template <class Rule, unsigned kUsed, class T>
  int64_t expect(const Options& options) {
    const double count = double_step ? step64 += 1 : step += 1;
    std::array<double, kMaxRunning> now{running[0], running[1]};
    const Scalars<Rule, T> scalars(options.data(), count, now.data());
    for (int i = 0; i < kRunningOf<Rule>; ++i) running[i] = static_cast<float>(now[i]);
    const bool only_measures = std::is_same_v<Rule, Adopt> && count == 1;
    int64_t still = 0;
    for (int64_t i = 0; i < numel; ++i) {
      T x[kOperands] = {};
      int64_t at[kOperands];
      for (int k = 0; k < kOperands; ++k) {
        at[k] = i / sizes[1] * operands[k].strides[0] + i % sizes[1] * operands[k].strides[1];
        if (!operands[k].bytes.empty()) x[k] = operands[k].template get<T>(at[k]);
      }
      const T before = x[kParam], g = x[kGrad];
      scalars.update.template apply<kUsed % kWithAverage | kAnyDecay<Rule>>(
          x[kParam], scalars.around.gradient(g), x[kState], x[kState + 1], x[kState + 2], x[kState + 3]);
      for (int k = 0; k < kOperands; ++k)
        if (k != kGrad && !operands[k].bytes.empty()) operands[k].set(at[k], x[k]);
      still += !only_measures && g != 0 && operands[kParam].template get<T>(at[kParam]) == before;
    }
    return still;
  }
};

inline std::string show(const Options& options, const RuleInfo& info, const Tensor& t, int variant, int operand = -1) {
  std::string text = info.name;
  const auto add = [&text](const char* name, double value) {
    text.append(" ").append(name).append(" ").append(std::to_string(value), 0, 6);
  };
  for (size_t i = 0; i < info.options.size(); ++i) add(info.options[i].key, options[i]);
  for (const Buffer& buffer : t.operands) add("dtype", static_cast<int>(buffer.dtype));
  add("numel", static_cast<double>(t.numel));
  add("layout", t.kind);
  add("active", t.active);
  add("unset", t.unset);
  add("variant", variant);
  add("operand", operand);
  return text;
}

// Runs `steps` steps of all tensors, in group 1 of the groups, in the backend's way number `variant`.
using RunSteps = void (*)(const RuleInfo& info, const std::vector<Options>& groups, std::vector<Tensor>& tensors,
                          int steps, int variant);

struct TestedBackend {
  RunSteps run;
  std::vector<int> variants;  // ways to run that have to agree, a number of threads for example
  int kinds;                  // layouts that it serves: the first so many of Kind
  bool few = false;           // only one set of options for each set of states
};

template <class Rule, unsigned kUsed>
int test(const TestedBackend& backend, const Options& options, double sign, bool any_sign) {
  const RuleInfo& info = rule_info(Rule::kName);
  if (info.used_states(options) != kUsed) return 0;
  // There the parameter is the gradient itself.
  if ((std::is_same_v<Rule, Transfer> || std::is_same_v<Rule, MuonMomentum>) && options[0] == 0) return 1;
  std::vector<Tensor> initial;
  int turn = 0;
  for (const auto& dtypes : kDTypes)
    for (int kind = 0; kind < backend.kinds; ++kind, turn += 3)  // so that no size always meets the same turns
      for (const int64_t numel : kSizes)
        initial.emplace_back(dtypes, numel, static_cast<Kind>(kind), turn++, kUsed, sign, any_sign);
  for (Tensor& t : initial) t.runs = kRunningOf<Rule>;

  std::vector<Tensor> expected = initial;
  for (Tensor& t : expected)
    for (int step = 0; step < 2 && t.active; ++step) {
      const bool in_double = t.operands[kParam].dtype == k64;
      const int64_t still =
          in_double ? t.template expect<Rule, kUsed, double>(options) : t.template expect<Rule, kUsed, float>(options);
      CHECK(any_sign || still == 0, show(options, info, t, 0));
    }

  for (const int variant : backend.variants) {
    std::vector<Tensor> tensors = initial;
    // The middle group's options are those under test; no row is of the others.
    backend.run(info, {kNoOptions, options, kNoOptions}, tensors, 2, variant);
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor &t = tensors[i], &e = expected[i];
      CHECK(t.step == e.step && t.step64 == e.step64 && t.running == e.running, show(options, info, t, variant));
      for (int k = 0; k < kOperands; ++k)
        CHECK(t.operands[k].bytes == e.operands[k].bytes, show(options, info, t, variant, k));
    }
  }
  return 1;
}

// Such that every element moves by more than one rounding of its dtype.
inline double value_of(const OptionName& option, bool on) {
  static const std::string kFlags[] = {"amsgrad",  "maximize", "decoupled_weight_decay", "decouple", "nesterov",
                                       "centered", "no_prox"};
  const std::string key = option.key;
  if (std::find(std::begin(kFlags), std::end(kFlags), key) != std::end(kFlags)) return on;
  if (key == "lr") return 0.25;
  if (key == "eps") return 1e-8;
  if (key == "shape_scale") return on ? 2 : 1;
  if (key == "etas") return option.item ? 1.25 : 0.5;
  if (key == "step_sizes") return option.item ? 0.75 : on ? 0.25 : 0.125;
  if (option.is_optional) return on ? 8 : kUnset;  // a warmup
  return on ? 0.75 : 0;
}

template <class Rule, unsigned kUsed>
void test_states(const TestedBackend& backend) {
  // Every set of options, as bits; of those with these states a few. The last has all of them.
  const size_t count = std::size(Rule::kOptions);
  const unsigned every = count > 8 ? 53 : 13;
  int tested = 0;
  for (unsigned bits = 0; bits < 1u << count; ++bits) {
    Options options = kNoOptions;
    double sign = 1;
    for (size_t i = 0; i < count; ++i) {
      const bool on = bits >> i & 1;
      options[i] = value_of(Rule::kOptions[i].name, on);
      if (Rule::kOptions[i].name.key == std::string("maximize") && on) sign = -1;
      constexpr bool kDividesByEps = std::is_same_v<Rule, Adadelta> || std::is_same_v<Rule, Adopt>;  // at first
      if (kDividesByEps && Rule::kOptions[i].name.key == std::string("eps")) options[i] = 0.25;
    }
    if (backend.few ? tested == 0 : bits % every == 0 || bits + 1 == 1u << count)
      tested += test<Rule, kUsed>(backend, options, sign, bits % 2);
  }
  CHECK(tested > 0, std::string(Rule::kName) + " states " + std::to_string(kUsed));
}

inline void test_backend(const TestedBackend& backend) {
  for_each_rule([&]<class Rule, int kIndex>() {
    [&]<unsigned... kMasks>(StateMasks<kMasks...>) {
      (test_states<Rule, kMasks>(backend), ...);
    }(typename Rule::Masks{});
  });
}
