// The plan's torch side: at every step it reads an optimizer's Python objects afresh (param_groups,
// state, gradients) into plan rows. No pointer is kept from one step to the next, so nothing can be
// stale; what is kept only says where to look first and whether memory has moved.
//
// A row that the kernels can not take as it is (state yet to be made, a wrong dtype, another device,
// a tensor subclass, ...) is "odd": the step then changes nothing and names the odd rows.
// Python (optim/stepper.py) makes the state, raises the error or lets the reference serve the row.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <optional>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cpu/run.h"
#include "overlap.h"
#include "torch_devices.h"

namespace genopt {

// A Python call failed; the interpreter holds the error.
struct PythonError {};

// Calls one function now and another when it goes out of scope.
template <class Leave>
class Scope {
 public:
  template <class Enter>
  Scope(Enter enter, Leave leave) : leave_(leave) {
    enter();
  }
  ~Scope() {
    leave_();
  }
  Scope(const Scope&) = delete;

 private:
  Leave leave_;
};

// Why a step was not taken. Rows are numbered across all groups.
struct Refusal {
  std::vector<int64_t> rows;
  std::vector<int64_t> groups;  // with an option that is no finite number
  std::vector<std::pair<int64_t, int64_t>> overlaps;
  std::vector<std::pair<int64_t, int64_t>>
      grad_overlaps;               // the gradient of one with what belongs to another, or itself
  std::vector<int> devices;        // of active rows, where a norm has to meet on one, or a tensor lacks on one
  bool gradients_overlap = false;  // and are to be written, which another row's step would then see

  bool is_empty() const {
    return rows.empty() && groups.empty() && overlaps.empty() && grad_overlaps.empty() && devices.empty() &&
           !gradients_overlap;
  }
};

// What a caller says of one step, beside the groups' options. The lists have tensors for some devices, the one for a
// row's device counts: inputs that are read, and results that are written, as the step runs on that device.
struct StepArguments {
  Control control;
  PyObject* grads = nullptr;  // a list with a gradient for each row, or None; without it: the parameters' .grad
  std::array<PyObject*, kDeviceTensors> tensors{};  // lists, or null
};

// Of a tensor that holds numbers, or an optimizer's state in codes.
inline std::optional<DType> plain_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
    case at::kComplexFloat:
      return DType::kFloat32;
    case at::kDouble:
    case at::kComplexDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      return std::nullopt;
  }
}

// The dtypes that parameters, gradients and states may mix.
inline bool may_mix(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

// Whether a dispatch mode or a transform of functorch's sees every operation of torch's, and would not see a kernel.
inline bool is_watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::PreDispatch) ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Whether memory alone tells the tensor's values: a strided tensor where there are kernels, neither lazily
// conjugated or negated, nor of a subclass or transform with a dispatch of its own.
inline bool is_in_memory(const at::Tensor& t) {
  constexpr c10::DispatchKeySet kOthers(
      {c10::DispatchKey::Conjugate, c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor, c10::DispatchKey::Python,
       c10::DispatchKey::Functionalize, c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched});
  const c10::DispatchKeySet keys = t.key_set();
  const bool served = keys.has(c10::DispatchKey::CPU) || (keys.has(c10::DispatchKey::CUDA) && has_kernels(t));
  return served && !keys.has_any(kOthers);
}
// Inference tensors may only be changed in inference mode.
inline bool may_be_written(const at::Tensor& t) {
  return !t.is_inference() || c10::InferenceMode::is_enabled();
}
// And they are floating-point numbers.
inline bool is_plain(const at::Tensor& t) {
  return is_in_memory(t) && plain_dtype(t.scalar_type()).has_value();
}

// Whether a step counter can be one: a whole number, and one that a float64 holds exactly.
inline bool is_step_count(double t) {
  return t >= 0 && t <= 9007199254740992.0 && t == static_cast<double>(static_cast<int64_t>(t));
}

class TorchPlan {
 public:
  // backend: "auto", or "cpu" or "cuda", which leave tensors elsewhere odd.
  TorchPlan(const std::string& rule, const std::string& backend)
      : plan_(rule_info(rule)), cuda_(plan_.rule), backend_(backend) {
    for (const OptionName& option : plan_.rule.options) option_keys_.push_back(PyUnicode_InternFromString(option.key));
    for (const OptionName& option : kCommonOptions) common_keys_.push_back(PyUnicode_InternFromString(option.key));
    const auto add_key = [this](const std::string& name, int handle, Form form) {
      state_keys_.push_back({PyUnicode_InternFromString(name.c_str()), handle, form});
    };
    for (size_t i = 0; i < plan_.rule.states.size(); ++i)
      add_key(plan_.rule.states[i], kState + static_cast<int>(i), Form::kNumbers);
    add_key("step", kStepHandle, Form::kAny);
    add_key("ema", kAverage, Form::kNumbers);
    for (size_t i = 0; i < plan_.rule.states.size(); ++i) {
      const std::string name = plan_.rule.states[i];
      add_key(name + "_codes", kState + static_cast<int>(i), Form::kCodes);
      add_key(name + "_scales", kFirstScales + static_cast<int>(i), Form::kAny);
    }
    add_key("compensation", kExtra, Form::kCompensation);
    add_key("master", kExtra, Form::kMaster);
    for (const char* key : {"state_dtype", "min_int8_size", "param_rounding", "master_weights"})
      storage_keys_.push_back(PyUnicode_InternFromString(key));
  }

