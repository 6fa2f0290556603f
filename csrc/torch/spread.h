// DTensors: tensors that are spread over processes, of which this one has a local tensor. A step takes that: an element
// is stepped where it is.
#pragma once

#include <ATen/core/Tensor.h>
#include <structmember.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <span>
#include <utility>

#include "refusal.h"

namespace genopt {

// torch's class, where it keeps the local tensor and how that is one of a whole. No type: none was imported, or it
// keeps them elsewhere, and no tensor is known to be one.
struct SpreadType {
  PyTypeObject* type = nullptr;
  Py_ssize_t local = 0, spec = 0;  // in bytes, of slots

  // Looks for it, with the GIL; before the first step that meets one.
  void find() {
    if (type) return;
    PyObject* const module = PyDict_GetItemString(PyImport_GetModuleDict(), "torch.distributed.tensor");
    if (!module) return;
    PyObject* const found = PyObject_GetAttrString(module, "DTensor");
    if (found && PyType_Check(found)) {
      auto* const made = reinterpret_cast<PyTypeObject*>(found);
      if (find_slot(made, "_local_tensor", local) && find_slot(made, "_spec", spec)) {
        type = made;  // kept for good
        return;
      }
    }
    PyErr_Clear();  // in the middle of its import
    Py_XDECREF(found);
  }

 private:
  static bool find_slot(PyTypeObject* type, const char* name, Py_ssize_t& offset) {
    PyObject* const slot = PyDict_GetItemString(type->tp_dict, name);
    if (!slot || Py_TYPE(slot) != &PyMemberDescr_Type) return false;
    offset = reinterpret_cast<PyMemberDescrObject*>(slot)->d_member->offset;
    return true;
  }
};
inline SpreadType spread_type;

inline bool is_spread(PyObject* object) {
  return object && Py_TYPE(object) == spread_type.type;
}

// All below of an object that is spread. Borrowed; null: it has none.
inline PyObject* slot_of(PyObject* object, Py_ssize_t offset) {
  return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset);
}
inline PyObject* local_object(PyObject* object) {
  return slot_of(object, spread_type.local);
}
inline PyObject* spec_of(PyObject* object) {
  return slot_of(object, spread_type.spec);
}

// The local tensor of one that is spread, if it is a plain one; else the tensor itself.
inline const at::Tensor& local_of(PyObject* object) {
  if (is_spread(object)) {
    PyObject* const local = local_object(object);
    if (local && THPVariable_CheckExact(local)) return THPVariable_Unpack(local);
  }
  return THPVariable_Unpack(object);
}

// The Python object of a tensor, or null.
inline PyObject* object_of(const at::Tensor& t) {
  const auto of_slot = []<class Slot>(const Slot& slot) -> PyObject* {
    if constexpr (requires { slot.load_pyobj(); }) {
      return slot.load_pyobj();
    } else {
      return slot._unchecked_untagged_pyobj();
    }
  };
  return of_slot(*t.unsafeGetTensorImpl()->pyobj_slot());
}

// Owns what it refers to. With the GIL.
class Reference {
 public:
  explicit Reference(PyObject* object = nullptr) : object_(object) {
    Py_XINCREF(object_);
  }
  // Of one that is its own already.
  enum Taken { kTaken };
  Reference(PyObject* object, Taken) : object_(object) {
  }
  Reference(Reference&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {
  }
  Reference& operator=(Reference&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Reference() {
    if (object_ && Py_IsInitialized()) Py_DECREF(object_);
  }

  PyObject* object() const {
    return object_;
  }

 private:
  PyObject* object_;
};

// Whether two are parts of wholes in the same way: over the same processes, cut alike. With the GIL.
inline bool are_spread_alike(PyObject* a, PyObject* b, bool shapes_too = true) {
  PyObject *const of_a = spec_of(a), *const of_b = spec_of(b);
  if (of_a == of_b) return true;
  if (!of_a || !of_b) return false;
  constexpr const char* kNames[] = {"mesh", "placements", "shape"};
  for (const char* const name : std::span(kNames, shapes_too ? 3 : 2)) {
    PyObject *const x = PyObject_GetAttrString(of_a, name), *const y = PyObject_GetAttrString(of_b, name);
    const int same = x && y ? PyObject_RichCompareBool(x, y, Py_EQ) : -1;
    Py_XDECREF(x);
    Py_XDECREF(y);
    if (same < 0) throw PythonError();
    if (!same) return false;
  }
  return true;
}

// What a function of genopt_ext/sharding.py says of an object. With the GIL.
class AskSharding {
 public:
  explicit AskSharding(const char* function) {
    PyObject* const module = PyImport_ImportModule("genopt_ext.sharding");
    if (!module) throw PythonError();
    function_ = PyObject_GetAttrString(module, function);
    Py_DECREF(module);
    if (!function_) throw PythonError();
  }
  template <class... Given>
  Reference operator()(const char* format, Given... given) const {
    PyObject* const said = PyObject_CallFunction(function_, format, given...);
    if (!said) throw PythonError();
    return Reference(said, Reference::kTaken);
  }

 private:
  PyObject* function_;  // kept for good
};

// Where local elements are among all, if they lie there in runs at equal distances: see genopt_ext/sharding.py.
struct Runs {
  long long origin, run, gap;
};
inline std::optional<Runs> runs_of(PyObject* object) {
  static const AskSharding ask("runs");
  const Reference given = ask("O", object);
  Runs runs{};
  if (given.object() == Py_None) return std::nullopt;
  if (!PyArg_ParseTuple(given.object(), "LLL", &runs.origin, &runs.run, &runs.gap)) throw PythonError();
  return runs;
}

// Whether cuts divide no block of so many elements.
inline bool keeps_blocks(PyObject* object, int block) {
  static const AskSharding ask("keeps_blocks");
  return ask("Oi", object, block).object() == Py_True;
}

}  // namespace genopt
