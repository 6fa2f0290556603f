// An optimizer's param_groups, read into the plan: options, how states are kept, and on which devices rows are.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "options.h"
#include "refusal.h"
#include "storage.h"

namespace genopt {

constexpr int kNoDevice = -2, kSeveralDevices = -3;  // beside the numbers of devices

class Groups {
 public:
  explicit Groups(const RuleInfo& rule) : option_reader_(rule) {
  }

  // Reads every group's options into `plan`, and makes it a row for each parameter. `watched`: as is_watched().
  void read(PyObject* param_groups, bool watched, Plan& plan, std::vector<PyObject*>& params, Refusal& refusal) {
    params.clear();
    const Py_ssize_t count = PyList_Size(param_groups);
    if (count < 0) throw PythonError();
    plan.groups.assign(count, kNoOptions);
    sources_.assign(count, Sources{});
    options_on_devices_.clear();
    devices_.clear();
    group_devices_.assign(count, kNoDevice);
    kept_.resize(count);
    needs_totals_.assign(count, false);
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* group = PyList_GET_ITEM(param_groups, i);
      static PyObject* const params_key = PyUnicode_InternFromString("params");
      PyObject* list = PyDict_Check(group) ? PyDict_GetItemWithError(group, params_key) : nullptr;
      if (!list || !PyList_Check(list)) throw std::invalid_argument("a param group has no list of 'params'");
      Options& options = plan.groups[i];
      Storage storage;
      if (!option_reader_.read(group, static_cast<int>(i), watched, options, options_on_devices_) ||
          !storage_reader_.read(group, storage))
        refusal.groups.push_back(i);
      const unsigned used = plan.rule.used_states(options) | (options[kEmaDecay] >= 0 ? kWithAverage : 0);
      if (!kept_[i].version || kept_[i].storage != storage || kept_[i].used != used)
        kept_[i] = {storage, used, ++versions_};
      if (clips_alone(options.data())) plan.control.measure = true;
      needs_totals_[i] = plan.rule.needs_totals(options);
      const size_t first = params.size(), last = first + PyList_GET_SIZE(list);
      params.resize(last);
      if (plan.rows.size() < last) plan.rows.resize(last);
      for (size_t r = first; r < last; ++r) {
        params[r] = PyList_GET_ITEM(list, r - first);
        plan.rows[r].group = static_cast<int>(i);
      }
    }
    plan.rows.resize(params.size());
  }

  // The operands that a group's rows use: its states, and the average.
  unsigned used(int group) const {
    return kept_[group].used;
  }
  // Whether the rule needs totals of its rows.
  bool needs_totals(int group) const {
    return needs_totals_[group];
  }
  const Storage& storage(int group) const {
    return kept_[group].storage;
  }
  // Another number, which no group has had, where either has changed.
  int64_t version(int group) const {
    return kept_[group].version;
  }
  const std::vector<Sources>& sources() const {
    return sources_;
  }
  // With active rows.
  const std::vector<int>& devices() const {
    return devices_;
  }

  // Of an active row.
  void note_device(const Row& row) {
    int& of_group = group_devices_[row.group];
    of_group = of_group == kNoDevice || of_group == row.device ? row.device : kSeveralDevices;
    if (std::find(devices_.begin(), devices_.end(), row.device) == devices_.end()) devices_.push_back(row.device);
  }

  // All below once the devices of all rows are noted.

  // Options of a group without a row to step do no harm, whatever they are.
  void forget_idle(const std::vector<Row>& rows, Refusal& refusal) const {
    std::erase_if(refusal.groups, [&](int64_t group) {
      const auto is_in_group = [&](const Unsupported& each) { return rows[each.row].group == group; };
      return group_devices_[group] == kNoDevice && std::none_of(refusal.rows.begin(), refusal.rows.end(), is_in_group);
    });
  }

  // A tensor option on the device of all its group's rows is read there, by the kernels; else its value is
  // fetched, which waits for the device.
  void read_options_on_devices(Plan& plan, Refusal& refusal) {
    for (const auto& [group, option, tensor] : options_on_devices_) {
      if (group_devices_[group] == kNoDevice) continue;
      if (group_devices_[group] == option_device(*tensor)) {
        sources_[group][option] = {tensor->const_data_ptr(), *plain_dtype(tensor->scalar_type())};
        continue;
      }
      const double value = plan.groups[group][option] = tensor->item().toDouble();
      if (!std::isfinite(value)) refusal.groups.push_back(group);
    }
  }

 private:
  struct Kept {
    Storage storage;
    unsigned used = 0;
    int64_t version = 0;
  };

  OptionReader option_reader_;
  StorageReader storage_reader_;
  int64_t versions_ = 0;
  // By group.
  std::vector<Kept> kept_;
  std::vector<Sources> sources_;
  std::vector<int> group_devices_;  // of its active rows
  std::vector<char> needs_totals_;

  std::vector<OptionOnDevice> options_on_devices_;
  std::vector<int> devices_;
};

}  // namespace genopt