  // Takes one step, or changes nothing and says why. `skipped` rows are served elsewhere. Called with the GIL; a Python
  // error is thrown as such.
  std::optional<Refusal> step(PyObject* param_groups, PyObject* state, const std::vector<int64_t>& skipped,
                              const StepArguments& arguments) {
    if (busy_) throw std::runtime_error("step() of this optimizer is already running in another thread");
    const Scope busy([this] { busy_ = true; }, [this] { busy_ = false; });
    Refusal refusal;
    plan_.control = arguments.control;
    Control& control = plan_.control;
    control.measure = control.measure || control.max_norm >= 0 || control.guard;
    watched_ = is_watched();
    read_groups(param_groups, refusal);
    find_grads(arguments.grads);
    find_states(state);
    layouts_.clear();
    std::vector<bool> skip(params_.size());
    for (const int64_t row : skipped) skip.at(row) = true;
    bool moved = recheck_overlaps_, grads_moved = false;
    int64_t elements = 0;
    devices_.clear();
    for (size_t r = 0; r < params_.size(); ++r) {
      prefetch(r);
      Row& row = plan_.rows[r];
      row.active = false;
      has_grad_[r] = 0;
      if (skip[r]) continue;
      if (!read_row(r, state)) {
        refusal.rows.push_back(static_cast<int64_t>(r));
      } else if (row.active) {
        if (!control.only_measure) {
          const uint64_t place = fingerprint(row);
          moved |= place != places_[r];
          places_[r] = place;
          grads_moved |= has_moved_grad(r);
        }
        if (row.device == kHost) elements += row.numel;
        note_device(row);
      }
    }
    forget_idle_groups(refusal);
    read_options_on_devices(refusal);
    // With odd rows too: their state must not be made for a step that will be refused.
    if (!control.only_measure && (moved || !refusal.rows.empty())) {
      check_overlaps(refusal);
    } else if (grads_moved) {
      check_grads(refusal);
    }
    refusal.gradients_overlap = may_write_gradients() && gradients_overlap_;
    std::vector<DeviceTensors> tensors;
    for (const int device : devices_)
      if (const auto found = tensors_on(device, arguments)) tensors.push_back(*found);
    // Unless the factors are given.
    const bool meets = control.measure && devices_.size() > 1 && !arguments.tensors[kGroupScales];
    if (meets || tensors.size() < devices_.size()) refusal.devices = devices_;
    if (devices_.empty() && arguments.tensors[kGradNorm]) refusal.devices = {kNone};  // nothing to write it
    if (!refusal.is_empty()) return refusal;

    std::vector<at::Tensor> held;  // what handles_ then point to
    for (size_t i = 0; i < devices_.size(); ++i)
      if (devices_[i] != kHost) cuda_.step(devices_[i], plan_, sources_, tensors[i]);
    for (size_t i = 0; i < devices_.size(); ++i) {  // last: it changes the plan's control
      if (devices_[i] != kHost) continue;
      read_host_tensors(tensors[i]);
      run(elements, held);
      write_host_tensors(tensors[i]);
    }
    bump_versions();
    return std::nullopt;
  }

  // CUDA kernels launched so far.
  int64_t launches() const {
    return cuda_.launches();
  }

 private:
  static constexpr int kStepHandle = kOperands, kFirstScales = kStepHandle + 1, kHandles = kFirstScales + kMaxStates;

  // The tensors of one row, borrowed for one step.
  using Handles = std::array<const at::Tensor*, kHandles>;

  // What an entry of a state dict may stand for beside its operand: it counts where the group asks for it.
  enum class Form : uint8_t { kAny, kNumbers, kCodes, kCompensation, kMaster };
  struct StateKey {
    PyObject* name;
    int handle;
    Form form;
  };

  // How a group wants states and 16-bit parameters to be kept.
  struct Storage {
    std::optional<at::ScalarType> states;  // none: as they are
    int64_t min_int8_size = 4096;
    Extra extra = Extra::kNone;
    bool stochastic = false;
    bool differentiable = false;  // its gradients are left to torch's own code
  };

  // A row's objects lie scattered in memory: reading them waits for the cache unless they are asked for
  // ahead. Where they were at the last step is only a hint, never followed.
  struct Hint {
    const void* object;
    const void* impl;
    const void* storage;
    const void* version;
  };
  static constexpr size_t kAhead = 12, kNear = 6, kNext = 3;  // rows

  static Hint hint_of(const at::Tensor& t, const void* object) {
    const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
    // VariableVersion is one pointer to a counter.
    const void* version = *reinterpret_cast<void* const*>(&impl->version_counter());
    return {object, impl, impl->unsafe_storage().unsafeGetStorageImpl(), version};
  }

  static void fetch(const void* address, int bytes) {
    for (int byte = 0; byte < bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(address) + byte);
  }

  // Asks for what row `r` will read, in the order in which one thing leads to the next.
  void prefetch(size_t r) const {
    const size_t rows = params_.size();
    if (r + kAhead < rows) {
      fetch(states_[r + kAhead], 64);
      for (const Hint& hint : hints_[r + kAhead]) {
        if (!hint.impl) continue;
        fetch(hint.object, 64);
        fetch(hint.impl, sizeof(c10::TensorImpl));
        fetch(hint.storage, 128);
        fetch(hint.version, 16);
      }
    }
    // The gradient is another tensor at every step: only the parameter leads to it.
    if (r + kNear < rows) {
      if (states_[r + kNear] && PyDict_Check(states_[r + kNear]))
        fetch(reinterpret_cast<PyDictObject*>(states_[r + kNear])->ma_keys, 192);
      if (const c10::TensorImpl* grad = grad_of(r + kNear)) fetch(grad, sizeof(c10::TensorImpl));
    }
    if (r + kNext < rows)
      if (const c10::TensorImpl* grad = grad_of(r + kNext)) fetch(grad->unsafe_storage().unsafeGetStorageImpl(), 128);
  }

