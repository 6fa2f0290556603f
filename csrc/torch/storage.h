// How a parameter group wants states and 16-bit parameters to be kept.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/Dtype.h>

#include <limits>
#include <optional>

#include "tensors.h"

namespace genopt {

struct Storage {
  std::optional<at::ScalarType> states;  // none: as they are
  int64_t min_int8_size = 4096;
  Extra extra = Extra::kNone;
  bool stochastic = false;
  bool differentiable = false;  // its gradients are left to torch's own code
  bool capturable = false;

  bool operator==(const Storage&) const = default;

  // How the states of one parameter are to be stored: kChar as codes, none: in any dtype of numbers. `whole`: of which
  // it may be a part; `divides`: so that blocks of codes might be.
  std::optional<at::ScalarType> states_of(const at::Tensor& whole, bool divides) const {
    if (!may_mix(whole.scalar_type())) return std::nullopt;
    return states == at::kChar && (divides || whole.numel() < min_int8_size) ? at::kFloat : states;
  }
};

// Reads it from groups' options.
class StorageReader {
 public:
  // False: something is wrong, or what goes with an option is missing; the rest is read all the same.
  bool read(PyObject* group, Storage& storage) const {
    const auto find = [group](PyObject* key) { return PyDict_GetItemWithError(group, key); };
    PyObject* const dtype = find(state_dtype_);
    PyObject *const min_size = find(min_int8_size_), *const rounding = find(param_rounding_);
    PyObject* const master = find(master_weights_);
    const auto is_true = [](PyObject* value) { return value && PyObject_IsTrue(value) == 1; };
    bool complete = true;
    if (min_size) {
      if (!PyLong_CheckExact(min_size)) return false;
      int overflow = 0;
      storage.min_int8_size = PyLong_AsLongLongAndOverflow(min_size, &overflow);
      if (overflow > 0) storage.min_int8_size = std::numeric_limits<int64_t>::max();
      if (storage.min_int8_size < 0) return false;
    }
    if (dtype && dtype != Py_None) {
      if (!THPDtype_Check(dtype)) return false;
      storage.states = reinterpret_cast<THPDtype*>(dtype)->scalar_type;
      if (storage.states != at::kFloat && storage.states != at::kBFloat16 && storage.states != at::kChar) return false;
      if (storage.states == at::kChar) complete = find(int8_format_) != nullptr;
    }
    if (rounding) {
      if (!PyUnicode_Check(rounding)) return false;
      const auto is = [rounding](const char* name) { return PyUnicode_CompareWithASCIIString(rounding, name) == 0; };
      storage.stochastic = is("stochastic");
      if (is("kahan")) storage.extra = Extra::kCompensation;
      if (storage.extra == Extra::kNone && !storage.stochastic && !is("nearest")) return false;
    }
    if (storage.stochastic) complete &= find(rounding_seed_) != nullptr;
    storage.differentiable = is_true(find(differentiable_));
    storage.capturable = is_true(find(capturable_));
    if (master && !PyLong_Check(master)) return false;
    if (is_true(master)) {
      if (storage.stochastic || storage.extra != Extra::kNone) return false;
      storage.extra = Extra::kMaster;
    }
    return complete;
  }

 private:
  // Keys are interned and never freed.
  static PyObject* key(const char* name) {
    return PyUnicode_InternFromString(name);
  }

  PyObject *const state_dtype_ = key("state_dtype"), *const min_int8_size_ = key("min_int8_size");
  PyObject *const param_rounding_ = key("param_rounding"), *const master_weights_ = key("master_weights");
  PyObject *const int8_format_ = key("int8_format"), *const differentiable_ = key("differentiable");
  PyObject* const capturable_ = key("capturable");
  PyObject* const rounding_seed_ = key(kCommonOptions[kSeed - kMaxOptions].key);
};

}  // namespace genopt
