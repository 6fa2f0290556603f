// A row of the plan as the table (table.h) has it, and which kernels are to serve it.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace genopt::cuda {

// How a lean kernel would have the row stored; null: none has one so.
inline const Way* way_of(const Row& row, const Control& control) {
  const DType dtype = row.dtype[kParam];
  const bool is_half = size_of(dtype) == 2;
  if (row.layout || row.gap || row.only_average || control.gradients == Gradients::kUnscaled ||
      row.used & kWithAverage || (row.extra == Extra::kCompensation && row.dtype[kExtra] != dtype) ||
      row.dtype[kGrad] != dtype)
    return nullptr;
  Way way{is_half ? Form::kHalf : Form::kFloat, Form::kFloat, row.extra};
  bool first = true;
  for (int k = 0; k < kOperands; ++k) {
    if (!is_used(row.used, k)) continue;
    if (reinterpret_cast<uintptr_t>(row.data[k]) % 16) return nullptr;
    if (k < kState || k >= kAverage) continue;
    const DType stored = row.dtype[k];
    const Form form = is_block(stored) ? Form::kCodes : is_half && stored == dtype ? Form::kHalf : Form::kFloat;
    if (form == Form::kFloat && stored != DType::kFloat32) return nullptr;
    if (!first && form != way.state) return nullptr;
    way.state = form;
    first = false;
  }
  const Way* const found = std::find(std::begin(kWays), std::end(kWays), way);
  return dtype == DType::kFloat64 || found == std::end(kWays) ? nullptr : found;
}

inline Measured measured_as(const Row& row, const Options& options) {
  const auto is_usual = [&](int k) {
    return row.dtype[k] != DType::kFloat64 && reinterpret_cast<uintptr_t>(row.data[k]) % 16 == 0;
  };
  if (row.dtype[kParam] == DType::kFloat64) return Measured::kDouble;
  return !row.layout && is_usual(kGrad) && (options[kAgc] < 0 || is_usual(kParam)) ? Measured::kLean : Measured::kFloat;
}

// `kind`: which kernel updates it; `totaled`: whether the rule needs totals of it. Where it has a layout, the caller
// says where that stands.
inline DeviceRow device_row(const Row& row, const Options& options, int kind, bool totaled) {
  DeviceRow made{};
  bool halves = true;
  for (int k = 0; k < kOperands; ++k) {
    made.dtype[k] = row.dtype[k];
    if (!is_used(row.used, k) || (k == kGrad && row.only_average)) continue;
    if (k != kGrad) made.data[k] = row.data[k];
    halves = halves && (row.is_factor(k) || size_of(row.dtype[k]) <= 2);
    if (row.layout && !row.layout->strides[k].empty()) made.strided |= 1 << k;
  }
  made.numel = row.numel;
  made.tile = static_cast<uint16_t>(row.tile);
  made.origin = row.origin;
  made.run = row.run;
  made.gap = row.gap;
  made.step = row.step;
  made.step_dtype = row.step_dtype;
  std::copy(row.running.begin(), row.running.end(), made.running);
  std::copy(row.running_dtype.begin(), row.running_dtype.end(), made.running_dtype);
  made.group = row.group;
  made.used = static_cast<uint8_t>(row.used);
  made.factors = static_cast<uint8_t>(row.factors);
  if (row.factors) made.matrices = row.matrices;
  made.only_average = row.only_average;
  made.clips_alone = clips_alone(options.data());
  made.by_tensor = clips_by_tensor(options.data());
  made.weighs = options[kAgc] >= 0;
  made.totaled = totaled;
  std::copy(row.scales.begin(), row.scales.end(), made.scales);
  made.unbiased = static_cast<uint8_t>(row.unbiased);
  made.extra = row.extra;
  made.measured = measured_as(row, options);
  made.kind = static_cast<uint8_t>(kind);
  made.piece_bits = row.dtype[kParam] == DType::kFloat64 ? 1 : halves ? 3 : 2;
  return made;
}

// Words that a row's matrices need among the factors: see FactorColumns in factor.cuh.
inline int64_t factor_words(const Matrices& matrices) {
  const auto& [count, rows, columns] = matrices;
  const int64_t row_groups = (rows + kRowsTogether - 1) / kRowsTogether;
  return count * (2 + row_groups + matrices.panels() * rows + matrices.bands() * columns);
}
inline int64_t pieces_of(const Matrices& matrices) {
  return matrices.count * matrices.bands() * matrices.panels();
}
inline int64_t factor_groups_of(const Matrices& matrices) {
  const int64_t row_groups = (matrices.rows + kRowsTogether - 1) / kRowsTogether;
  return matrices.count * (row_groups + (matrices.columns + kWarp - 1) / kWarp);
}

// A layout in the table: dims, sizes[dims], strides[operand][dims].
inline int64_t layout_words(const Layout& layout) {
  return 1 + static_cast<int64_t>(layout.sizes.size()) * (1 + kOperands);
}
inline std::vector<uint64_t> words_of(const Layout& layout) {
  std::vector<uint64_t> words{layout.sizes.size()};
  words.insert(words.end(), layout.sizes.begin(), layout.sizes.end());
  for (const auto& strides : layout.strides) {
    words.insert(words.end(), strides.begin(), strides.end());
    if (strides.empty()) words.resize(words.size() + layout.sizes.size());
  }
  return words;
}

}  // namespace genopt::cuda
