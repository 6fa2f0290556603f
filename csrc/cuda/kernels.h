// The kernels of each rule, as function pointers. Each rule's .cu instantiates rule_kernels.cuh for it.
#pragma once

#include "table.h"

namespace genopt::cuda {

constexpr int kWarp = 32, kThreads = 128;  // of a block

struct RuleKernels {
  void (*prologue_small)(Table, Payload<kSmallPayload>, int rows);
  void (*prologue_large)(Table, Payload<kLargePayload>, int rows);
  void (*update_float)(Table);
  void (*update_double)(Table);
};

template <class Rule>
RuleKernels rule_kernels();

// For rows that compute in float and in double.
struct NormKernels {
  void (*of_float)(Table, int rows);
  void (*of_double)(Table, int rows);
};

NormKernels norm_kernels(Norm kind);

}  // namespace genopt::cuda
