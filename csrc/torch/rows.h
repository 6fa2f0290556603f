// Reads one row: its parameter, gradient and state dict, as the kernels take them, or what is wrong with it.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "groups.h"
#include "numbers.h"
#include "state_dicts.h"
#include "state_keys.h"

namespace genopt {

class RowReader {
 public:
  // backend: "auto", or "cpu" or "cuda", which serve no tensors elsewhere.
  RowReader(const RuleInfo& rule, const std::string& backend)
      : rule_(rule), keys_(rule), serves_host_(backend != "cuda"), serves_devices_(backend != "cpu") {
  }

  // Before the rows of a step are read. `watched`: as is_watched(); `writes_gradients`: as may_write_gradients().
  void begin(bool watched, bool writes_gradients) {
    watched_ = watched;
    writes_gradients_ = writes_gradients;
    layouts_.clear();
  }

  // Fills a row that is inactive so far, and its handles. A row without gradient is fine, and stays so.
  Problem read(size_t r, Row& row, const Groups& groups, StateDicts& state, Objects& objects) {
    if (!THPVariable_Check(objects.params[r])) return {kParam, Reason::kNotATensor};
    const at::Tensor& param = THPVariable_Unpack(objects.params[r]);
    if (!objects.gives_tensor_or_none(r)) return {kGrad, Reason::kNotATensor};
    const at::Tensor* const grad = objects.grad(r);
    const Storage& storage = groups.storage(row.group);
    row.used = groups.used(row.group);
    row.only_average = !grad;
    if (!grad) {
      // What no kernel steps, as a frozen integer weight, has no average.
      if (!(row.used & kWithAverage) || !plain_dtype(param.scalar_type())) return {};
      if (!param.requires_grad() && !state.find(r, objects)) return {};
      row.used = kWithAverage;
    }
    objects.has_grad[r] = grad != nullptr;
    if (watched_) return {kParam, Reason::kWatched};
    if (grad && storage.differentiable) return {kGrad, Reason::kDifferentiable};
    if (!is_plain(param)) return {kParam, Reason::kNoKernel};
    if (!may_be_written(param)) return {kParam, Reason::kInference};
    if (grad)
      if (const Problem problem = check_grad(*grad, param, objects.grads != nullptr)) return problem;
    const int device = kernel_device(param);
    if (!(device == kHost ? serves_host_ : serves_devices_)) return {kParam, Reason::kNoKernel};

    Handles& handles = objects.handles[r];
    handles.fill(nullptr);
    owners_.fill(nullptr);
    owners_[kParam] = objects.params[r];
    handles[kParam] = &param;
    handles[kGrad] = grad;
    choose_storage(row, storage, param);
    if (const Problem problem = read_state(row, state.find(r, objects), storage.states_of(param), handles))
      return problem;
    row.device = device;
    row.numel = param.numel() * (param.is_complex() ? 2 : 1);
    const Problem problem = place(row, handles);
    row.active = !problem;
    return problem;
  }

  const StateKeys& keys() const {
    return keys_;
  }
  // The Python objects of the handles of the row that was read last.
  const std::array<PyObject*, kHandles>& owners() const {
    return owners_;
  }

 private:
  // `is_sum`: it is an accumulation of this package's, which may have a dtype that does not mix with the parameter's.
  Problem check_grad(const at::Tensor& grad, const at::Tensor& param, bool is_sum) const {
    if (writes_gradients_ && !may_be_written(grad)) return {kGrad, Reason::kInference};
    if (!is_plain(grad)) return {kGrad, Reason::kNoKernel};
    if (grad.sizes() != param.sizes()) return {kGrad, Reason::kShape};
    const bool mixes = may_mix(grad.scalar_type()) && may_mix(param.scalar_type());
    if (grad.is_complex() != param.is_complex() || (!is_sum && !mixes && grad.scalar_type() != param.scalar_type()))
      return {kGrad, Reason::kDtype};
    return {};
  }