  // If the step is not skipped, which is known later.
  bool may_write_gradients() const {
    return plan_.control.gradients != Gradients::kKept;
  }

  const c10::TensorImpl* grad_of(size_t r) const {
    if (!THPVariable_CheckExact(params_[r]) || grads_) return nullptr;
    const at::Tensor& grad = THPVariable_Unpack(params_[r]).unsafeGetTensorImpl()->grad();
    return grad.defined() ? grad.unsafeGetTensorImpl() : nullptr;
  }

  void find_grads(PyObject* grads) {
    grads_ = grads;
    if (grads && (!PyList_Check(grads) || PyList_GET_SIZE(grads) != static_cast<Py_ssize_t>(params_.size())))
      throw std::invalid_argument("grads must be a list with one entry for each parameter");
  }

  // The tensors that a caller gave for a device, if all that were given for any are there.
  static std::optional<DeviceTensors> tensors_on(int device, const StepArguments& arguments) {
    DeviceTensors found{};
    for (int i = 0; i < kDeviceTensors; ++i) {
      PyObject* const list = arguments.tensors[i];
      if (!list) continue;
      for (Py_ssize_t at = 0; at < PyList_Size(list); ++at) {
        PyObject* const item = PyList_GET_ITEM(list, at);
        if (!THPVariable_Check(item)) throw std::invalid_argument("a step's inputs and results must be tensors");
        const at::Tensor& tensor = THPVariable_Unpack(item);
        if (is_plain_number(tensor) && kernel_device(tensor) == device)
          found[i] = {const_cast<void*>(tensor.const_data_ptr()), number_dtype(tensor), tensor.numel()};
      }
      if (!found[i].address) return std::nullopt;
    }
    return found;
  }
  // Beside the floating-point dtypes: counters in int64.
  static bool is_plain_number(const at::Tensor& tensor) {
    return is_plain(tensor) || (tensor.scalar_type() == at::kLong && tensor.layout() == at::kStrided);
  }
  static DType number_dtype(const at::Tensor& tensor) {
    return plain_dtype(tensor.scalar_type()).value_or(DType::kFloat64);
  }

  void read_host_tensors(const DeviceTensors& tensors) {
    Control& control = plan_.control;
    // As torch: the reciprocal of a loss scale is rounded to float.
    if (const DeviceTensor& scale = tensors[kGradScale]; scale.address)
      control.scale *= control.unscale = static_cast<double>(static_cast<float>(1.0 / read_number(scale)));
    if (const DeviceTensor& found = tensors[kFoundInf]; found.address) control.skip = read_number(found) != 0;
    plan_.group_scales.clear();
    for (int64_t i = 0; i < tensors[kGroupScales].count; ++i)
      plan_.group_scales.push_back(static_cast<const double*>(tensors[kGroupScales].address)[i]);
  }
  void write_host_tensors(const DeviceTensors& tensors) {
    const Control& control = plan_.control;
    if (!control.measure) return;
    if (tensors[kGradNorm].address) write_number(tensors[kGradNorm], plan_.total_norm());
    if (tensors[kNonFinite].address) write_number(tensors[kNonFinite], plan_.found_nonfinite());
    if (tensors[kSkippedSteps].address && control.guard && plan_.found_nonfinite())
      ++*static_cast<int64_t*>(tensors[kSkippedSteps].address);
  }
  static double read_number(const DeviceTensor& tensor) {
    return with_codec(tensor.dtype, [&]<class Codec>(Codec) {
      return Codec::template decode<double>(*static_cast<const typename Codec::Stored*>(tensor.address));
    });
  }
  static void write_number(const DeviceTensor& tensor, double x) {
    with_codec(tensor.dtype,
               [&]<class Codec>(Codec) { *static_cast<typename Codec::Stored*>(tensor.address) = Codec::encode(x); });
  }

