// What each instruction set offers: the kernels of the CPU backend, as function pointers.
#pragma once

#include <array>

#include "../plan/binned.h"
#include "../plan/plan.h"

namespace genopt {

// Runs tiles [begin, end) of a row with a rule's Scalars.
using TileKernel = void (*)(const void* scalars, const Row& row, int64_t begin, int64_t end);
// Measures one span of an operand.
using SpanKernel = Binned (*)(const Row& row, int operand, int64_t span);
// What the elements of one span add to a row's totals.
using TotalKernel = void (*)(const void* scalars, const Row& row, int64_t span, Binned* totals);
// Adds up the squares of the gradient in so many rows of a matrix, from element `start` on: those of each row, and to
// `down` those of each column.
using SquaresKernel = void (*)(const void* scalars, const Row& row, int64_t start, int64_t rows, double* across,
                               double* down);
// Writes what Control::gradients leaves in tiles [begin, end) of a row's gradient.
using GradientKernel = void (*)(const Row& row, const Control& control, int64_t begin, int64_t end);
struct KernelTable {
  // By rule, set of operands in use but for kWithExtra, and whether rows compute in double.
  std::array<std::array<std::array<TileKernel, 2>, kWithExtra>, kRules> tiles{};
  std::array<TileKernel, 2> only_average{};  // EMA-only rows, with Transfer's Scalars
  std::array<std::array<SpanKernel, 2>, 3> spans{};
  std::array<std::array<std::array<TotalKernel, 2>, kWithAverage>, kRules> totals{};  // by set of states
  std::array<std::array<SquaresKernel, 2>, kRules> squares{};                         // of rules with factors
  GradientKernel leave_gradient = nullptr;
};

// Of each instruction set: walk_*.cpp.
namespace baseline {
const KernelTable& kernel_table();
}
#if defined(__x86_64__)
namespace avx2 {
const KernelTable& kernel_table();
}
namespace avx512 {
const KernelTable& kernel_table();
}
#endif

}  // namespace genopt
