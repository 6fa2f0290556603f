// The step plan: what one step of one optimizer does to its tensors, on whichever devices, free of torch.
// A caller (torch/stepper.h) fills `rows` before every step; where gradients are clipped or checked, a backend
// measures them and decide() turns norms into factors; prepare() turns hyperparameters and step counts into scalars;
// the backend (cpu/run.h) then walks the tiles of all rows together.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "binned.h"
#include "norm.h"
#include "row.h"
#include "rule_info.h"

namespace genopt {

// What a step leaves in the gradients' memory. kZeroed: also where the step is skipped. kUnscaled: g / loss scale, not
// clipped, as torch's fused kernels do; where the step is skipped, gradients are kept.
enum class Gradients : uint8_t { kKept, kZeroed, kUnscaled };

// What a step does with gradients, beside the groups' options.
struct Control {
  double max_norm = kUnset;  // for all groups that do not clip alone
  double scale = 1;          // of all gradients: 1 / loss scale, 1 / micro-batches
  Norm norm = Norm::kTwo;
  bool measure = false;  // norms are wanted, if only to be told
  bool guard = false;    // gradients that are not finite skip the step
  bool skip = false;     // the step is to be skipped
  Gradients gradients = Gradients::kKept;
  bool only_measure = false;
  double unscale = 1;  // 1 / loss scale alone

  // If the step is not skipped, which is known later.
  bool may_write_gradients() const {
    return gradients != Gradients::kKept;
  }
  bool writes_gradients() const {
    return gradients == Gradients::kZeroed || (gradients == Gradients::kUnscaled && !skip);
  }
};

// An option that a step reads from a device's memory; without address: a number in Options.
struct Source {
  const void* address = nullptr;
  DType dtype = DType::kFloat32;
};
using Sources = std::array<Source, kMaxOptions>;

// What rows of the same group, states, step count, dtype and running numbers share.
struct Prepared {
  unsigned used;
  int group;
  bool only_average, in_double;
  alignas(16) unsigned char scalars[kScalarsBytes];
};

// Tensors that a step reads and writes beside its rows, on each device: the loss scale; whether an infinity was found;
// a factor for each group's gradients (double); the norm of all gradients; whether it is not finite; the count of
// skipped steps (int64); the numbers that all rows share (double); of each row's gradient what its norm is made of, and
// then of each row's parameter: as BinnedTotals (int64), which a step that only measures writes, and as numbers
// (double), which another takes in the place of its own: they were joined with those of other processes.
enum DeviceTensorKind {
  kGradScale,
  kFoundInf,
  kGroupScales,
  kGradNorm,
  kNonFinite,
  kSkippedSteps,
  kSharedNumbers,
  kRowParts,
  kRowSums,
  kDeviceTensors
};
struct DeviceTensor {
  void* address = nullptr;
  DType dtype = DType::kFloat32;
  int64_t count = 0;
};
using DeviceTensors = std::array<DeviceTensor, kDeviceTensors>;

class Plan {
 public:
  explicit Plan(const RuleInfo& rule) : rule(rule) {
  }

  const RuleInfo& rule;
  std::vector<Options> groups;
  std::vector<double> group_scales;  // of the gradients of a group, beside Control::scale; empty: 1
  std::vector<Row> rows;
  BinnedTotal* row_parts = nullptr;  // as kRowParts
  const double* row_sums = nullptr;  // as kRowSums
  double* shared = nullptr;          // numbers that all rows share: RuleInfo::shared of them
  Control control;

  // All below is for rows on the CPU. Rows on other devices: see cuda/device_plan.h.

  // Numbers tiles and spans of active rows.
  void number();

  // From the rows' norms: the factor of each row's gradient, and whether the step is to be taken. Bounds and
  // total_norm() are of gradients times Control::scale.
  bool decide();

  // Advances the step counters of active rows and derives their scalars in double.
  void prepare();

  // Gives those of rows [first, last) that need totals scalars of their own, once their totals are known, and drops
  // what others had.
  void settle(int64_t first, int64_t last);
  // Where the rule needs totals of all rows together: settles the scalars that there are.
  void settle_together();

  // Tiles and spans of all rows before row r.
  int64_t first_tile(int64_t r) const {
    return r < static_cast<int64_t>(rows.size()) ? rows[r].first_tile : total_tiles_;
  }
  int64_t first_span(int64_t r) const {
    return r < static_cast<int64_t>(rows.size()) ? rows[r].first_span : total_spans_;
  }
  int64_t total_tiles() const {
    return total_tiles_;
  }
  int64_t total_spans() const {
    return total_spans_;
  }
  double total_norm() const {
    return total_norm_;
  }
  // Whether the rule needs totals of a row before it is stepped.
  bool needs_totals(const Row& row) const {
    return !row.only_average && rule.needs_totals(groups[row.group]);
  }
  bool needs_totals() const;
  // Whether this is no optimizer: rows are gradients that become themselves, clipped.
  bool is_clipping() const;
  bool found_nonfinite() const {
    return !is_finite(total_norm_);
  }
  const std::vector<Prepared>& prepared() const {
    return prepared_;
  }

 private:
  int64_t total_tiles_ = 0, total_spans_ = 0;
  double total_norm_ = 0;
  size_t of_many_ = 0;  // prepared for rows that share them
  std::vector<Prepared> prepared_;
};

}  // namespace genopt