  // What is to be kept beside the row's plain operands.
  static void choose_storage(Row& row, const Storage& storage, const at::Tensor& param) {
    const bool is_half = param.scalar_type() == at::kBFloat16 || param.scalar_type() == at::kHalf;
    const bool narrow = is_half && !row.only_average;
    row.extra = narrow ? storage.extra : Extra::kNone;
    if (row.extra != Extra::kNone) row.used |= kWithExtra;
    row.unbiased = narrow && storage.stochastic ? 1u << kParam : 0;
    if (storage.states_of(param) == at::kBFloat16) row.unbiased |= (row.used & kStates) << kState;
  }

  // `entries`: the row's state dict, or null; `stored`: as Storage::states_of().
  Problem read_state(Row& row, PyObject* entries, std::optional<at::ScalarType> stored, Handles& handles) {
    // Rounding goes by the step count.
    const bool rounds = row.unbiased || (row.used & kStates && stored == at::kChar);
    const bool has_step = (rule_.has_step || rounds) && !row.only_average;
    row.step = nullptr;
    row.scales = {};
    PyObject *key, *value;
    for (Py_ssize_t position = 0; entries && PyDict_Next(entries, &position, &key, &value);) {
      const StateKey* const found = keys_.find(key);
      if (!found) continue;
      const Problem problem = read_entry(row, *found, value, stored, has_step, handles);
      if (problem) return problem;
    }
    for (int k = kState; k < kOperands; ++k)
      if (is_used(row.used, k) && !handles[k]) return {k, Reason::kMissing};
    const int states = static_cast<int>(rule_.states.size());
    for (int i = 0; stored == at::kChar && i < states; ++i)
      if (is_used(row.used, kState + i) && !handles[kFirstScales + i]) return {kFirstScales + i, Reason::kMissing};
    if (has_step && !row.step) return {kStepHandle, Reason::kMissing};
    return {};
  }

  Problem read_entry(Row& row, const StateKey& key, PyObject* value, std::optional<at::ScalarType> stored,
                     bool has_step, Handles& handles) {
    const at::Tensor& param = *handles[kParam];
    const int handle = key.handle;
    const Form form = stored == at::kChar ? Form::kCodes : Form::kNumbers;
    if (handle == kStepHandle) {
      if (!has_step) return {};
    } else if (handle >= kFirstScales) {
      if (form != Form::kCodes || !is_used(row.used, handle - kFirstScales + kState)) return {};
    } else {
      const Form wanted = handle == kAverage            ? Form::kNumbers
                          : handle != kExtra            ? form
                          : row.extra == Extra::kMaster ? Form::kMaster
                                                        : Form::kCompensation;
      // What another choice of storage has left behind is taken away first, lest it return when that does.
      if (handle == kExtra && !row.only_average && !is_used(row.used, kExtra)) return {handle, Reason::kStorage};
      if (!is_used(row.used, handle)) return {};
      if (key.form != wanted) return {handle, Reason::kStorage};
    }
    if (!THPVariable_Check(value)) return {handle, Reason::kNotATensor};
    const at::Tensor& t = THPVariable_Unpack(value);
    if (!is_in_memory(t)) return {handle, Reason::kNoKernel};
    if (!may_be_written(t)) return {handle, Reason::kInference};
    if (handle == kStepHandle) {
      if (const Reason reason = read_step(row, t, kernel_device(param)); reason != Reason::kNone)
        return {handle, reason};
    } else if (handle >= kFirstScales) {
      if (t.scalar_type() != at::kFloat) return {handle, Reason::kDtype};
      if (t.dim() != 1 || t.numel() != tiles_of(param.numel()) || !t.is_contiguous()) return {handle, Reason::kShape};
      if (kernel_device(t) != kernel_device(param)) return {handle, Reason::kDevice};
      if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % sizeof(float)) return {handle, Reason::kUnaligned};
      row.scales[handle - kFirstScales] = static_cast<float*>(t.mutable_data_ptr());
    } else {
      if (t.sizes() != param.sizes()) return {handle, Reason::kShape};
      if (!fits_dtype(row, handle, t.scalar_type(), param.scalar_type(), stored)) return {handle, Reason::kDtype};
    }
    handles[handle] = &t;
    owners_[handle] = value;
    return {};
  }

