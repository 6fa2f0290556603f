// The kernels of each rule, as function pointers. Each rule's .cu instantiates rule_kernels.cuh for it.
#pragma once

#include <array>
#include <iterator>
#include <vector>

#include "table.h"

namespace genopt::cuda {

constexpr int kWarp = 32, kThreads = 128;  // of a block

// Rows that one kernel updates: positions in Table::order, and their tiles.
struct TileRange {
  int32_t first, rows;
  int64_t first_tile, tiles;
  bool one_each;  // every row has one tile
};

// How the operands of a lean row (lean.cuh) are stored. kHalf: bf16 or fp16, all in the same; kCodes: int8 and uint8.
// The gradient is stored as the parameter.
enum class Form : uint8_t { kFloat, kHalf, kCodes };
struct Way {
  Form param, state;
  Extra extra;  // a compensation is stored as the parameter

  bool operator==(const Way&) const = default;
};
constexpr Way kWays[] = {
    {Form::kFloat, Form::kFloat, Extra::kNone},      {Form::kFloat, Form::kCodes, Extra::kNone},
    {Form::kHalf, Form::kFloat, Extra::kNone},       {Form::kHalf, Form::kHalf, Extra::kNone},
    {Form::kHalf, Form::kCodes, Extra::kNone},       {Form::kHalf, Form::kFloat, Extra::kMaster},
    {Form::kHalf, Form::kCodes, Extra::kMaster},     {Form::kHalf, Form::kFloat, Extra::kCompensation},
    {Form::kHalf, Form::kHalf, Extra::kCompensation}};
constexpr int kWayCount = static_cast<int>(std::size(kWays));

using UpdateKernel = void (*)(Table, TileRange);
// Gives rows of a kind (device_plan.h) the scalars that follow from their totals; null: the rule needs none.
using TotalKernel = void (*)(Table, int kind);

struct LeanKernel {
  unsigned used;  // states, as a mask
  int way;        // of kWays
  bool cautious;  // is so, see rules/rule.h
  UpdateKernel update;
  TotalKernel total;
};

struct RuleKernels {
  void (*prologue_small)(Table, Payload<kSmallPayload>, int rows);
  void (*prologue_large)(Table, Payload<kLargePayload>, int rows);
  UpdateKernel update_float, update_double;  // of rows of any kind that compute in float, in double
  std::vector<LeanKernel> lean;
  TotalKernel total_float = nullptr, total_double = nullptr;
  // Of rows with factors that compute in float, in double: the sums of squared gradients, and what the factors become;
  // null: the rule has none.
  void (*squares[2])(Table) = {};
  void (*factors[2])(Table) = {};
  // Gives all rows the scalars that follow from the totals of all; null: the rule needs none of all rows together.
  void (*settle)(Table, int first) = nullptr;
};

template <class Rule>
RuleKernels rule_kernels();

// Measures the rows whose DeviceRow::measured is the index. `rows`: how many there are to measure in all.
using NormKernel = void (*)(Table, int rows);
using NormKernels = std::array<NormKernel, kMeasured>;

NormKernels norm_kernels(Norm kind);

}  // namespace genopt::cuda
