// The step plan: what one step of one optimizer does to its tensors, on whichever devices, free of torch.
// A caller (torch_plan.h) fills `rows` afresh at every step; where gradients are clipped or checked, a backend measures
// them and decide() turns norms into factors; prepare() turns hyperparameters and step counts into scalars; the backend
// (cpu/run.h) then walks the tiles of all rows together.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "codecs/int8_block.h"
#include "rules/all.h"

namespace genopt {

// The unit of work everywhere: elements that a CPU loop holds in stack arrays, that a CUDA warp holds
// in registers, and that will share one int8 scale.
constexpr int kTile = 256;

// Tiles that make one partial sum of a norm. Its order is fixed: see csrc/README.md.
constexpr int kSpan = 32;

constexpr int64_t tiles_of(int64_t numel) {
  return (numel + kTile - 1) / kTile;
}
constexpr int64_t spans_of(int64_t numel) {
  return (tiles_of(numel) + kSpan - 1) / kSpan;
}

// Numbers added up as a warp does it: 32 sums of every 32nd in turn, then these by halves.
class LaneSums {
 public:
  explicit LaneSums(Norm norm) : norm_(norm) {
  }
  void add(int64_t i, double x) {
    with_measure(norm_, [&](auto measure) { sums_[i % 32] = measure.join(sums_[i % 32], x); });
  }
  double total() {
    with_measure(norm_, [&](auto measure) {
      for (int half = 16; half >= 1; half /= 2)
        for (int i = 0; i < half; ++i) sums_[i] = measure.join(sums_[i], sums_[i + half]);
    });
    return sums_[0];
  }

 private:
  Norm norm_;
  double sums_[32] = {};
};

// The tensors a row names, in the order of Layout::strides. kAverage: the moving average of the weights. kExtra: what
// the parameter's dtype can not hold, see Extra.
enum Operand { kParam, kGrad, kState, kAverage = kState + kMaxStates, kExtra, kOperands };

// Bits of a set of operands in use, beside the rule's own states: see is_used.
constexpr unsigned kWithAverage = 1u << (kAverage - kState);
constexpr unsigned kWithExtra = 1u << (kExtra - kState);
constexpr unsigned kRests = kWithExtra << 1;  // no gradient: only the average moves
constexpr unsigned kUses = kRests << 1;       // how many sets there are

// How a parameter of 16 bits is kept more precisely. kCompensation (Kahan): the parameter is the rounded sum of itself
// and an operand of its own dtype, the rest. kMaster: the operand is the parameter in float, which is rounded from it.
enum class Extra : uint8_t { kNone, kCompensation, kMaster };

GENOPT_INLINE constexpr bool is_used(unsigned used, int operand) {
  return operand < kState || (used >> (operand - kState) & 1);
}

// The element order of a row whose operands do not all lie dense in one order. Dimensions are merged
// where every operand allows; the last one varies fastest. Strides count elements.
struct Layout {
  std::vector<int64_t> sizes;
  std::array<std::vector<int64_t>, kOperands> strides;  // empty: dense in this order, or not used
};

// sizes: the tensor's shape; strides: an operand's strides for that shape, or null where not used.
// Elements are visited in the order in which the parameter lies in memory.
Layout make_layout(const std::vector<int64_t>& sizes, const std::array<const int64_t*, kOperands>& strides);

constexpr int kHost = -1;  // the device number of the CPU

struct Row {
  int device = kHost;
  int64_t numel = 0;
  int64_t first_tile = 0;  // tiles of all rows before this one
  int64_t first_span = 0;  // spans of all rows before this one
  std::array<void*, kOperands> data{};
  std::array<DType, kOperands> dtype{};
  std::array<float*, kMaxStates> scales{};  // of states that are stored in codes, one for each tile
  const Layout* layout = nullptr;           // null: every operand is dense, in one order
  void* step = nullptr;                     // the step counter, where the rule has one
  DType step_dtype = DType::kFloat32;
  bool active = false;    // takes part in this step
  unsigned used = 0;      // states in use, kWithAverage, kWithExtra and kRests, as a mask
  unsigned unbiased = 0;  // operands of 16 bits that are not rounded to the nearest, as a mask; codes never are
  Extra extra = Extra::kNone;
  int group = 0;
  int prepared = 0;              // index into Plan::prepared
  double norm = 0, weights = 0;  // of gradient and parameter, where measured
  double factor = 1;             // of the gradient

