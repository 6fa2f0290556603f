// A parameter group's options, as numbers.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <vector>

#include "tensors.h"

namespace genopt {

struct OptionOnDevice {
  int group, option;
  const at::Tensor* tensor;
};

// Reads those of a rule, and the common ones after them.
class OptionReader {
 public:
  explicit OptionReader(const RuleInfo& rule) : rule_(rule) {
    for (const OptionName& option : rule.options) option_keys_.push_back(PyUnicode_InternFromString(option.key));
    for (const OptionName& option : kCommonOptions) common_keys_.push_back(PyUnicode_InternFromString(option.key));
  }

  // False: an option is no number, or not one that it may be. What stands on a device is left to `on_devices`.
  bool read(PyObject* group, int index, bool watched, Options& options, std::vector<OptionOnDevice>& on_devices) const {
    for (size_t i = 0; i < option_keys_.size(); ++i) {
      PyObject* value = PyDict_GetItemWithError(group, option_keys_[i]);
      const int item = rule_.options[i].item;
      if (value && item >= 0)
        value = PyTuple_Check(value) && item < PyTuple_GET_SIZE(value) ? PyTuple_GET_ITEM(value, item)
                : PyList_Check(value) && item < PyList_GET_SIZE(value) ? PyList_GET_ITEM(value, item)
                                                                       : nullptr;
      if (rule_.options[i].is_optional && (!value || value == Py_None)) {
        options[i] = kUnset;
        continue;
      }
      if (!value) return false;
      if (PyUnicode_Check(value)) {
        options[i] = 0;
        for (int k = 0; const char* const word : rule_.options[i].words)
          if (++k; word && PyUnicode_CompareWithASCIIString(value, word) == 0) options[i] = k;
        if (options[i] == 0) return false;
        continue;
      }
      if (PyFloat_CheckExact(value)) {
        options[i] = PyFloat_AS_DOUBLE(value);
      } else if (THPVariable_Check(value)) {
        const at::Tensor& tensor = THPVariable_Unpack(value);
        if (tensor.numel() != 1 || tensor.is_complex()) return false;
        if (watched) continue;  // no row is stepped
        const bool structural = rule_.structural >> i & 1;
        if (!structural && is_plain(tensor) && option_device(tensor) != kHost) {
          on_devices.push_back({index, static_cast<int>(i), &tensor});
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
      if (!std::isfinite(options[i]) && !(rule_.options[i].may_be_infinite && options[i] > 0)) return false;
    }
    for (int k = kMaxOptions; k < kAllOptions; ++k) {
      PyObject* value = PyDict_GetItemWithError(group, common_keys_[k - kMaxOptions]);
      if (!value || value == Py_None) continue;
      options[k] = PyUnicode_Check(value) ? kUnset : PyFloat_AsDouble(value);
      PyErr_Clear();
      if (!(options[k] >= 0) || (k == kEmaDecay && options[k] >= 1) || (k == kSeed && options[k] > 0xffffffff))
        return false;
    }
    return (options[kMaxGradNorm] >= 0) + (options[kClipPerParam] >= 0) + (options[kAgc] >= 0) <= 1 &&
           rule_.allows(options);
  }

 private:
  const RuleInfo& rule_;
  // Keys are interned and never freed.
  std::vector<PyObject*> option_keys_, common_keys_;
};

}  // namespace genopt