  void read_groups(PyObject* param_groups, Refusal& refusal) {
    params_.clear();
    const Py_ssize_t count = PyList_Size(param_groups);
    if (count < 0) throw PythonError();
    plan_.groups.assign(count, kNoOptions);
    sources_.assign(count, Sources{});
    options_on_devices_.clear();
    group_devices_.assign(count, kNone);
    masks_.assign(count, 0);
    storages_.assign(count, Storage{});
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* group = PyList_GET_ITEM(param_groups, i);
      static PyObject* const params_key = PyUnicode_InternFromString("params");
      PyObject* params = PyDict_Check(group) ? PyDict_GetItemWithError(group, params_key) : nullptr;
      if (!params || !PyList_Check(params)) throw std::invalid_argument("a param group has no list of 'params'");
      if (!read_options(group, static_cast<int>(i)) || !read_storage(group, storages_[i])) refusal.groups.push_back(i);
      const Options& options = plan_.groups[i];
      masks_[i] = plan_.rule.used_states(options) | (options[kEmaDecay] >= 0 ? kWithAverage : 0);
      if (clips_alone(options.data())) plan_.control.measure = true;
      const size_t first = params_.size(), last = first + PyList_GET_SIZE(params);
      params_.resize(last);
      if (plan_.rows.size() < last) plan_.rows.resize(last);
      for (size_t r = first; r < last; ++r) {
        params_[r] = PyList_GET_ITEM(params, r - first);
        plan_.rows[r].group = static_cast<int>(i);
      }
    }
    plan_.rows.resize(params_.size());
    handles_.resize(params_.size());
    places_.resize(params_.size());
    grad_places_.resize(params_.size());
    hints_.resize(params_.size());
    has_grad_.resize(params_.size());
  }

  bool read_options(PyObject* group, int index) {
    Options& options = plan_.groups[index];
    for (size_t i = 0; i < option_keys_.size(); ++i) {
      PyObject* value = PyDict_GetItemWithError(group, option_keys_[i]);
      const int item = plan_.rule.options[i].item;
      if (value && item >= 0)
        value = PyTuple_Check(value) && item < PyTuple_GET_SIZE(value) ? PyTuple_GET_ITEM(value, item)
                : PyList_Check(value) && item < PyList_GET_SIZE(value) ? PyList_GET_ITEM(value, item)
                                                                       : nullptr;
      if (!value || PyUnicode_Check(value)) return false;
      if (PyFloat_CheckExact(value)) {
        options[i] = PyFloat_AS_DOUBLE(value);
      } else if (THPVariable_Check(value)) {
        const at::Tensor& tensor = THPVariable_Unpack(value);
        if (tensor.numel() != 1 || tensor.is_complex()) return false;
        if (watched_) continue;  // no row is stepped
        const bool structural = plan_.rule.structural >> i & 1;
        if (!structural && is_plain(tensor) && option_device(tensor) != kHost) {
          options_on_devices_.push_back({index, static_cast<int>(i), &tensor});
          continue;
        }
        options[i] = tensor.item().toDouble();
      } else {
        options[i] = PyFloat_AsDouble(value);
        if (PyErr_Occurred()) {
          PyErr_Clear();
          return false;
        }
      }
      if (!std::isfinite(options[i])) return false;
    }
    for (int k = kMaxOptions; k < kAllOptions; ++k) {
      PyObject* value = PyDict_GetItemWithError(group, common_keys_[k - kMaxOptions]);
      if (!value || value == Py_None) continue;
      options[k] = PyUnicode_Check(value) ? kUnset : PyFloat_AsDouble(value);
      PyErr_Clear();
      if (!(options[k] >= 0) || (k == kEmaDecay && options[k] >= 1) || (k == kSeed && options[k] > 0xffffffff))
        return false;
    }
    return (options[kMaxGradNorm] >= 0) + (options[kClipPerParam] >= 0) + (options[kAgc] >= 0) <= 1;
  }

  // False: something is wrong, or what goes with an option lacks; the rest is read all the same.
  bool read_storage(PyObject* group, Storage& storage) const {
    bool complete = true;
    PyObject* values[4];
    for (int i = 0; i < 4; ++i) {
      values[i] = PyDict_GetItemWithError(group, storage_keys_[i]);
      if (values[i] == Py_None && i == 0) values[i] = nullptr;  // only a dtype may be None
    }
    const auto [dtype, min_size, rounding, master] = values;
    if (min_size) {
      if (!PyLong_CheckExact(min_size)) return false;
      int overflow = 0;
      storage.min_int8_size = PyLong_AsLongLongAndOverflow(min_size, &overflow);
      if (overflow > 0) storage.min_int8_size = std::numeric_limits<int64_t>::max();
      if (storage.min_int8_size < 0) return false;
    }
    if (dtype) {
      if (!THPDtype_Check(dtype)) return false;
      storage.states = reinterpret_cast<THPDtype*>(dtype)->scalar_type;
      if (storage.states != at::kFloat && storage.states != at::kBFloat16 && storage.states != at::kChar) return false;
      static PyObject* const format = PyUnicode_InternFromString("int8_format");
      if (storage.states == at::kChar) complete = PyDict_GetItemWithError(group, format) != nullptr;
    }
    if (rounding) {
      if (!PyUnicode_Check(rounding)) return false;
      storage.stochastic = PyUnicode_CompareWithASCIIString(rounding, "stochastic") == 0;
      const bool kahan = PyUnicode_CompareWithASCIIString(rounding, "kahan") == 0;
      if (kahan) storage.extra = Extra::kCompensation;
      if (!kahan && !storage.stochastic && PyUnicode_CompareWithASCIIString(rounding, "nearest") != 0) return false;
    }
    if (storage.stochastic) complete &= PyDict_GetItemWithError(group, common_keys_[kSeed - kMaxOptions]) != nullptr;
    static PyObject* const differentiable = PyUnicode_InternFromString("differentiable");
    PyObject* const differentiates = PyDict_GetItemWithError(group, differentiable);
    storage.differentiable = differentiates && PyObject_IsTrue(differentiates) == 1;
    if (master && !PyLong_Check(master)) return false;
    if (master && PyObject_IsTrue(master) == 1) {
      if (storage.stochastic || storage.extra != Extra::kNone) return false;
      storage.extra = Extra::kMaster;
    }
    return complete;
  }

  // The devices that a group's active rows are on, for read_options_on_devices.
  static constexpr int kNone = -2, kSeveral = -3;

  void note_device(const Row& row) {
    int& of_group = group_devices_[row.group];
    of_group = of_group == kNone || of_group == row.device ? row.device : kSeveral;
    if (std::find(devices_.begin(), devices_.end(), row.device) == devices_.end()) devices_.push_back(row.device);
  }

  // Options of a group without a row to step do no harm, whatever they are.
  void forget_idle_groups(Refusal& refusal) const {
    std::erase_if(refusal.groups, [&](int64_t group) {
      const auto is_in_group = [&](int64_t r) { return plan_.rows[r].group == group; };
      return group_devices_[group] == kNone && std::none_of(refusal.rows.begin(), refusal.rows.end(), is_in_group);
    });
  }

  // A tensor option on the device of all its group's rows is read there, by the kernels; else its value is
  // fetched, which waits for the device.
  void read_options_on_devices(Refusal& refusal) {
    for (const auto& [group, option, tensor] : options_on_devices_) {
      if (group_devices_[group] == kNone) continue;
      if (group_devices_[group] == option_device(*tensor)) {
        sources_[group][option] = {tensor->const_data_ptr(), *plain_dtype(tensor->scalar_type())};
        continue;
      }
      const double value = plan_.groups[group][option] = tensor->item().toDouble();
      if (!std::isfinite(value)) refusal.groups.push_back(group);
    }
  }

  // Finds each parameter's state dict. Hashing a tensor calls Python, so the order in which `state`
  // held its keys last time is tried first: reading it through costs nanoseconds a tensor.
  void find_states(PyObject* state) {
    if (!PyDict_Check(state)) throw std::invalid_argument("an optimizer's state must be a dict");
    if (static_cast<size_t>(PyDict_Size(state)) == order_.size() && match_states(state)) return;
    std::unordered_map<PyObject*, int64_t> row_of;
    for (size_t r = 0; r < params_.size(); ++r) row_of.emplace(params_[r], static_cast<int64_t>(r));
    order_.clear();
    PyObject *key, *value;
    for (Py_ssize_t position = 0; PyDict_Next(state, &position, &key, &value);) {
      const auto found = row_of.find(key);
      order_.push_back(found == row_of.end() ? -1 : found->second);
    }
    match_states(state);
  }

  bool match_states(PyObject* state) {
    states_.assign(params_.size(), nullptr);
    PyObject *key, *value;
    size_t i = 0;
    for (Py_ssize_t position = 0; PyDict_Next(state, &position, &key, &value); ++i) {
      const int64_t row = order_[i];
      if (row < 0) continue;
      if (row >= static_cast<int64_t>(params_.size()) || params_[row] != key) return false;
      states_[row] = value;
    }
    return true;
  }

  // What a state dict holds under `key`, or null. Keys are mostly the interned ones.
  const StateKey* find_key(PyObject* key) const {
    for (const bool by_value : {false, true})
      for (const StateKey& wanted : state_keys_)
        if (by_value ? PyUnicode_Check(key) && PyUnicode_Compare(key, wanted.name) == 0 : key == wanted.name)
          return &wanted;
    return nullptr;
  }

  // What a row takes as its gradient, or null.
  const at::Tensor* find_grad(size_t r) const {
    if (grads_) {
      PyObject* const given = PyList_GET_ITEM(grads_, r);
      return given == Py_None ? nullptr : &THPVariable_Unpack(given);
    }
    const at::Tensor& grad = THPVariable_Unpack(params_[r]).unsafeGetTensorImpl()->grad();
    return grad.defined() ? &grad : nullptr;
  }

  // False: odd. A row without gradient is fine, and inactive.
  bool read_row(size_t r, PyObject* state) {
    if (!THPVariable_Check(params_[r])) return false;
    const at::Tensor& param = THPVariable_Unpack(params_[r]);
    if (grads_ && PyList_GET_ITEM(grads_, r) != Py_None && !THPVariable_Check(PyList_GET_ITEM(grads_, r))) return false;
    const at::Tensor* const grad = find_grad(r);
    Row& row = plan_.rows[r];
    row.used = masks_[row.group];
    if (!grad) {
      // What no kernel steps, as a frozen integer weight, has no average.
      if (!(row.used & kWithAverage) || !plain_dtype(param.scalar_type())) return true;
      if (!param.requires_grad() && !find_state(r, state)) return true;
      row.used = kWithAverage | kRests;
    }
    has_grad_[r] = grad != nullptr;
    if (watched_ || (grad && storages_[row.group].differentiable)) return false;
    // Gradients of a dtype that does not mix with the parameter's come only from an accumulation of ours.
    if (!is_plain(param) || !may_be_written(param)) return false;
    if (grad && may_write_gradients() && !may_be_written(*grad)) return false;
    const bool mixes = grad && may_mix(grad->scalar_type()) && may_mix(param.scalar_type());
    if (grad && (!is_plain(*grad) || grad->sizes() != param.sizes() || grad->is_complex() != param.is_complex() ||
                 (!grads_ && !mixes && grad->scalar_type() != param.scalar_type())))
      return false;
    const int device = kernel_device(param);
    if (backend_ == (device == kHost ? "cuda" : "cpu")) return false;

    Handles& handles = handles_[r];
    handles.fill(nullptr);
    objects_.fill(nullptr);
    objects_[kParam] = params_[r];
    handles[kParam] = &param;
    handles[kGrad] = grad;
    if (!read_state(r, state, handles)) return false;

    row.active = true;
    row.device = device;
    row.numel = param.numel() * (param.is_complex() ? 2 : 1);
    row.layout = nullptr;
    bool contiguous = true, same_strides = param.is_non_overlapping_and_dense();
    for (int k = 0; k < kOperands; ++k) {
      if (!handles[k]) {
        row.data[k] = nullptr;
        continue;
      }
      const at::Tensor& t = *handles[k];
      contiguous = contiguous && t.is_contiguous();
      same_strides = same_strides && t.strides() == param.strides();
      row.dtype[k] = t.scalar_type() == at::kChar   ? DType::kInt8
                     : t.scalar_type() == at::kByte ? DType::kUInt8
                                                    : *plain_dtype(t.scalar_type());
      const bool reads = k == kGrad && !may_write_gradients();
      row.data[k] = reads ? const_cast<void*>(t.const_data_ptr()) : t.mutable_data_ptr();
      // A GPU has no access to an address that is no multiple of the element's size.
      const bool aligned = reinterpret_cast<uintptr_t>(row.data[k]) % size_of(row.dtype[k]) == 0;
      if (kernel_device(t) != device || (device != kHost && !aligned)) return row.active = false;
    }
    for (int k = 0; k < kHandles; ++k)
      hints_[r][k] = handles[k] && k != kGrad ? hint_of(*handles[k], objects_[k]) : Hint{};
    if (!contiguous && !same_strides) {
      row.layout = &layouts_.emplace_back(layout_of(handles));
      // Codes share a scale in the order in which they lie, which has to be the one that tiles have.
      for (int k = kState; k < kAverage; ++k)
        if (handles[k] && is_block(row.dtype[k]) && !row.layout->strides[k].empty()) return row.active = false;
    }
    return true;
  }

  // What is to be kept beside the row's plain operands.
  void choose_storage(Row& row, const at::Tensor& param) const {
    const Storage& storage = storages_[row.group];
    const bool is_half = param.scalar_type() == at::kBFloat16 || param.scalar_type() == at::kHalf;
    const bool narrow = is_half && !(row.used & kRests);
    row.extra = narrow ? storage.extra : Extra::kNone;
    if (row.extra != Extra::kNone) row.used |= kWithExtra;
    row.unbiased = narrow && storage.stochastic ? 1u << kParam : 0;
    if (states_dtype(row, param) == at::kBFloat16) row.unbiased |= (row.used & ((1u << kMaxStates) - 1)) << kState;
  }

  // How a row's states are to be stored: kChar as codes, none: any dtype of numbers.
  std::optional<at::ScalarType> states_dtype(const Row& row, const at::Tensor& param) const {
    const Storage& storage = storages_[row.group];
    if (!may_mix(param.scalar_type())) return std::nullopt;
    return storage.states == at::kChar && param.numel() < storage.min_int8_size ? at::kFloat : storage.states;
  }

  // A parameter's state dict, or null.
  PyObject* find_state(size_t r, PyObject* state) {
    PyObject* entries = states_[r];
    if (!entries) {
      entries = PyDict_GetItemWithError(state, params_[r]);
      if (!entries && PyErr_Occurred()) throw PythonError();
      if (entries) order_.clear();  // learn the order anew at the next step
    }
    return entries && PyDict_Check(entries) ? entries : nullptr;
  }

  bool read_state(size_t r, PyObject* state, Handles& handles) {
    Row& row = plan_.rows[r];
    choose_storage(row, *handles[kParam]);
    // Rounding turns with the step count.
    constexpr unsigned kStates = (1u << kMaxStates) - 1;
    const bool turns = row.unbiased || (row.used & kStates && states_dtype(row, *handles[kParam]) == at::kChar);
    const bool has_step = (plan_.rule.has_step || turns) && !(row.used & kRests);
    row.step = nullptr;
    row.scales = {};
    PyObject* const entries = find_state(r, state);
    if (!entries) return !row.used && !has_step;

    const at::Tensor& param = *handles[kParam];
    const std::optional<at::ScalarType> dtype = states_dtype(row, param);
    const Form form = dtype == at::kChar ? Form::kCodes : Form::kNumbers;
    const int device = kernel_device(param);
    PyObject *key, *value;
    for (Py_ssize_t position = 0; PyDict_Next(entries, &position, &key, &value);) {
      const StateKey* const found = find_key(key);
      if (!found) continue;
      const int handle = found->handle;
      if (handle == kStepHandle) {
        if (!has_step) continue;
      } else if (handle >= kFirstScales) {
        if (form != Form::kCodes || !is_used(row.used, handle - kFirstScales + kState)) continue;
      } else {
        const Form wanted = handle == kAverage            ? Form::kNumbers
                            : handle != kExtra            ? form
                            : row.extra == Extra::kMaster ? Form::kMaster
                                                          : Form::kCompensation;
        // What another choice of storage has left behind is taken away first, lest it return when that does.
        if (handle == kExtra && !(row.used & kRests) && !is_used(row.used, kExtra)) return false;
        if (!is_used(row.used, handle)) continue;
        if (found->form != wanted) return false;
      }
      if (!THPVariable_Check(value)) return false;
      const at::Tensor& t = THPVariable_Unpack(value);
      if (!is_in_memory(t) || !may_be_written(t)) return false;
      if (handle == kStepHandle) {
        if (t.numel() != 1 || (t.scalar_type() != at::kFloat && t.scalar_type() != at::kDouble)) return false;
        if (kernel_device(t) != device) return false;
        row.step = t.mutable_data_ptr();
        row.step_dtype = *plain_dtype(t.scalar_type());
        // Reading one from a GPU would wait for it: there, loading a checkpoint is what checks it.
        if (device == kHost && !is_step_count(read_number({row.step, row.step_dtype, 1}))) return false;
      } else if (handle >= kFirstScales) {
        const bool fits = t.scalar_type() == at::kFloat && t.dim() == 1 && t.numel() == tiles_of(param.numel()) &&
                          t.is_contiguous() && kernel_device(t) == device;
        row.scales[handle - kFirstScales] = static_cast<float*>(fits ? t.mutable_data_ptr() : nullptr);
        if (!fits || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % sizeof(float)) return false;
      } else if (t.sizes() != param.sizes() || !fits_dtype(row, handle, t.scalar_type(), param.scalar_type(), dtype)) {
        return false;
      }
      handles[handle] = &t;
      objects_[handle] = value;
    }
    for (int k = kState; k < kOperands; ++k)
      if (is_used(row.used, k) && !handles[k]) return false;
    for (size_t i = 0; form == Form::kCodes && i < plan_.rule.states.size(); ++i)
      if (is_used(row.used, kState + static_cast<int>(i)) && !handles[kFirstScales + i]) return false;
    return !has_step || row.step;
  }

  bool fits_dtype(const Row& row, int operand, at::ScalarType type, at::ScalarType param,
                  std::optional<at::ScalarType> states) const {
    if (operand == kExtra) return type == (row.extra == Extra::kMaster ? at::kFloat : param);
    if (operand != kAverage && states == at::kChar)
      return type == (plan_.rule.squares >> (operand - kState) & 1 ? at::kByte : at::kChar);
    if (operand != kAverage && states && type != *states) return false;
    return plain_dtype(type).has_value() && at::isComplexType(type) == at::isComplexType(param);
  }

  // A complex tensor is a real one with a last dimension of 2.
  static std::vector<int64_t> real_view(at::IntArrayRef dims, bool complex, int64_t factor, int64_t last) {
    std::vector<int64_t> result(dims.begin(), dims.end());
    if (!complex) return result;
    for (int64_t& each : result) each *= factor;
    result.push_back(last);
    return result;
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

  static uint64_t mixed(uint64_t hash, uint64_t value) {
    return (hash ^ value) * 0xff51afd7ed558ccdu + (hash >> 29);
  }

  // Where a row writes, as one number: when it changes, overlaps are looked for again.
  uint64_t fingerprint(const Row& row) const {
    uint64_t hash = 0x9e3779b97f4a7c15u;
    const auto mix = [&hash](uint64_t value) { hash = mixed(hash, value); };
    for (int k = 0; k < kOperands; ++k)
      if (k != kGrad || may_write_gradients()) mix(reinterpret_cast<uintptr_t>(row.data[k]));
    uint64_t kinds = 0;
    static_assert(sizeof row.dtype < sizeof kinds);
    std::memcpy(&kinds, row.dtype.data(), sizeof row.dtype);
    mix(kinds << 8 | may_write_gradients());
    for (const float* scales : row.scales) mix(reinterpret_cast<uintptr_t>(scales));
    mix(reinterpret_cast<uintptr_t>(row.step));
    mix(row.numel);
    if (row.layout) {
      for (const int64_t size : row.layout->sizes) mix(size);
      for (const auto& operand : row.layout->strides)
        for (const int64_t stride : operand) mix(stride);
    }
    return hash;
  }

  static Region region_of(const at::Tensor& t, size_t r) {
    Region region{
        static_cast<const char*>(t.const_data_ptr()), t.element_size(), t.numel(), {}, {}, static_cast<int64_t>(r)};
    if (!t.is_non_overlapping_and_dense()) {
      region.sizes = t.sizes().vec();
      region.strides = t.strides().vec();
    }
    return region;
  }

  // Visits a row's parameter and the tensors of its state.
  template <class Visit>
  void for_each_own(size_t r, Visit visit) const {
    visit(THPVariable_Unpack(params_[r]));
    PyObject *entries = states_[r], *key, *value;
    if (!entries || !PyDict_Check(entries)) return;
    for (Py_ssize_t position = 0; PyDict_Next(entries, &position, &key, &value);)
      if (THPVariable_Check(value)) visit(THPVariable_Unpack(value));
  }

  bool takes_part(size_t r) const {
    return has_grad_[r] || plan_.rows[r].active;
  }

  // Looks at what all rows write, with or without a gradient now, so that it need not be done again
  // when a gradient comes. A pair of which one has none does no harm yet: it is looked at every time.
  void check_overlaps(Refusal& refusal) {
    std::vector<Region> regions, gradients;
    for (size_t r = 0; r < params_.size(); ++r) {
      if (!THPVariable_Check(params_[r])) continue;
      if (may_write_gradients() && has_grad_[r] && plan_.rows[r].active)
        gradients.push_back(region_of(*handles_[r][kGrad], r));
      for_each_own(r, [&](const at::Tensor& t) {
        if (is_in_memory(t)) regions.push_back(region_of(t, r));
      });
    }
    written_ = Regions(std::move(regions));
    gradients_overlap_ = !Regions(std::move(gradients)).find_overlaps().empty();
    recheck_overlaps_ = gradients_overlap_;
    for (const auto& [a, b] : written_.find_overlaps()) {
      if (takes_part(a) && takes_part(b)) refusal.overlaps.emplace_back(a, b);
      recheck_overlaps_ = true;
    }
    check_grads(refusal);
  }

  // Whether no other tensor can share its memory, as with most gradients that backward() makes: nobody else holds it or
  // its storage, and that is torch's own.
  static bool is_alone(const at::Tensor& t) {
    const c10::Storage& storage = t.unsafeGetTensorImpl()->unsafe_storage();
    static const c10::DeleterFnPtr host_deleter = c10::GetAllocator(c10::kCPU)->raw_deleter();
    const c10::DeleterFnPtr deleter = storage.data_ptr().get_deleter();
    const bool owned =
        t.is_cpu() ? deleter == host_deleter : deleter == c10::GetAllocator(t.device().type())->raw_deleter();
    if (!owned || storage.use_count() != 1) return false;
    // Its own Python object counts as one.
    return t.use_count() == 1 ||
           (t.use_count() == 2 && is_held_by_tensor_alone(*t.unsafeGetTensorImpl()->pyobj_slot()));
  }
  template <class Slot>
  static bool is_held_by_tensor_alone(const Slot& slot) {
    if constexpr (requires { slot.load_pyobj(); }) {
      PyObject* const object = slot.load_pyobj();
      return object && Py_REFCNT(object) == 1;
    } else {
      return false;
    }
  }

  // Whether the gradient of an active row has to be looked at again.
  bool has_moved_grad(size_t r) {
    uint64_t place = 0;
    if (const at::Tensor* const grad = handles_[r][kGrad]; grad && (grads_ || !is_alone(*grad))) {
      place = mixed(0x9e3779b97f4a7c15u, reinterpret_cast<uintptr_t>(grad->const_data_ptr()));
      for (const int64_t size : grad->sizes()) place = mixed(place, size);
      for (const int64_t stride : grad->strides()) place = mixed(place, stride);
      place = mixed(place, static_cast<uint64_t>(grad->scalar_type()));
    }
    const bool moved = place && place != grad_places_[r];
    grad_places_[r] = place;
    return moved;
  }

  // Whether gradients share memory with what the step writes, or what is written to them with anything of the
  // optimizer's.
  void check_grads(Refusal& refusal) {
    for (size_t r = 0; r < params_.size(); ++r) {
      const at::Tensor* const grad = has_grad_[r] ? find_grad(r) : nullptr;
      if (!grad || !is_in_memory(*grad) || (!grads_ && is_alone(*grad))) continue;
      for (const Region* met : written_.find_met(region_of(*grad, r))) {
        const size_t owner = static_cast<size_t>(met->owner);
        if (!may_write_gradients() && owner == r && is_own(*grad, r)) continue;
        recheck_overlaps_ = true;
        if (may_write_gradients() || takes_part(owner)) refusal.grad_overlaps.emplace_back(r, owner);
      }
    }
  }

  // Whether it is the very same elements, in the same order, as the row's parameter or one of its states: then each
  // element is read before it is written.
  bool is_own(const at::Tensor& grad, size_t r) const {
    bool found = false;
    for_each_own(r, [&](const at::Tensor& t) {
      found = found ||
              (is_in_memory(t) && t.const_data_ptr() == grad.const_data_ptr() &&
               t.scalar_type() == grad.scalar_type() && t.sizes() == grad.sizes() && t.strides() == grad.strides());
    });
    return found;
  }

  // Steps the rows on the CPU.
  void run(int64_t elements, std::vector<at::Tensor>& held) {
    const int threads = at::get_num_threads();
    // A long run lets other Python threads work, and so holds what they could take away: worth it where
    // rows are large, as holding one costs about as much as stepping a thousand elements.
    constexpr int64_t kLong = 1 << 20, kLongRow = 1 << 14;
    if (elements < kLong || elements < kLongRow * static_cast<int64_t>(params_.size())) {
      cpu::step(plan_, threads);
      return;
    }
    for (size_t r = 0; r < params_.size(); ++r)
      if (plan_.rows[r].active)
        for (const at::Tensor* t : handles_[r])
          if (t) held.push_back(*t);
    for (size_t r = 0, i = 0; r < params_.size(); ++r)
      if (plan_.rows[r].active)
        for (const at::Tensor*& t : handles_[r])
          if (t) t = &held[i++];
    PyThreadState* thread = nullptr;
    const Scope without_gil([&thread] { thread = PyEval_SaveThread(); }, [&thread] { PyEval_RestoreThread(thread); });
    cpu::step(plan_, threads);
  }

  // Autograd then knows that these changed; torch's own fused kernels leave this out.
  void bump_versions() const {
    for (size_t r = 0; r < params_.size(); ++r) {
      if (r + kAhead < params_.size())
        for (const Hint& hint : hints_[r + kAhead]) {
          __builtin_prefetch(static_cast<const char*>(hint.impl) + 40);  // where it points to its version
          __builtin_prefetch(hint.version, 1);
        }
      const Row& row = plan_.rows[r];
      if (!row.active) continue;
      const bool steps = !(plan_.control.skip && row.device == kHost) && !plan_.control.only_measure;
      for (int k = 0; k < kHandles; ++k) {
        if (!handles_[r][k]) continue;
        const bool zeroes = plan_.control.gradients == Gradients::kZeroed;
        const bool written =
            k == kGrad ? may_write_gradients() && (steps || zeroes) : steps && !(k == kParam && (row.used & kRests));
        // Tensors made in inference mode have no version.
        if (written && !handles_[r][k]->is_inference()) handles_[r][k]->unsafeGetTensorImpl()->bump_version();
      }
    }
  }

  Plan plan_;
  CudaDevices cuda_;
  const std::string backend_;
  bool busy_ = false;
  bool watched_ = false;
  bool recheck_overlaps_ = false, gradients_overlap_ = false;
  Regions written_;            // of the last overlap check
  PyObject* grads_ = nullptr;  // of the step that is read now
  // Keys are interned and never freed.
  std::vector<PyObject*> option_keys_, common_keys_;
  std::vector<StateKey> state_keys_;
  std::vector<PyObject*> storage_keys_;
  std::vector<int64_t> order_;  // the row of each key of `state`, in its order; -1: of none

  // Per row, filled at every step.
  std::vector<PyObject*> params_, states_;
  std::vector<Handles> handles_;
  std::vector<char> has_grad_;
  std::array<PyObject*, kHandles> objects_{};  // of the row that is read now
  std::deque<Layout> layouts_;
  // Per group.
  std::vector<unsigned> masks_;  // the states in use
  std::vector<Storage> storages_;
  std::vector<Sources> sources_;
  std::vector<int> group_devices_;

  struct OptionOnDevice {
    int group, option;
    const at::Tensor* tensor;
  };
  std::vector<OptionOnDevice> options_on_devices_;
  std::vector<int> devices_;  // with active rows

  std::vector<std::array<Hint, kHandles>> hints_;
  std::vector<uint64_t> places_;       // fingerprints of the last overlap check
  std::vector<uint64_t> grad_places_;  // and of gradients that may share memory with others
};

}  // namespace genopt
