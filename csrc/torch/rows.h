// Reads one row: its parameter, gradient and state dict, as the kernels take them, or what is wrong with it.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <bit>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "device_tensors.h"
#include "groups.h"
#include "layouts.h"
#include "state_dicts.h"
#include "state_keys.h"
#include "witness.h"

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

  // Fills a row that is inactive so far, and its handles. A row without gradient is fine, and stays so. False: the
  // kernels can not take it, see problems().
  bool read(size_t r, Row& row, const Groups& groups, StateDicts& state, Objects& objects) {
    PyObject* const object = objects.params[r];
    if (!THPVariable_Check(object)) return refuse(parameter_, Reason::kNotATensor);
    const at::Tensor& param = objects.param(r);
    spread_ = is_spread(object) ? object : nullptr;
    if (!objects.gives_tensor_or_none(r)) return refuse(gradient_, Reason::kNotATensor);
    const at::Tensor* const grad = objects.grad(r);
    const Storage& storage = groups.storage(row.group);
    row.used = groups.used(row.group);
    row.only_average = !grad;
    if (!grad) {
      // What no kernel steps, as a frozen integer weight, has no average.
      if (!(row.used & kWithAverage) || !plain_dtype(param.scalar_type())) return true;
      if (!THPVariable_Unpack(object).requires_grad() && !state.find(r, objects)) return true;
      row.used = kWithAverage;
    }
    row.factors = 0;
    if (grad && rule_.factored && param.dim() > 1) {
      row.used = rule_.factored | (row.used & kWithAverage);
      row.factors = kState + std::countr_zero(rule_.factored);
    }
    objects.has_grad[r] = grad != nullptr;
    if (watched_) return refuse(parameter_, Reason::kWatched);
    if (grad && storage.differentiable) return refuse(gradient_, Reason::kDifferentiable);
    if (!is_plain(param)) return refuse(parameter_, Reason::kNoKernel);
    if (spread_ && !serves_spread(r, groups.needs_totals(row.group), objects)) return false;
    row.device = kernel_device(param);
    if (!(row.device == kHost ? serves_host_ : serves_devices_)) return refuse(parameter_, Reason::kNoKernel);
    // The matrices of others are no rows and columns of numbers, or lie in another order.
    if (rule_.factored && (param.is_complex() || (row.factors && !param.is_contiguous())))
      return refuse(parameter_, Reason::kNoKernel);
    if (!may_be_written(param)) return refuse(parameter_, Reason::kInference);
    if (!is_backed(param)) return refuse(parameter_, Reason::kFreed);
    if (grad) {
      if (!check_grad(*grad, param, row.device, objects.grads != nullptr)) return false;
      if (storage.capturable && param.is_cpu()) return refuse(parameter_, Reason::kCapturable);
    }

    Handles& handles = objects.handles[r];
    handles.fill(nullptr);
    handles[kParam] = &param;
    handles[kGrad] = grad;
    wholes_.fill(nullptr);
    wholes_[kParam] = spread_;
    wholes_[kGrad] = spread_ && grad ? objects.grad_object(r) : nullptr;
    row.is_part = spread_ != nullptr;
    const at::Tensor& whole = THPVariable_Unpack(object);
    const bool may_be_coded = storage.states == at::kChar && moments_of(row) != 0;
    block_ = block_of(whole);
    const auto stored = storage.states_of(whole, may_be_coded && spread_ && !(block_ && keeps_blocks(spread_, block_)));
    const bool is_coded = may_be_coded && stored == at::kChar;
    row.tile = is_coded && block_ ? block_ : kTile;
    choose_storage(row, storage, stored, param);
    if (!find_places(row, is_coded) || !read_state(row, state.find(r, objects), stored, handles)) return false;
    if (row.factors && !read_factors(row, handles)) return false;
    objects.wholes[r] = wholes_;
    row.numel = param.numel() * (param.is_complex() ? 2 : 1);
    row.active = locate(row, handles);
    return row.active;
  }

  // Takes what may be another at each step of a row whose witness holds: its gradient and step count. False: it is to
  // be read. May be called as Witnesses::holds() where the gradients are the parameters' own.
  bool renew(size_t r, Row& row, const Witnesses& witnesses, Objects& objects) const {
    if (!objects.gives_tensor_or_none(r)) return false;
    const at::Tensor* const grad = objects.grad(r);
    if (!grad) return !(row.used & kWithAverage);
    if (row.is_part) {
      PyObject* const whole = objects.wholes[r][kGrad] = objects.grad_object(r);
      if (!is_spread(whole) || !witnesses.takes_part(r, whole)) return false;
    }
    if (!witnesses.takes(r, *grad, *objects.handles[r][kParam]) || !is_backed(*grad)) return false;
    if (row.step && row.device == kHost && !is_step_count(read_number({row.step, row.step_dtype, 1}))) return false;
    objects.handles[r][kGrad] = grad;
    row.data[kGrad] = address_of(*grad, kGrad);
    row.active = is_aligned(row, kGrad);
    objects.has_grad[r] = row.active;
    return row.active;
  }

  // Of the row that was read last, where read() was false.
  const std::vector<Problem>& problems() const {
    return problems_;
  }

 private:
  // Says what can not be mended; false.
  bool refuse(PyObject* operand, Reason reason) {
    problems_.assign(1, {operand, reason});
    return false;
  }

  // Whether a row that is spread may be stepped where it is: what is known of a part alone is enough.
  bool serves_spread(size_t r, bool needs_totals, const Objects& objects) {
    const at::Tensor& whole = THPVariable_Unpack(spread_);
    const bool as_it_is = !whole.is_conj() && !whole.is_neg() && may_be_written(whole);
    if (!as_it_is || (needs_totals && objects.has_grad[r])) return refuse(parameter_, Reason::kNoKernel);
    if (!objects.has_grad[r]) return true;
    PyObject* const grad = objects.grad_object(r);
    return (is_spread(grad) && are_spread_alike(spread_, grad)) || refuse(gradient_, Reason::kNoKernel);
  }

  // What is rounded by an element's place needs that of all of a whole, which follow one another in each tile.
  bool find_places(Row& row, bool is_coded) {
    row.origin = row.run = row.gap = 0;
    if (!spread_ || !(row.unbiased || is_coded)) return true;
    if (!local_of(spread_).is_contiguous()) return refuse(parameter_, Reason::kNoKernel);
    const std::optional<Runs> runs = runs_of(spread_);
    if (!runs) return refuse(parameter_, Reason::kNoKernel);
    row.origin = runs->origin;
    row.run = runs->run;
    row.gap = runs->gap;
    if (row.gap == 0) return true;
    const int tile = is_coded ? row.tile : block_in(row.run);
    if (!tile || row.run % tile != 0) return refuse(parameter_, Reason::kNoKernel);
    row.tile = tile;
    return true;
  }

  // `is_sum`: it is an accumulation of this package's, which may have a dtype that does not mix with the parameter's.
  bool check_grad(const at::Tensor& grad, const at::Tensor& param, int device, bool is_sum) {
    if (writes_gradients_ && !may_be_written(grad)) return refuse(gradient_, Reason::kInference);
    if (!is_plain(grad)) return refuse(gradient_, Reason::kNoKernel);
    if (!is_backed(grad)) return refuse(gradient_, Reason::kFreed);
    if (grad.sizes() != param.sizes()) return refuse(gradient_, Reason::kShape);
    const bool mixes = may_mix(grad.scalar_type()) && may_mix(param.scalar_type());
    if (grad.is_complex() != param.is_complex() || (!is_sum && !mixes && grad.scalar_type() != param.scalar_type()))
      return refuse(gradient_, Reason::kDtype);
    return kernel_device(grad) == device || refuse(gradient_, Reason::kDevice);
  }

  // What is to be kept beside the row's plain operands.
  void choose_storage(Row& row, const Storage& storage, std::optional<at::ScalarType> stored,
                      const at::Tensor& param) const {
    const bool is_half = param.scalar_type() == at::kBFloat16 || param.scalar_type() == at::kHalf;
    const bool narrow = is_half && !row.only_average;
    row.extra = narrow ? storage.extra : Extra::kNone;
    if (row.extra != Extra::kNone) row.used |= kWithExtra;
    row.unbiased = narrow && storage.stochastic ? 1u << kParam : 0;
    if (stored == at::kBFloat16) row.unbiased |= moments_of(row) << kState;
  }

  // Which entries there are, by handle; of the states in each form.
  struct Entries {
    unsigned numbers = 0, codes = 0, others = 0;
  };

  // `entries`: the row's state, or null; `stored`: as Storage::states_of().
  bool read_state(Row& row, PyObject* entries, std::optional<at::ScalarType> stored, Handles& handles) {
    if (entries && !PyDict_Check(entries)) return refuse(state_, Reason::kNotADict);
    // Rounding goes by the step count.
    const bool rounds = row.unbiased || (moments_of(row) && stored == at::kChar);
    const bool has_step = (rule_.has_step || rounds) && !row.only_average;
    const bool runs = !rule_.running.empty() && !row.only_average;
    row.step = nullptr;
    row.running = {};
    row.scales = {};
    problems_.clear();
    Entries found;
    PyObject *key, *value;
    for (Py_ssize_t position = 0; entries && PyDict_Next(entries, &position, &key, &value);) {
      const StateKey* const known = keys_.find(key);
      if (known && value != Py_None && !read_entry(row, *known, value, stored, has_step, found, handles)) return false;
    }
    bool complete = problems_.empty() && (!has_step || row.step);
    for (size_t i = 0; runs && i < rule_.running.size(); ++i) complete = complete && row.running[i];
    for (int k = kState; k < kOperands; ++k) complete = complete && (handles[k] || !is_used(row.used, k));
    for (int i = 0; stored == at::kChar && i < kMaxStates; ++i)
      complete = complete && (handles[kFirstScales + i] || !(moments_of(row) >> i & 1));
    return complete || find_mendable(row, found, has_step, handles);
  }

  // Reads an entry of the state dict by its own form, whether or not that is the form that is wanted. False: it can be
  // nobody's.
  bool read_entry(Row& row, const StateKey& key, PyObject* value, std::optional<at::ScalarType> stored, bool has_step,
                  Entries& found, Handles& handles) {
    const at::Tensor& param = *handles[kParam];
    const int handle = key.handle;
    const bool are_scales = handle >= kFirstScales;
    if (are_weights(handle))
      stored = may_mix(param.scalar_type()) ? std::optional(at::kFloat)
               : rule_.factored             ? std::optional(param.scalar_type())
                                            : std::nullopt;
    const bool coded = stored == at::kChar;
    const bool is_extra = handle == kExtra;
    if (is_extra && key.form != form_of(row.extra)) {
      // What another choice of storage has left behind is taken away first, lest it return when that does.
      if (!row.only_average) problems_.push_back({key.name, Reason::kStorage});
      return true;
    }
    const bool is_wanted = handle == kStepHandle ? has_step
                           : is_number(handle)
                               ? !row.only_average
                               : is_used(row.used, are_scales ? handle - kFirstScales + kState : handle);
    if (!is_wanted) return true;
    if (!THPVariable_Check(value)) return refuse(key.name, Reason::kNotATensor);
    const at::Tensor& t = local_of(value);
    if (!is_in_memory(t)) return refuse(key.name, Reason::kNoKernel);
    if (is_spread(value) || (spread_ && !is_number(handle))) {
      // Numbers are no parts; the rest is cut as the parameter is.
      if (is_number(handle) || !spread_ || !is_spread(value) || !are_spread_alike(spread_, value, !are_scales))
        return refuse(key.name, Reason::kNoKernel);
      wholes_[handle] = value;
    }
    if (!may_be_written(t)) return refuse(key.name, Reason::kInference);
    if (!is_backed(t)) return refuse(key.name, Reason::kFreed);
    if (is_number(handle)) {
      found.others |= 1u << handle;
      if (!read_number_of(row, key, t)) return false;
    } else if (are_scales) {
      found.others |= 1u << handle;
      // Those of other blocks are stored anew: of format 1, or of other strides. Of a part they are none of its own.
      const bool may_be =
          are_scales_of(t, param, 0) || (param.dim() > 1 && are_scales_of(t, param, block_in(slice_of(param))));
      if (spread_ ? !are_scales_of(t, param, block_) : !may_be) return refuse(key.name, Reason::kShape);
      if (t.scalar_type() != at::kFloat || param.is_complex()) return refuse(key.name, Reason::kDtype);
      if (kernel_device(t) != row.device) return refuse(key.name, Reason::kDevice);
      if (!coded) return true;
      if (!t.is_contiguous() || !are_scales_of(t, param, block_)) {
        problems_.push_back({key.name, Reason::kStorage});
        return true;
      }
      if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % sizeof(float)) return refuse(key.name, Reason::kUnaligned);
      row.scales[handle - kFirstScales] = static_cast<float*>(t.mutable_data_ptr());
    } else {
      const bool has_codes = key.form == Form::kCodes;
      (has_codes ? found.codes : found.numbers) |= 1u << handle;
      if (!has_shape_of(row, handle, t, param)) return refuse(key.name, Reason::kShape);
      const at::ScalarType type = t.scalar_type();
      const bool fits = has_codes ? !param.is_complex() && type == code_type(handle)
                                  : plain_dtype(type).has_value() && t.is_complex() == param.is_complex();
      if (!fits) return refuse(key.name, Reason::kDtype);
      if (kernel_device(t) != row.device) return refuse(key.name, Reason::kDevice);
      const bool is_as_asked =
          is_extra ? type == (row.extra == Extra::kMaster ? at::kFloat : param.scalar_type())
                   : handle == kAverage || (has_codes == coded && (coded || !stored || type == *stored));
      if (!is_as_asked || (row.is_factor(handle) && !t.is_contiguous())) {
        problems_.push_back({key.name, Reason::kStorage});
        return true;
      }
    }
    handles[handle] = &t;
    return true;
  }

  // Whether a state has the parameter's shape, or of a factor the one that it has.
  static bool has_shape_of(const Row& row, int handle, const at::Tensor& t, const at::Tensor& param) {
    if (!row.is_factor(handle)) return t.sizes() == param.sizes();
    std::vector<int64_t> sizes = param.sizes().vec();
    sizes[sizes.size() - (handle == row.factors ? 1 : 2)] = 1;
    return t.sizes() == at::IntArrayRef(sizes);
  }

  // Whether there is one scale for each block of the parameter's codes. `block`: as block_of().
  static bool are_scales_of(const at::Tensor& t, const at::Tensor& param, int block) {
    if (!block) return t.dim() == 1 && t.numel() == tiles_of(param.numel());
    return t.dim() == 2 && t.size(0) == param.size(0) && t.size(1) == slice_of(param) / block;
  }

  // Of a row with factors, its matrices. False: the kernels do not reach the factors.
  bool read_factors(Row& row, const Handles& handles) {
    const at::Tensor& param = *handles[kParam];
    for (const int k : {row.factors, row.factors + 1})
      if (reinterpret_cast<uintptr_t>(handles[k]->const_data_ptr()) % handles[k]->element_size() != 0)
        return refuse(keys_.name(k), Reason::kUnaligned);
    const int64_t columns = param.size(-1), size = param.size(-2) * columns;
    row.matrices = {size ? param.numel() / size : 0, param.size(-2), columns};
    return true;
  }

  // A step counter or a running number.
  bool read_number_of(Row& row, const StateKey& key, const at::Tensor& t) {
    PyObject* const name = key.name;
    if (t.numel() != 1) return refuse(name, Reason::kShape);
    if (t.scalar_type() != at::kFloat && t.scalar_type() != at::kDouble) return refuse(name, Reason::kNoKernel);
    if (kernel_device(t) != row.device) problems_.push_back({name, Reason::kAway});
    if (key.handle != kStepHandle) {
      row.running[key.handle - kFirstRunning] = t.mutable_data_ptr();
      row.running_dtype[key.handle - kFirstRunning] = *plain_dtype(t.scalar_type());
      return true;
    }
    row.step = t.mutable_data_ptr();
    row.step_dtype = *plain_dtype(t.scalar_type());
    // Reading one from a GPU would wait for it: there, loading a checkpoint is what checks it.
    return kernel_device(t) != kHost || is_step_count(read_number({row.step, row.step_dtype, 1})) ||
           refuse(name, Reason::kCount);
  }

  static Form form_of(Extra extra) {
    return extra == Extra::kMaster ? Form::kMaster : extra == Extra::kCompensation ? Form::kCompensation : Form::kAny;
  }

  // Whether a handle is that of a state which is weights, or of its scales.
  bool are_weights(int handle) const {
    const int state = handle >= kFirstScales ? handle - kFirstScales : handle - kState;
    return state >= 0 && state < kMaxStates && rule_.weights >> state & 1;
  }
  unsigned moments_of(const Row& row) const {
    return row.used & kStates & ~rule_.weights;
  }

  at::ScalarType code_type(int operand) const {
    return rule_.squares >> (operand - kState) & 1 ? at::kByte : at::kChar;
  }

  // Adds which states lack, in the order in which they are made, and what locate() would find; false.
  __attribute__((noinline)) bool find_mendable(const Row& row, const Entries& found, bool has_step,
                                               const Handles& handles) {
    std::vector<PyObject*> absent;
    bool has_some = false;
    const auto look = [&](bool is_there, PyObject* name) {
      has_some = has_some || is_there;
      if (!is_there) absent.push_back(name);
    };
    const auto is_there = [](unsigned mask, int handle) { return (mask >> handle & 1) != 0; };
    const bool counts = is_there(found.others, kStepHandle);
    if (rule_.has_step && has_step) look(counts, keys_.name(kStepHandle));
    for (size_t i = 0; !row.only_average && i < rule_.running.size(); ++i) {
      const int handle = kFirstRunning + static_cast<int>(i);
      look(is_there(found.others, handle), keys_.name(handle));
    }
    for (int i = 0; i < kMaxStates; ++i) {
      const int k = kState + i;
      if (!is_used(row.used, k)) continue;
      const bool numbers = is_there(found.numbers, k), codes = is_there(found.codes, k),
                 scales = is_there(found.others, kFirstScales + i);
      if (!numbers && codes != scales)
        return refuse(codes ? keys_.name(kFirstScales + i) : keys_.name(k, Form::kCodes), Reason::kIncomplete);
      look(numbers || codes, keys_.name(k));
    }
    if (has_some && !absent.empty()) return refuse(absent[0], Reason::kIncomplete);
    if (is_used(row.used, kAverage) && !is_there(found.numbers, kAverage)) absent.push_back(keys_.name(kAverage));
    if (is_used(row.used, kExtra) && !is_there(found.numbers, kExtra))
      absent.push_back(keys_.name(kExtra, form_of(row.extra)));
    if (!rule_.has_step && has_step && !counts) absent.push_back(keys_.name(kStepHandle));
    for (PyObject* const name : absent) problems_.push_back({name, Reason::kMissing});
    for (int k = kState; k < kAverage; ++k) {
      if (!handles[k] || !is_there(found.codes, k)) continue;
      Handles only{};
      only[kParam] = handles[kParam];
      only[k] = handles[k];
      if (!layout_of(only).strides[k].empty()) problems_.push_back({keys_.name(k, Form::kCodes), Reason::kStorage});
    }
    return false;
  }

  PyObject* name_of(const Row& row, int operand) const {
    if (operand == kParam) return parameter_;
    if (operand == kGrad) return gradient_;
    return keys_.name(operand, operand == kExtra              ? form_of(row.extra)
                               : is_block(row.dtype[operand]) ? Form::kCodes
                                                              : Form::kNumbers);
  }

  // Where the operands lie, and in which order their elements are visited. False: the kernels do not reach them.
  bool locate(Row& row, const Handles& handles) {
    const at::Tensor& param = *handles[kParam];
    bool contiguous = true, same_strides = param.is_non_overlapping_and_dense();
    for (int k = 0; k < kOperands; ++k) {
      if (!handles[k]) {
        row.data[k] = nullptr;
        continue;
      }
      const at::Tensor& t = *handles[k];
      contiguous = contiguous && t.is_contiguous();
      same_strides = same_strides && (row.is_factor(k) || t.strides() == param.strides());
      row.dtype[k] = stored_dtype(t.scalar_type());
      row.data[k] = address_of(t, k);
      if (!is_aligned(row, k)) return refuse(name_of(row, k), Reason::kUnaligned);
    }
    row.layout = nullptr;
    if (contiguous || same_strides) return true;
    Handles of_elements = handles;
    if (row.factors) of_elements[row.factors] = of_elements[row.factors + 1] = nullptr;
    row.layout = &layouts_.emplace_back(layout_of(of_elements));
    // Codes share a scale in the order in which they lie, which has to be the one that tiles have.
    for (int k = kState; k < kAverage; ++k)
      if (handles[k] && is_block(row.dtype[k]) && !row.layout->strides[k].empty())
        return refuse(name_of(row, k), Reason::kStorage);
    return true;
  }

  // A tensor that shares its storage until it is written gets one of its own.
  void* address_of(const at::Tensor& t, int operand) const {
    const bool reads = operand == kGrad && !writes_gradients_;
    return reads ? const_cast<void*>(t.const_data_ptr()) : t.mutable_data_ptr();
  }

  // A GPU has no access to an address that is no multiple of the element's size.
  static bool is_aligned(const Row& row, int operand) {
    return row.device == kHost || reinterpret_cast<uintptr_t>(row.data[operand]) % size_of(row.dtype[operand]) == 0;
  }

  static constexpr unsigned kStates = (1u << kMaxStates) - 1;  // a rule's own, in Row::used

  const RuleInfo& rule_;
  const StateKeys keys_;
  const bool serves_host_, serves_devices_;
  bool watched_ = false, writes_gradients_ = false;
  // Of the row that is read now: its parameter, where it is spread, and Objects::wholes.
  PyObject* spread_ = nullptr;
  std::array<PyObject*, kHandles> wholes_{};
  int block_ = 0;               // as block_of()
  std::deque<Layout> layouts_;  // of the rows of this step
  std::vector<Problem> problems_;
  // Interned and never freed.
  PyObject *const parameter_ = PyUnicode_InternFromString("parameter"),
                  *const gradient_ = PyUnicode_InternFromString("gradient"),
                  *const state_ = PyUnicode_InternFromString("state");
};

}  // namespace genopt
