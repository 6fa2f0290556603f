// The step plan: what one step of one optimizer does to its tensors, on whichever devices, free of torch.
// A caller (torch_plan.h) fills `rows` afresh at every step; prepare() turns hyperparameters and step
// counts into scalars; a backend (cpu/run.h) then walks the tiles of all rows together.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "codecs/plain.h"
#include "rules/all.h"

namespace genopt {

// The unit of work everywhere: elements that a CPU loop holds in stack arrays, that a CUDA warp holds
// in registers, and that will share one int8 scale.
constexpr int kTile = 256;

// The tensors a row names, in the order of Layout::strides.
enum Operand { kParam, kGrad, kState, kOperands = kState + kMaxStates };

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
  std::array<void*, kOperands> data{};
  std::array<DType, kOperands> dtype{};
  const Layout* layout = nullptr;  // null: every operand is dense, in one order
  void* step = nullptr;            // the step counter, where the rule has one
  DType step_dtype = DType::kFloat32;
  bool active = false;  // has a gradient
  bool fresh = false;   // its states were made for this very step
  int group = 0;
  int prepared = 0;  // index into Plan::prepared

  // Tiles to step on `device`.
  int64_t tiles(int on_device) const {
    return active && device == on_device ? (numel + kTile - 1) / kTile : 0;
  }
};

using Options = std::array<double, kMaxOptions>;

// An option that stands in a device's memory, where a step reads it; without address: a number in Options.
struct Source {
  const void* address = nullptr;
  DType dtype = DType::kFloat32;
};
using Sources = std::array<Source, kMaxOptions>;

// Runs tiles [begin, end) of a row with the scalars of a rule's Update.
using TileKernel = void (*)(const void* update, const Row& row, int64_t begin, int64_t end);
using KernelTable = std::array<std::array<std::array<TileKernel, 2>, 1 << kMaxStates>, kRules>;

// Room for any rule's Update.
constexpr int kUpdateBytes = 96;

// What rows of the same group, step count and compute type share.
struct Prepared {
  TileKernel kernel;
  alignas(16) unsigned char update[kUpdateBytes];
};

// A rule as data: what Python and the plan need to know of it.
struct RuleInfo {
  const char* name;
  int index;
  bool has_step;
  std::vector<const char*> states;
  std::vector<OptionName> options;
  unsigned structural;  // options that used_states depends on, as a mask
  unsigned (*used_states)(const Options&);
  // Builds the rule's Update for step count t in `storage`.
  void (*make_update)(const Options&, double t, bool fresh, bool in_double, void* storage);
};

// Throws std::invalid_argument for a name that is no rule's.
const RuleInfo& rule_info(const std::string& name);
const std::vector<RuleInfo>& rule_infos();

class Plan {
 public:
  explicit Plan(const RuleInfo& rule) : rule(rule) {
  }

  const RuleInfo& rule;
  std::vector<Options> groups;
  std::vector<Row> rows;

  // For rows on the CPU: numbers the tiles, advances the step counters of active rows and derives their
  // scalars in double. Rows on other devices: see cuda/device_plan.h.
  void prepare(const KernelTable& kernels);

  int64_t total_tiles() const {
    return total_tiles_;
  }
  const std::vector<Prepared>& prepared() const {
    return prepared_;
  }

 private:
  int64_t total_tiles_ = 0;
  std::vector<Prepared> prepared_;
};

}  // namespace genopt
