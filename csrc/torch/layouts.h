// The order in which the elements of a row's tensors are visited, from their sizes and strides.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "../plan/layout.h"
#include "objects.h"

namespace genopt {

// A complex tensor is a real one with a last dimension of 2.
inline std::vector<int64_t> real_view(at::IntArrayRef dims, bool complex, int64_t factor, int64_t last) {
  std::vector<int64_t> result(dims.begin(), dims.end());
  if (!complex) return result;
  for (int64_t& each : result) each *= factor;
  result.push_back(last);
  return result;
}

// Elements of a slice along the first dimension.
inline int64_t slice_of(const at::Tensor& t) {
  return c10::multiply_integers(t.sizes().slice(1));
}

// Elements of a block of codes, which make slices of a tensor; 0: blocks have kTile, and know no slices.
inline int block_of(const at::Tensor& t) {
  if (t.dim() < 2) return 0;
  for (int64_t d = 1; d < t.dim(); ++d)
    if (t.size(0) != 1 && t.size(d) != 1 && t.stride(d) > t.stride(0)) return 0;  // slices do not lie one after another
  return block_in(slice_of(t));
}

inline Layout layout_of(const Handles& handles) {
  const bool complex = handles[kParam]->is_complex();
  std::array<std::vector<int64_t>, kOperands> strides;
  std::array<const int64_t*, kOperands> pointers{};
  for (int k = 0; k < kOperands; ++k) {
    if (!handles[k]) continue;
    strides[k] = real_view(handles[k]->strides(), complex, 2, 1);
    pointers[k] = strides[k].data();
  }
  return make_layout(real_view(handles[kParam]->sizes(), complex, 1, 2), pointers);
}

}  // namespace genopt