  static Reason read_step(Row& row, const at::Tensor& t, int device) {
    if (t.numel() != 1) return Reason::kShape;
    if (t.scalar_type() != at::kFloat && t.scalar_type() != at::kDouble) return Reason::kDtype;
    if (kernel_device(t) != device) return Reason::kDevice;
    row.step = t.mutable_data_ptr();
    row.step_dtype = *plain_dtype(t.scalar_type());
    // Reading one from a GPU would wait for it: there, loading a checkpoint is what checks it.
    return device == kHost && !is_step_count(read_number({row.step, row.step_dtype, 1})) ? Reason::kCount
                                                                                         : Reason::kNone;
  }

  bool fits_dtype(const Row& row, int operand, at::ScalarType type, at::ScalarType param,
                  std::optional<at::ScalarType> stored) const {
    if (operand == kExtra) return type == (row.extra == Extra::kMaster ? at::kFloat : param);
    if (operand != kAverage && stored == at::kChar)
      return type == (rule_.squares >> (operand - kState) & 1 ? at::kByte : at::kChar);
    if (operand != kAverage && stored && type != *stored) return false;
    return plain_dtype(type).has_value() && at::isComplexType(type) == at::isComplexType(param);
  }

  // Where the operands lie, and in which order their elements are visited.
  Problem place(Row& row, const Handles& handles) {
    const at::Tensor& param = *handles[kParam];
    bool contiguous = true, same_strides = param.is_non_overlapping_and_dense();
    for (int k = 0; k < kOperands; ++k) {
      if (!handles[k]) {
        row.data[k] = nullptr;
        continue;
      }
      const at::Tensor& t = *handles[k];
      contiguous = contiguous && t.is_contiguous();
      same_strides = same_strides && t.strides() == param.strides();
      row.dtype[k] = stored_dtype(t.scalar_type());
      const bool reads = k == kGrad && !writes_gradients_;
      row.data[k] = reads ? const_cast<void*>(t.const_data_ptr()) : t.mutable_data_ptr();
      if (kernel_device(t) != row.device) return {k, Reason::kDevice};
      // A GPU has no access to an address that is no multiple of the element's size.
      const bool aligned = reinterpret_cast<uintptr_t>(row.data[k]) % size_of(row.dtype[k]) == 0;
      if (row.device != kHost && !aligned) return {k, Reason::kUnaligned};
    }
    row.layout = nullptr;
    if (contiguous || same_strides) return {};
    row.layout = &layouts_.emplace_back(layout_of(handles));
    // Codes share a scale in the order in which they lie, which has to be the one that tiles have.
    for (int k = kState; k < kAverage; ++k)
      if (handles[k] && is_block(row.dtype[k]) && !row.layout->strides[k].empty()) return {k, Reason::kStorage};
    return {};
  }

  static Layout layout_of(const Handles& handles) {
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

  // A complex tensor is a real one with a last dimension of 2.
  static std::vector<int64_t> real_view(at::IntArrayRef dims, bool complex, int64_t factor, int64_t last) {
    std::vector<int64_t> result(dims.begin(), dims.end());
    if (!complex) return result;
    for (int64_t& each : result) each *= factor;
    result.push_back(last);
    return result;
  }

  static constexpr unsigned kStates = (1u << kMaxStates) - 1;  // a rule's own, in Row::used

  const RuleInfo& rule_;
  const StateKeys keys_;
  const bool serves_host_, serves_devices_;
  bool watched_ = false, writes_gradients_ = false;
  std::deque<Layout> layouts_;  // of the rows of this step
  std::array<PyObject*, kHandles> owners_{};
};

}  // namespace genopt