  // Tiles to step on `device`.
  int64_t tiles(int on_device) const {
    return active && device == on_device ? tiles_of(numel) : 0;
  }
  // Spans to measure there.
  int64_t spans(int on_device) const {
    return active && device == on_device && !(used & kRests) ? spans_of(numel) : 0;
  }
  // The operand that holds the parameter as the rule sees it.
  int param() const {
    return extra == Extra::kMaster ? kExtra : kParam;
  }
};

// A rule's own options, then the common ones.
using Options = std::array<double, kAllOptions>;

// Options of which none is set.
constexpr Options kNoOptions = [] {
  Options options{};
  for (int k = kMaxOptions; k < kAllOptions; ++k) options[k] = kUnset;
  options[kSeed] = 0;
  return options;
}();

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

  bool writes_gradients() const {
    return gradients == Gradients::kZeroed || (gradients == Gradients::kUnscaled && !skip);
  }
};

// An option that stands in a device's memory, where a step reads it; without address: a number in Options.
struct Source {
  const void* address = nullptr;
  DType dtype = DType::kFloat32;
};
using Sources = std::array<Source, kMaxOptions>;

// Runs tiles [begin, end) of a row with a rule's Scalars.
using TileKernel = void (*)(const void* scalars, const Row& row, int64_t begin, int64_t end);
// Measures one span of an operand.
using SpanKernel = double (*)(const Row& row, int operand, int64_t span);
// Writes what Control::gradients leaves in tiles [begin, end) of a row's gradient.
using GradientKernel = void (*)(const Row& row, const Control& control, int64_t begin, int64_t end);
// Moves bytes [begin, end) of all arrays, of which the first `written` are written, and computes nothing: cpu/stream.h.
// `fresh`: they are not read, and where it says so written past the caches.
constexpr int kMaxStreams = 8;
struct Streams {
  char* base[kMaxStreams];
  int count = 0, written = 0;
  bool fresh = false, past_caches = false;
};
using StreamKernel = void (*)(const Streams& streams, int64_t begin, int64_t end);
struct KernelTable {
  std::array<std::array<std::array<TileKernel, 2>, kUses>, kRules> tiles{};
  std::array<std::array<SpanKernel, 2>, 3> spans{};
  GradientKernel leave_gradient = nullptr;
  StreamKernel stream = nullptr;
};

// Room for any rule's Scalars.
constexpr int kScalarsBytes = 112;

// What rows of the same group, step count, compute type and states share.
struct Prepared {
  TileKernel kernel;
  alignas(16) unsigned char scalars[kScalarsBytes];
};

// A rule as data: what Python and the plan need to know of it.
struct RuleInfo {
  const char* name;
  int index;
  bool has_step;
  std::vector<const char*> states;
  std::vector<OptionName> options;
  unsigned squares;     // states that are never negative, as a mask
  unsigned structural;  // options that used_states depends on, as a mask
  unsigned (*used_states)(const Options&);
  // Builds the rule's Scalars for step count t in `storage`.
  void (*make_scalars)(const Options&, double t, bool in_double, void* storage);
};

// Throws std::invalid_argument for a name that is no rule's.
const RuleInfo& rule_info(const std::string& name);
const std::vector<RuleInfo>& rule_infos();

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

  // From the rows' norms: the factor of each row's gradient, and whether the step is to be taken. The norms that
  // are given and told are of gradients with their scale.
  bool decide();

  // Advances the step counters of active rows and derives their scalars in double.
  void prepare(const KernelTable& kernels);

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
