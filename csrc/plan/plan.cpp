// The plan's arithmetic: tile numbers, factors of gradients, and the scalars of a step. See plan.h.
#include "plan.h"

#include <algorithm>
#include <numeric>

#include "decide.h"
#include "lane_sums.h"

namespace genopt {
namespace {

// Adds in the counter's own precision, as torch does.
double advance_step(const Row& row) {
  if (row.step_dtype == DType::kFloat64) return *static_cast<double*>(row.step) += 1.0;
  return *static_cast<float*>(row.step) += 1.0f;
}

// A row's running numbers.
using Running = std::array<double, kMaxRunning>;

Running running_of(const Row& row) {
  Running numbers{};
  for (int i = 0; i < kMaxRunning; ++i) numbers[i] = read_running(row.running[i], row.running_dtype[i]);
  return numbers;
}

void keep_running(const Row& row, const Running& numbers) {
  for (int i = 0; i < kMaxRunning; ++i) write_running(row.running[i], row.running_dtype[i], numbers[i]);
}

// The rows on the CPU, for decide(). Those that were not measured have a norm of 0.
struct Ledger {
  Plan& plan;
  static constexpr int lane = 0, lanes = 1;
  const int rows = static_cast<int>(plan.rows.size()), groups = static_cast<int>(plan.groups.size());
  const Norm kind = plan.control.norm;
  const double scale = plan.control.scale, max_norm = plan.control.max_norm;
  const bool is_told = !plan.group_scales.empty();
  const bool some_clip_alone = std::any_of(plan.groups.begin(), plan.groups.end(),
                                           [](const Options& options) { return genopt::clips_alone(options.data()); });
  std::vector<double> factors = std::vector<double>(groups);
  std::vector<int64_t> firsts = std::vector<int64_t>(groups + 1);

  explicit Ledger(Plan& plan) : plan(plan) {
    for (const Row& row : plan.rows) ++firsts[row.group + 1];  // rows stand in the order of their groups
    std::partial_sum(firsts.begin(), firsts.end(), firsts.begin());
  }

  template <class Number>
  double join(int64_t first, int64_t count, Number number) const {
    LaneSums sums(kind);
    for (int64_t i = 0; i < count; ++i) sums.add(i, number(first + i));
    return sums.total();
  }
  double sum(int64_t r) const {
    return plan.rows[r].norm;
  }
  const Options& options(int g) const {
    return plan.groups[g];
  }
  int64_t first_row(int g) const {
    return firsts[g];
  }
  double scale_of(int g) const {
    return scale * (is_told ? plan.group_scales[g] : 1.0);
  }
  bool clips_alone(int64_t r) const {
    return genopt::clips_alone(options(plan.rows[r].group).data());
  }
  double& group_factor(int g) {
    return factors[g];
  }
};

}  // namespace

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
  return rule.is_transfer && !groups.empty() && groups[0][0] == 0;
}

bool Plan::decide() {
  Ledger ledger(*this);
  total_norm_ = genopt::decide(ledger);
  for (Row& row : rows) {
    if (!row.active || row.device != kHost) continue;
    const double* const options = groups[row.group].data();
    row.factor = clips_by_tensor(options)
                     ? row_factor(control.norm, options, ledger.scale_of(row.group), row.norm, row.weights)
                     : ledger.factors[row.group];
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

bool Plan::needs_totals() const {
  return std::any_of(groups.begin(), groups.end(), [this](const Options& each) { return rule.needs_totals(each); });
}

void Plan::settle(int64_t first, int64_t last) {
  prepared_.erase(prepared_.begin() + static_cast<ptrdiff_t>(of_many_), prepared_.end());
  for (int64_t r = first; r < last; ++r) {
    Row& row = rows[r];
    if (row.spans(kHost) == 0 || !needs_totals(row)) continue;
    Prepared own = prepared_[row.prepared];
    rule.settle(own.scalars, own.in_double, row.totals.data(), static_cast<double>(row.numel));
    row.prepared = static_cast<int>(prepared_.size());
    prepared_.push_back(own);
  }
}

void Plan::settle_together() {
  std::array<LaneSums, kMaxTotals> sums{LaneSums(Norm::kTwo), LaneSums(Norm::kTwo)};
  for (size_t r = 0; r < rows.size(); ++r)
    for (int n = 0; n < kMaxTotals && rows[r].spans(kHost); ++n)
      sums[n].add(static_cast<int64_t>(r), rows[r].totals[n]);
  const std::array<double, kMaxTotals> totals{sums[0].total(), sums[1].total()};
  std::array<double, kMaxShared> before{}, after{};
  std::copy_n(shared, rule.shared, before.begin());
  bool is_first = true;
  for (Prepared& each : prepared_) {
    if (each.only_average) continue;
    after = before;
    rule.settle_shared(each.scalars, each.in_double, groups[each.group], totals.data(), after.data());
    if (is_first) std::copy_n(after.begin(), rule.shared, shared);
    is_first = false;
  }
}

void Plan::prepare() {
  prepared_.clear();
  // Rows mostly share their group's step count: the last one made for a group, a compute type and rows with or without
  // factors is tried first. These mostly have the same states, but for those of which only the average moves.
  struct Last {
    double t = -1;
    bool only_average = false;
    DType seen{};  // of the parameter as the rule sees it
    Running before{}, after{};
    int prepared = 0;
  };
  std::vector<Last> last(groups.size() * 4);
  const bool has_running = !rule.running.empty();
  static const RuleInfo& averaging = rule_info(Transfer::kName);  // the average is no rule's matter
  for (Row& row : rows) {
    if (!row.active || row.device != kHost) continue;
    const double t = row.step && !row.only_average ? advance_step(row) : 0;
    const bool in_double = row.dtype[kParam] == DType::kFloat64;
    Last& memo = last[row.group * 4 + (row.factors ? 2 : 0) + in_double];
    const bool runs = has_running && !row.only_average;
    const DType seen = row.dtype[row.param()];
    if (memo.t != t || memo.only_average != row.only_average || (rule.eps >= 0 && memo.seen != seen) ||
        (runs && memo.before != running_of(row))) {
      Prepared& made = prepared_.emplace_back();
      made.used = row.used;
      made.group = row.group;
      made.only_average = row.only_average;
      made.in_double = in_double;
      const Running before = runs ? running_of(row) : Running{};
      Running after = before;
      Options options = groups[row.group];
      if (rule.eps >= 0 && options[rule.eps] == kUnset) options[rule.eps] = epsilon_of(seen);
      (row.only_average ? averaging : rule)
          .make_scalars(options, t, rule.shared ? shared : after.data(), in_double, made.scalars);
      memo = {t, row.only_average, seen, before, after, static_cast<int>(prepared_.size()) - 1};
    }
    if (runs) keep_running(row, memo.after);
    row.prepared = memo.prepared;
  }
  of_many_ = prepared_.size();
}

}  // namespace genopt
