// Finds each parameter's state dict in an optimizer's state.
#pragma once

#include <unordered_map>

#include "objects.h"
#include "refusal.h"
#include "witness.h"

namespace genopt {

// Hashing a tensor calls Python, so the order in which `state` held its keys last time is tried first: reading it
// through costs nanoseconds a tensor.
class StateDicts {
 public:
  // Fills objects.states as far as it can be done without hashing.
  void find_all(PyObject* state, Objects& objects) {
    if (!PyDict_Check(state)) throw std::invalid_argument("an optimizer's state must be a dict");
    state_ = state;
    if (found_.holds(state) && objects.params == params_) return;
    found_.take(nullptr);
    if (static_cast<size_t>(PyDict_Size(state)) != order_.size() || !match(objects)) {
      std::unordered_map<PyObject*, int64_t> row_of;
      for (size_t r = 0; r < objects.rows(); ++r) row_of.emplace(objects.params[r], static_cast<int64_t>(r));
      order_.clear();
      PyObject *key, *value;
      for (Py_ssize_t position = 0; PyDict_Next(state, &position, &key, &value);) {
        const auto found = row_of.find(key);
        order_.push_back(found == row_of.end() ? -1 : found->second);
      }
      match(objects);
    }
    params_ = objects.params;
    found_.take(state);
  }

  // A row's state, which may be no dict, or null.
  PyObject* find(size_t r, Objects& objects) {
    PyObject*& entries = objects.states[r];
    if (!entries && PyDict_GET_SIZE(state_)) {
      entries = PyDict_GetItemWithError(state_, objects.params[r]);
      if (!entries && PyErr_Occurred()) throw PythonError();
      if (entries) order_.clear();  // learn the order anew at the next step
    }
    return entries;
  }

 private:
  // False: the order has changed.
  bool match(Objects& objects) const {
    objects.states.assign(objects.rows(), nullptr);
    PyObject *key, *value;
    size_t i = 0;
    for (Py_ssize_t position = 0; PyDict_Next(state_, &position, &key, &value); ++i) {
      const int64_t row = order_[i];
      if (row < 0) continue;
      if (row >= static_cast<int64_t>(objects.rows()) || objects.params[row] != key) return false;
      objects.states[row] = value;
    }
    return true;
  }

  PyObject* state_ = nullptr;   // of the step that is read now
  std::vector<int64_t> order_;  // the row of each key of `state`, in its order; -1: of none
  // What objects.states was found from.
  std::vector<PyObject*> params_;
  DictWitness found_;
};

}  // namespace genopt
