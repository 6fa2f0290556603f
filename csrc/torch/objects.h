// The Python objects and tensors behind the plan's rows, borrowed for one step.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <bit>
#include <stdexcept>
#include <vector>

#include "../plan/row.h"
#include "spread.h"

namespace genopt {

// The tensors of one row: its operands, its step counter, its running numbers, and the scales of its states. Null:
// none.
constexpr int kStepHandle = kOperands, kFirstRunning = kStepHandle + 1, kFirstScales = kFirstRunning + kMaxRunning,
              kHandles = kFirstScales + kMaxStates;

// Whether a handle's tensor is one number.
constexpr bool is_number(int handle) {
  return handle >= kStepHandle && handle < kFirstScales;
}
using Handles = std::array<const at::Tensor*, kHandles>;

// Columns, by row. Of what is spread over processes, handles are the local tensors.
struct Objects {
  std::vector<PyObject*> params;
  std::vector<PyObject*> states;                        // a parameter's state dict, or null
  std::vector<Handles> handles;                         // of active rows
  std::vector<std::array<PyObject*, kHandles>> wholes;  // where a handle is local: the object that it is of; else null
  std::vector<unsigned> present;                        // which handles are not null, as a mask
  std::vector<char> has_grad;                           // of rows that take part
  PyObject* grads = nullptr;  // a list with a gradient for each row, or None; without it: the parameters' .grad

  size_t rows() const {
    return params.size();
  }

  // Makes room for as many rows as there are parameters.
  void resize() {
    handles.resize(rows());
    wholes.resize(rows());
    present.resize(rows());
    has_grad.resize(rows());
  }

  void set_grads(PyObject* list) {
    grads = list;
    if (list && (!PyList_Check(list) || PyList_GET_SIZE(list) != static_cast<Py_ssize_t>(rows())))
      throw std::invalid_argument("grads must be a list with one entry for each parameter");
  }

  // The row's parameter.
  const at::Tensor& param(size_t r) const {
    return local_of(params[r]);
  }

  // Notes which handles of a row there are.
  void note_present(size_t r) {
    present[r] = 0;
    for (int k = 0; k < kHandles; ++k) present[r] |= (handles[r][k] != nullptr) << k;
  }

  // Visits the row's handles that there are, in order: visit(k, tensor), the tensors as `given` has them.
  template <class Visit>
  void for_each_present(size_t r, const Handles& given, Visit visit) const {
    for (unsigned rest = present[r]; rest; rest &= rest - 1) {
      const int k = std::countr_zero(rest);
      visit(k, *given[k]);
    }
  }

  // Visits a row's parameter and the tensors of its state.
  template <class Visit>
  void for_each_own(size_t r, Visit visit) const {
    visit(param(r));
    PyObject *entries = states[r], *key, *value;
    if (!entries || !PyDict_Check(entries)) return;
    for (Py_ssize_t position = 0; PyDict_Next(entries, &position, &key, &value);)
      if (THPVariable_Check(value)) visit(local_of(value));
  }

  // False: what a row was given as its gradient can not be one.
  bool gives_tensor_or_none(size_t r) const {
    PyObject* const given = grads ? PyList_GET_ITEM(grads, r) : Py_None;
    return given == Py_None || THPVariable_Check(given);
  }

  // What a row takes as its gradient, or null.
  const at::Tensor* whole_grad(size_t r) const {
    if (grads) {
      PyObject* const given = PyList_GET_ITEM(grads, r);
      return given == Py_None ? nullptr : &THPVariable_Unpack(given);
    }
    const at::Tensor& grad = THPVariable_Unpack(params[r]).unsafeGetTensorImpl()->grad();
    return grad.defined() ? &grad : nullptr;
  }
  // The object of that, where the row's parameter is spread.
  PyObject* grad_object(size_t r) const {
    return grads ? PyList_GET_ITEM(grads, r) : object_of(*whole_grad(r));
  }
  const at::Tensor* grad(size_t r) const {
    const at::Tensor* const whole = whole_grad(r);
    if (!whole || !is_spread(params[r])) return whole;
    PyObject* const object = grad_object(r);
    return object ? &local_of(object) : whole;
  }
};

}  // namespace genopt
