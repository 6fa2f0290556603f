// The step plan: what one step of one optimizer does to its tensors, on whichever devices, free of torch.
// A caller (torch/stepper.h) fills `rows` before every step; where gradients are clipped or checked, a backend
// measures them and decide() turns norms into factors; prepare() turns hyperparameters and step counts into scalars;
// the backend (cpu/run.h) then walks the tiles of all rows together.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

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

// What rows of the same group, step count, compute type and running numbers share.
struct Prepared {
  unsigned used;
  bool only_average, in_double;
  alignas(16) unsigned char scalars[kScalarsBytes];
};

// Tensors that a step reads and writes beside its rows, on each device: the loss scale; whether an infinity was found;
// a factor for each group's gradients (double); the norm of all gradients; whether it is not finite; the count of
// skipped steps (int64).
enum DeviceTensorKind { kGradScale, kFoundInf, kGroupScales, kGradNorm, kNonFinite, kSkippedSteps, kDeviceTensors };
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
  Control control;

  // All below is for rows on the CPU. Rows on other devices: see cuda/device_plan.h.

  // Numbers tiles and spans of active rows.
  void number();

  // From the rows' norms: the factor of each row's gradient, and whether the step is to be taken. Bounds and
  // total_norm() are of gradients times Control::scale.
  bool decide();

  // Advances the step counters of active rows and derives their scalars in double.
  void prepare();

  int64_t total_tiles() const {
    return total_tiles_;
  }
  int64_t total_spans() const {
    return total_spans_;
  }
  double total_norm() const {
    return total_norm_;
  }
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
  std::vector<Prepared> prepared_;
};

}  // namespace genopt
