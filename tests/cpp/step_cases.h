// Whole steps against the rule applied element by element, bit for bit: every rule, set of states, dtype, layout
// and tail in one plan per set of options, with heap buffers of exactly the right size, so that a sanitizer sees
// every access beside them. A backend's test says how it runs the steps: see test_backend.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <random>

#include "check.h"
#include "plan/binned.h"
#include "plan/lane_sums.h"
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

// With what the numbers begin that all rows share.
constexpr std::array<double, kMaxShared> kSharedAtFirst{0.5, 0.75, 0.25, 3};

// The sum of M::of() of a row's numbers: see plan/binned.h.
template <class M, class T>
double sum_of(const std::vector<T>& numbers) {
  BinnedTotal total{};
  for (const T& x : numbers) {
    BinnedSum<M> one;
    one.make_room(std::abs(x));
    one.add(x);
    total = joined(total, widened(one.total()));
  }
  return total.value(Norm::kTwo);
}

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
  int runs = 0;     // how many of them the rule has
  int factors = 0;  // as Row::factors
  Matrices matrices{};
  std::vector<double> divisors;  // of each matrix, in this step

  // `turn` varies what need not be combined with all else. Gradients have the sign under which no term of an
  // update can cancel another, unless `any_sign`; every 17th is zero. `factored`: the rule's states that are factors.
  Tensor(const DType (&dtypes)[3], int64_t numel, Kind kind, int turn, unsigned used, double sign, bool any_sign,
         unsigned factored)
      : numel(numel), kind(kind), active(turn % 4 != 3), unset(turn % 3 == 1), double_step(turn % 5 == 2), used(used) {
    static std::minstd_rand random(1);
    step64 = step = static_cast<float>(turn % 2 + (turn % 7 == 0 ? 0 : 4));
    int64_t rows = static_cast<int64_t>(std::sqrt(static_cast<double>(numel)));
    while (rows > 1 && numel % rows) --rows;
    rows = std::max<int64_t>(rows, 1);
    sizes = {rows, numel / rows};
    if (used & factored) {
      factors = kState + std::countr_zero(factored);
      const int64_t count = rows % 4 == 0 ? 4 : 1;
      matrices = {count, rows / count, sizes[1]};
    }
    std::array<const int64_t*, kOperands> pointers{};
    for (int k = 0; k < kOperands; ++k) {
      if (k >= kState && !(used >> (k - kState) & 1)) continue;
      Buffer& buffer = operands[k];
      buffer.dtype = dtypes[std::min<int>(k, kState)];
      if (is_factor(k)) {
        buffer.dtype = dtypes[0] == k64 ? k64 : k32;
        const int64_t numbers = k == factors ? sizes[0] : matrices.count * sizes[1];
        buffer.bytes.resize(numbers * size_of(buffer.dtype));
        for (int64_t i = 0; i < numbers; ++i) buffer.set(i, unset ? -0.0 : 0.01 + (random() % 65536) / 65536.0);
        continue;
      }
      buffer.shift = kind == kOneElementOn ? size_of(buffer.dtype) : kind == kOneByteOn ? 1 : 0;
      buffer.strides = {sizes[1], 1};
      // Operands of one tensor lie differently; but matrices are contiguous.
      const int way = factors && k == kParam ? 0 : (k + turn) % 3;
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

  bool is_factor(int k) const {
    return factors && (k == factors || k == factors + 1);
  }

  Row row(int group) {
    Row row;
    row.factors = factors;
    row.matrices = matrices;
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

  // The reference: one step, element by element in the order of plain indexing. Counts what did not move. `shared`: the
  // numbers of all rows, which are advanced by `all`, their totals.
  template <class Rule, unsigned kUsed, class T>
  int64_t expect(Options options, std::array<double, kMaxShared>& shared, const std::array<double, kMaxTotals>& all) {
    if (constexpr int kEps = kEpsOf<Rule>; kEps >= 0 && options[kEps] == kUnset)
      options[kEps] = epsilon_of(operands[kParam].dtype);
    const double count = double_step ? step64 += 1 : step += 1;
    std::array<double, kMaxRunning> now{running[0], running[1]};
    Scalars<Rule, T> scalars(options.data(), count, kSharedOf<Rule> > 0 ? shared.data() : now.data());
    for (int i = 0; i < kRunningOf<Rule>; ++i) running[i] = static_cast<float>(now[i]);
    if constexpr (kUsed != 0 && kUsed == kFactorsOf<Rule>) renew_factors<Rule, T>(scalars);
    bool only_measures = std::is_same_v<Rule, Adopt> && count == 1;
    if constexpr (std::is_same_v<Rule, RAdamScheduleFree>) only_measures = !is_set(scalars.update.average.rate);
    if constexpr (kSharedOf<Rule> > 0) {
      scalars.update.settle(options_of<Rule>(options.data()), all.data(), shared.data());
    } else if constexpr (kTotalsOf<Rule> > 0) {
      if (numel > 0 && Rule::needs_totals(options_of<Rule>(options.data())))
        scalars.update.settle(totals<Rule, kUsed>(scalars).data(), static_cast<double>(numel));
    }
    int64_t still = 0;
    for (int64_t i = 0; i < numel; ++i) {
      int64_t at[kOperands];
      std::array<T, kOperands> x = load<T>(i, at);
      const T before = x[kParam], g = x[kGrad];
      scalars.update.template apply<kUsed % kWithAverage | kAnyDecay<Rule>>(
          x[kParam], scalars.around.gradient(g), x[kState], x[kState + 1], x[kState + 2], x[kState + 3]);
      for (int k = 0; k < kOperands; ++k)
        if (k != kGrad && !is_factor(k) && !operands[k].bytes.empty()) operands[k].set(at[k], x[k]);
      still += !only_measures && g != 0 && operands[kParam].template get<T>(at[kParam]) == before;
    }
    return still;
  }

  template <class T>
  std::array<T, kOperands> load(int64_t i, int64_t (&at)[kOperands]) const {
    std::array<T, kOperands> x{};
    for (int k = 0; k < kOperands; ++k) {
      at[k] = i / sizes[1] * operands[k].strides[0] + i % sizes[1] * operands[k].strides[1];
      if (is_factor(k)) {
        const int64_t row = i / sizes[1], matrix = row / matrices.rows;
        at[k] = k == factors ? row : matrix * sizes[1] + i % sizes[1];
        x[k] = operands[k].template get<T>(at[k]);
        if (k == factors && !divisors.empty()) x[k] = x[k] / static_cast<T>(divisors[matrix]);
        continue;
      }
      if (!operands[k].bytes.empty()) x[k] = operands[k].template get<T>(at[k]);
    }
    return x;
  }

  // In the order of csrc/README.md.
  template <class Rule, class T>
  void renew_factors(const Scalars<Rule, T>& scalars) {
    const auto& [count, rows, columns] = matrices;
    divisors.clear();
    if (numel == 0) return;
    const auto square = [&](int64_t row, int64_t column) {
      int64_t at[kOperands];
      const double g = scalars.around.gradient(load<T>(row * columns + column, at)[kGrad]);
      return g * g;
    };
    const auto renew = [&](int k, int64_t at, double mean) {
      const T number = scalars.update.factor(operands[k].template get<T>(at), mean);
      operands[k].set(at, number);
      return static_cast<double>(number);
    };
    std::vector<double> made;
    for (int64_t m = 0; m < count; ++m) {
      LaneSums of_rows(Norm::kTwo);
      for (int64_t first = 0; first < rows; first += 32) {
        LaneSums together(Norm::kTwo);
        for (int64_t i = first; i < std::min(first + 32, rows); ++i) {
          LaneSums panels(Norm::kTwo);
          for (int64_t start = 0; start < columns; start += 256) {
            LaneSums panel(Norm::kTwo);
            for (int64_t j = start; j < std::min(start + 256, columns); ++j) panel.add(j, square(m * rows + i, j));
            panels.add(start / 256, panel.total());
          }
          together.add(i, renew(factors, m * rows + i, panels.total() / static_cast<double>(columns)));
        }
        of_rows.add(first / 32, together.total());
      }
      made.push_back(scalars.update.divisor(of_rows.total() / static_cast<double>(rows)));
      for (int64_t j = 0; j < columns; ++j) {
        LaneSums bands(Norm::kTwo);
        const int64_t band = matrices.band();
        for (int64_t first = 0; first < rows; first += band) {
          double sum = 0;
          for (int64_t i = first; i < std::min(first + band, rows); ++i) sum += square(m * rows + i, j);
          bands.add(first / band, sum);
        }
        renew(factors + 1, m * columns + j, bands.total() / static_cast<double>(rows));
      }
    }
    divisors = made;
  }

  template <class Rule, unsigned kUsed, class T>
  std::array<double, kMaxTotals> totals(const Scalars<Rule, T>& scalars) const {
    std::array<std::vector<T>, kMaxTotals> numbers;
    for (int64_t i = 0; i < numel; ++i) {
      int64_t at[kOperands];
      std::array<T, kOperands> x = load<T>(i, at);
      T shares[kMaxTotals] = {};
      scalars.update.template share<kUsed % kWithAverage>(shares, x[kParam], scalars.around.gradient(x[kGrad]),
                                                          x[kState], x[kState + 1], x[kState + 2], x[kState + 3]);
      for (int n = 0; n < kTotalsOf<Rule>; ++n) numbers[n].push_back(shares[n]);
    }
    std::array<double, kMaxTotals> sums{};
    for (int n = 0; n < kTotalsOf<Rule>; ++n) sums[n] = sum_of<TotalOf<Rule>>(numbers[n]);
    return sums;
  }
  template <class Rule, unsigned kUsed, class T>
  std::array<double, kMaxTotals> totals(const Options& options, std::array<double, kMaxShared> shared) const {
    return totals<Rule, kUsed>(Scalars<Rule, T>(options.data(), 1, shared.data()));
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
std::array<double, kMaxTotals> totals_of_all(const std::vector<Tensor>& tensors, const Options& options,
                                             const std::array<double, kMaxShared>& shared) {
  std::array<LaneSums, kMaxTotals> sums{LaneSums(Norm::kTwo), LaneSums(Norm::kTwo)};
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    if (!t.active) continue;
    const auto own = t.operands[kParam].dtype == k64 ? t.template totals<Rule, kUsed, double>(options, shared)
                                                     : t.template totals<Rule, kUsed, float>(options, shared);
    for (int n = 0; n < kMaxTotals; ++n) sums[n].add(static_cast<int64_t>(i), own[n]);
  }
  return {sums[0].total(), sums[1].total()};
}

template <class Rule, unsigned kUsed>
int test(const TestedBackend& backend, const Options& options, double sign, bool any_sign) {
  const RuleInfo& info = rule_info(Rule::kName);
  const bool factored = kUsed != 0 && kUsed == kFactorsOf<Rule>;
  if (!factored && info.used_states(options) != kUsed) return 0;
  // There the parameter is the gradient itself.
  if ((std::is_same_v<Rule, Transfer> || std::is_same_v<Rule, MuonMomentum>) && options[0] == 0) return 1;
  std::vector<Tensor> initial;
  int turn = 0;
  for (const auto& dtypes : kDTypes)
    for (int kind = 0; kind < backend.kinds; ++kind, turn += 3)  // so that no size always meets the same turns
      for (int64_t numel : kSizes) {
        if (kind != kContiguous && numel > 1000)
          numel = numel / 1024 * 256 + numel % 1024;  // fewer tiles, the same tail
        initial.emplace_back(dtypes, numel, static_cast<Kind>(kind), turn++, kUsed, sign, any_sign, info.factored);
      }
  for (Tensor& t : initial) t.runs = kRunningOf<Rule>;

  std::vector<Tensor> expected = initial;
  std::array<double, kMaxShared> shared = kSharedAtFirst;
  for (int step = 0; step < 2; ++step) {
    const std::array<double, kMaxShared> before = shared;
    std::array<double, kMaxTotals> all{};
    if constexpr (kSharedOf<Rule> > 0) all = totals_of_all<Rule, kUsed>(expected, options, before);
    for (Tensor& t : expected) {
      if (!t.active) continue;
      const bool in_double = t.operands[kParam].dtype == k64;
      shared = before;
      const int64_t still = in_double ? t.template expect<Rule, kUsed, double>(options, shared, all)
                                      : t.template expect<Rule, kUsed, float>(options, shared, all);
      CHECK(any_sign || still == 0, show(options, info, t, 0));
    }
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
inline double value_of(const OptionName& option, bool on, int word) {
  static const std::string kFlags[] = {"amsgrad",
                                       "maximize",
                                       "decoupled_weight_decay",
                                       "decouple",
                                       "nesterov",
                                       "centered",
                                       "no_prox",
                                       "silent_sgd_phase",
                                       "bias_correction",
                                       "grad_averaging",
                                       "always_adapt",
                                       "decoupled_decay",
                                       "trust_clip",
                                       "use_bias_correction",
                                       "safeguard_warmup"};
  const std::string key = option.key;
  if (std::find(std::begin(kFlags), std::end(kFlags), key) != std::end(kFlags)) return on;
  if (key == "lr") return 0.25;
  if (option.is_eps) return on ? 1e-8 : kUnset;
  if (key == "beta2_decay") return on ? -0.75 : -0.5;
  if (key == "d") return on ? 2 : 1;
  if (key == "eps") return 1e-8;
  if (key == "d0") return on ? 0.5 : 0.25;  // of d: whether it is still the first
  if (key == "d_coef") return on ? 2 : 1;
  if (key == "growth_rate") return on ? std::numeric_limits<double>::infinity() : 1.25;
  if (key == "beta3") return on ? 0.5 : kUnset;
  if (key == "shape_scale") return on ? 2 : 1;
  if (key == "trust_coeff") return on ? 8 : 4;
  if (key == "etas") return option.item ? 1.25 : 0.5;
  if (key == "step_sizes") return option.item ? 0.75 : on ? 0.25 : 0.125;
  if (option.words[0]) return !on ? kUnset : option.words[word - 1] ? word : 1;
  if (option.is_optional) return on ? 8 : kUnset;  // a warmup
  return on ? 0.75 : 0;
}

template <class Rule, unsigned kUsed>
void test_states(const TestedBackend& backend) {
  // Every set of options, as bits; of those with these states a few. The last has all of them.
  const size_t count = std::size(Rule::kOptions);
  const unsigned every = count > 12 ? 821 : count > 10 ? 211 : count > 9 ? 101 : count > 8 ? 53 : 13;
  int tested = 0;
  for (unsigned twice = 0; twice < 2u << count; ++twice) {
    const unsigned bits = twice / 2;
    const int word = 1 + twice % 2;
    if (word > 1 && (kAnyDecay<Rule> == 0 || bits >> (count - 1) == 0)) continue;  // the last option is a word
    Options options = kNoOptions;
    double sign = 1;
    for (size_t i = 0; i < count; ++i) {
      const bool on = bits >> i & 1;
      options[i] = value_of(Rule::kOptions[i].name, on, word);
      if (Rule::kOptions[i].name.key == std::string("maximize") && on) sign = -1;
      constexpr bool kDividesByEps = std::is_same_v<Rule, Adadelta> || std::is_same_v<Rule, Adopt> ||  // at first
                                     std::is_same_v<Rule, Lamb>;  // where g is 0, which all elements then feel
      if (kDividesByEps && Rule::kOptions[i].name.key == std::string("eps")) options[i] = 0.25;
    }
    if (!rule_info(Rule::kName).allows(options)) continue;
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
