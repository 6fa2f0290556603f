// The plan's arithmetic: rules as data, merged layouts, tile numbers and per-step scalars. See plan.h.
#include "plan.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>
#include <stdexcept>

namespace genopt {
namespace {

template <class Rule>
typename Rule::Options options_of(const Options& values) {
  static_assert(std::size(Rule::kOptions) <= kMaxOptions && std::size(Rule::kStates) <= kMaxStates);
  typename Rule::Options options;
  std::memcpy(&options, values.data(), sizeof options);
  return options;
}

template <class Rule, class T>
void construct(const Options& values, double t, void* storage) {
  using Made = Scalars<Rule, T>;
  static_assert(sizeof(Made) <= kScalarsBytes && alignof(Made) <= 16);
  new (storage) Made(values.data(), t);
}

template <class Rule>
unsigned used_states(const Options& values) {
  return Rule::used_states(options_of<Rule>(values));
}

template <class Rule>
RuleInfo describe(int index) {
  unsigned structural = 0;
  for (size_t i = 0; i < std::size(Rule::kOptions); ++i) {
    Options values{};
    values[i] = 1;
    if (used_states<Rule>(values) != used_states<Rule>({})) structural |= 1u << i;
  }
  return {Rule::kName,
          index,
          Rule::kHasStep,
          {std::begin(Rule::kStates), std::end(Rule::kStates)},
          {std::begin(Rule::kOptions), std::end(Rule::kOptions)},
          Rule::kSquares,
          structural,
          used_states<Rule>,
          [](const Options& values, double t, bool in_double, void* storage) {
            (in_double ? construct<Rule, double> : construct<Rule, float>)(values, t, storage);
          }};
}

// Adds in the counter's own precision, as torch does.
double advance_step(const Row& row) {
  if (row.step_dtype == DType::kFloat64) return *static_cast<double*>(row.step) += 1.0;
  return *static_cast<float*>(row.step) += 1.0f;
}

}  // namespace

const std::vector<RuleInfo>& rule_infos() {
  static const std::vector<RuleInfo> infos = [] {
    std::vector<RuleInfo> list;
    for_each_rule([&]<class Rule, int kIndex>() { list.push_back(describe<Rule>(kIndex)); });
    return list;
  }();
  return infos;
}

const RuleInfo& rule_info(const std::string& name) {
  for (const RuleInfo& info : rule_infos())
    if (name == info.name) return info;
  throw std::invalid_argument("genopt_ext has no rule named '" + name + "'");
}

Layout make_layout(const std::vector<int64_t>& sizes, const std::array<const int64_t*, kOperands>& strides) {
  // The parameter's memory order: largest stride first, dimensions of size 1 left out.
  std::vector<int> order;
  for (int d = 0; d < static_cast<int>(sizes.size()); ++d)
    if (sizes[d] != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return strides[kParam][a] > strides[kParam][b]; });

  Layout layout;
  for (const int d : order) {
    bool merge = !layout.sizes.empty();
    for (int k = 0; k < kOperands; ++k)
      merge = merge && (!strides[k] || layout.strides[k].back() == strides[k][d] * sizes[d]);
    if (merge) {
      layout.sizes.back() *= sizes[d];
    } else {
      layout.sizes.push_back(sizes[d]);
    }
    for (int k = 0; k < kOperands; ++k) {
      if (!strides[k]) continue;
      if (merge) {
        layout.strides[k].back() = strides[k][d];
      } else {
        layout.strides[k].push_back(strides[k][d]);
      }
    }
  }
  // An operand that lies dense in this order needs no strides.
  for (auto& operand : layout.strides) {
    int64_t expected = 1;
    bool dense = true;
    for (size_t d = operand.size(); d-- > 0; expected *= layout.sizes[d]) dense = dense && operand[d] == expected;
    if (dense) operand.clear();
  }
  return layout;
}

void Plan::number() {
  total_tiles_ = total_spans_ = 0;
  for (Row& row : rows) {
    row.first_tile = total_tiles_;
    row.first_span = total_spans_;
    total_tiles_ += row.tiles(kHost);
    total_spans_ += row.spans(kHost);
  }
}

bool Plan::is_clipping() const {
  return rule.index == rule_info(None::kName).index && !groups.empty() && groups[0][0] == 0;
}

bool Plan::decide() {
  // Rows that were not measured have a norm of 0. By their places among all rows, and those of a group with a norm of
  // its own by their places in it.
  LaneSums all(control.norm), together(control.norm);
  std::vector<double> own(groups.size());
  for (size_t r = 0, first = 0; r < rows.size(); ++r) {
    if (rows[r].group != rows[first].group) first = r;
    all.add(r, rows[r].norm);
    together.add(r, clips_alone(groups[rows[r].group].data()) ? 0 : rows[r].norm);
    if (groups[rows[r].group][kMaxGradNorm] < 0 || r != first) continue;
    LaneSums sums(control.norm);
    for (size_t i = first; i < rows.size() && rows[i].group == rows[first].group; ++i)
      sums.add(i - first, rows[i].norm);
    own[rows[r].group] = norm_of(control.norm, sums.total()) * control.scale;
  }
  total_norm_ = norm_of(control.norm, all.total()) * control.scale;
  const double shared = norm_of(control.norm, together.total()) * control.scale;
  for (Row& row : rows) {
    if (!row.active || row.device != kHost) continue;
    const double* options = groups[row.group].data();
    const double scale = control.scale * (group_scales.empty() ? 1.0 : group_scales[row.group]);
    if (clips_by_tensor(options)) {
      row.factor = scale * tensor_coefficient(options, norm_of(control.norm, row.norm) * scale,
                                              norm_of(control.norm, row.weights));
    } else {
      row.factor =
          group_scales.empty() ? scale * group_coefficient(options, control.max_norm, own[row.group], shared) : scale;
    }
  }
  // Clipping alone leaves what it would not change.
  if (is_clipping())
    for (Row& row : rows) {
      const double limit = groups[row.group][kClipGradValue];
      const bool within = limit < 0 || (control.measure && control.norm == Norm::kMax && row.norm <= limit);
      row.active = row.active && !(row.factor == 1 && within);
    }
  return !(control.guard && found_nonfinite());
}

void Plan::prepare(const KernelTable& kernels) {
  prepared_.clear();
  // Rows mostly share their group's step count: the last one made for a group and a compute type is tried first.
  struct Last {
    double t = -1;
    unsigned used = 0;
    int prepared = 0;
  };
  std::vector<Last> last(groups.size() * 2);
  for (Row& row : rows) {
    if (!row.active || row.device != kHost) continue;
    const double t = row.step && !(row.used & kRests) ? advance_step(row) : 0;
    const bool in_double = row.dtype[kParam] == DType::kFloat64;
    Last& memo = last[row.group * 2 + in_double];
    if (memo.t != t || memo.used != row.used) {
      Prepared& made = prepared_.emplace_back();
      made.kernel = kernels.tiles[rule.index][row.used & ~kWithExtra][in_double];
      rule.make_scalars(groups[row.group], t, in_double, made.scalars);
      memo = {t, row.used, static_cast<int>(prepared_.size()) - 1};
    }
    row.prepared = memo.prepared;
  }
}

}  // namespace genopt
