// The CPU backend: chooses the instruction set at run time and spreads the tiles of a plan over threads.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace genopt::cpu {

// The instruction set in use: "default", "avx2" (with FMA) or "avx512", as torch names them. The best that this
// processor has, or the one that GENOPT_CPU_CAPABILITY names; throws std::runtime_error where that
// variable names none, or one that this processor lacks.
const std::string& capability();

// Those that this build and this processor both have, best first.
std::vector<std::string> capabilities();

// What was chosen for this processor, or by GENOPT_CPU_TUNING, in its form; throws std::runtime_error as capability().
std::string tuning_in_use();

const KernelTable& kernel_table();

// All work on up to `threads` threads; results do not depend on their number.

// Measures the gradients of a plan's rows, and where a group clips adaptively the parameters.
void measure(Plan& plan, int threads);

// One step of the plan's rows on the CPU as Plan::control says; Control::skip then tells whether it was skipped.
void step(Plan& plan, int threads);

}  // namespace genopt::cpu
