// Numbers in tensors: those that a step reads beside its rows, and its results.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <stdexcept>

#include "../plan/plan.h"
#include "tensors.h"

namespace genopt {

// Lists with tensors for some devices, or null: DeviceTensors, before a device is chosen.
using TensorLists = std::array<PyObject*, kDeviceTensors>;

inline double read_number(const DeviceTensor& tensor) {
  return with_codec(tensor.dtype, [&]<class Codec>(Codec) {
    return Codec::template decode<double>(*static_cast<const typename Codec::Stored*>(tensor.address));
  });
}
inline void write_number(const DeviceTensor& tensor, double x) {
  with_codec(tensor.dtype,
             [&]<class Codec>(Codec) { *static_cast<typename Codec::Stored*>(tensor.address) = Codec::encode(x); });
}

// Whether a step counter can be one: a whole number, and one that a float64 holds exactly.
inline bool is_step_count(double t) {
  return t >= 0 && t <= 9007199254740992.0 && t == static_cast<double>(static_cast<int64_t>(t));
}

// The tensors that a caller gave for a device, if all that were given for any are there.
inline std::optional<DeviceTensors> tensors_on(int device, const TensorLists& lists) {
  DeviceTensors found{};
  for (int i = 0; i < kDeviceTensors; ++i) {
    PyObject* const list = lists[i];
    if (!list) continue;
    for (Py_ssize_t at = 0; at < PyList_Size(list); ++at) {
      PyObject* const item = PyList_GET_ITEM(list, at);
      if (!THPVariable_Check(item)) throw std::invalid_argument("a step's inputs and results must be tensors");
      const at::Tensor& tensor = THPVariable_Unpack(item);
      // Counters are int64, and written as such.
      const bool counts = tensor.scalar_type() == at::kLong && tensor.layout() == at::kStrided;
      if ((is_plain(tensor) || counts) && kernel_device(tensor) == device)
        found[i] = {const_cast<void*>(tensor.const_data_ptr()),
                    plain_dtype(tensor.scalar_type()).value_or(DType::kFloat64), tensor.numel()};
    }
    if (!found[i].address) return std::nullopt;
  }
  return found;
}

// Before a step on the CPU.
inline void read_host_tensors(const DeviceTensors& tensors, Plan& plan) {
  Control& control = plan.control;
  // As torch: the reciprocal of a loss scale is rounded to float.
  if (const DeviceTensor& scale = tensors[kGradScale]; scale.address)
    control.scale *= control.unscale = static_cast<double>(static_cast<float>(1.0 / read_number(scale)));
  if (const DeviceTensor& found = tensors[kFoundInf]; found.address) control.skip = read_number(found) != 0;
  plan.row_parts = static_cast<BinnedTotal*>(tensors[kRowParts].address);
  plan.row_sums = static_cast<const double*>(tensors[kRowSums].address);
  plan.shared = static_cast<double*>(tensors[kSharedNumbers].address);
  plan.group_scales.clear();
  for (int64_t i = 0; i < tensors[kGroupScales].count; ++i)
    plan.group_scales.push_back(static_cast<const double*>(tensors[kGroupScales].address)[i]);
}

// After it.
inline void write_host_tensors(const DeviceTensors& tensors, const Plan& plan) {
  const Control& control = plan.control;
  if (!control.measure) return;
  if (tensors[kGradNorm].address) write_number(tensors[kGradNorm], plan.total_norm());
  if (tensors[kNonFinite].address) write_number(tensors[kNonFinite], plan.found_nonfinite());
  if (tensors[kSkippedSteps].address && control.guard && plan.found_nonfinite())
    ++*static_cast<int64_t*>(tensors[kSkippedSteps].address);
}

}  // namespace genopt
