// The plan's arithmetic: tile numbers, factors of gradients, and the scalars of a step. See plan.h.
#include "plan.h"

#include "lane_sums.h"

namespace genopt {
namespace {

// Adds in the counter's own precision, as torch does.
double advance_step(const Row& row) {
  if (row.step_dtype == DType::kFloat64) return *static_cast<double*>(row.step) += 1.0;
  return *static_cast<float*>(row.step) += 1.0f;
}

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

void Plan::prepare() {
  prepared_.clear();
  // Rows mostly share their group's step count: the last one made for a group and a compute type is tried first.
  struct Last {
    double t = -1;
    unsigned used = 0;
    bool only_average = false;
    int prepared = 0;
  };
  std::vector<Last> last(groups.size() * 2);
  for (Row& row : rows) {
    if (!row.active || row.device != kHost) continue;
    const double t = row.step && !row.only_average ? advance_step(row) : 0;
    const bool in_double = row.dtype[kParam] == DType::kFloat64;
    Last& memo = last[row.group * 2 + in_double];
    if (memo.t != t || memo.used != row.used || memo.only_average != row.only_average) {
      Prepared& made = prepared_.emplace_back();
      made.used = row.used;
      made.only_average = row.only_average;
      made.in_double = in_double;
      rule.make_scalars(groups[row.group], t, in_double, made.scalars);
      memo = {t, row.used, row.only_average, static_cast<int>(prepared_.size()) - 1};
    }
    row.prepared = memo.prepared;
  }
}

}  // namespace genopt
