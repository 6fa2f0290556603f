// What rows were when they were last read, so that the next step compares instead of reading them again. Nothing is
// followed that may be gone: objects are reached anew, from the list of parameters and the state dicts, and all that
// was concluded from is compared. A row of which anything differs is read again, that row alone.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <bit>
#include <vector>

#include "objects.h"
#include "tensors.h"

namespace genopt {

// A dict's content at one time: its version, or its entries where this Python tells no version.
class DictWitness {
 public:
#ifdef GENOPT_NO_DICT_VERSIONS
  static constexpr bool kHasVersions = false;
#else
  static constexpr bool kHasVersions = PY_VERSION_HEX < 0x030c0000;
#endif

  // dict: or null.
  void take(PyObject* dict) {
    dict_ = dict;
    if constexpr (kHasVersions) {
      version_ = dict ? version_of(dict) : 0;
    } else {
      entries_.clear();
      each_entry(dict, [this](const Entry& entry) {
        entries_.push_back(entry);
        return true;
      });
    }
  }

  // Whether `dict` is the same, and holds the same objects.
  bool holds(PyObject* dict) const {
    if (dict != dict_ || !dict) return dict == dict_;
    if constexpr (kHasVersions) return version_of(dict) == version_;
    if (PyDict_GET_SIZE(dict) != static_cast<Py_ssize_t>(entries_.size())) return false;
    auto expected = entries_.begin();
    return each_entry(dict, [&](const Entry& entry) { return entry == *expected++; });
  }

 private:
  // The type too: what was freed may have left its address to an object of another.
  struct Entry {
    PyObject *key, *value;
    PyTypeObject* type;
    bool operator==(const Entry&) const = default;
  };

  static uint64_t version_of(PyObject* dict) {
    if constexpr (kHasVersions) return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
    return 0;
  }

  // False: visit() was false of an entry.
  template <class Visit>
  static bool each_entry(PyObject* dict, Visit visit) {
    PyObject *key, *value;
    for (Py_ssize_t position = 0; dict && PyDict_Next(dict, &position, &key, &value);)
      if (!visit(Entry{key, value, Py_TYPE(value)})) return false;
    return true;
  }

  PyObject* dict_ = nullptr;
  uint64_t version_ = 0;
  std::vector<Entry> entries_;
};

// Where a tensor's memory is and how its bytes are to be taken, but for its sizes and strides.
class TensorWitness {
 public:
  void take(const at::Tensor& t) {
    const c10::StorageImpl& storage = storage_of(t);
    keys_ = t.key_set();
    dtype_ = t.dtype();
    memory_ = storage.data_ptr().get();
    deleter_ = storage.data_ptr().get_deleter();
    bytes_ = storage.nbytes();
    offset_ = t.storage_offset();
  }

  GENOPT_INLINE bool holds(const at::Tensor& t) const {
    if (t.key_set() != keys_) return false;  // first: other kinds may have no storage to look at
    const c10::StorageImpl& storage = storage_of(t);
    return storage.data_ptr().get() == memory_ && t.dtype() == dtype_ && t.storage_offset() == offset_ &&
           storage.data_ptr().get_deleter() == deleter_ && storage.nbytes() == bytes_;
  }

 private:
  static const c10::StorageImpl& storage_of(const at::Tensor& t) {
    return *t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  }

  // Of its storage.
  const void* memory_ = nullptr;
  size_t bytes_ = 0;
  c10::DeleterFnPtr deleter_ = nullptr;  // another one where the storage is to be copied when it is written

  int64_t offset_ = 0;
  c10::DispatchKeySet keys_;
  caffe2::TypeMeta dtype_;
};

class Witnesses {
 public:
  void resize(size_t rows) {
    rows_.resize(rows);
  }

  // Row `r` has been read, with a gradient. `version`: as Groups::version() of its group.
  void take(size_t r, const Row& row, int64_t version, const Objects& objects) {
    RowWitness& now = rows_[r];
    const Handles& handles = objects.handles[r];
    drop(r);
    // An object of another type may be freed with its type, and leave its address to anything. Where operands lie in
    // several orders, there is more to compare.
    if (row.layout || !THPVariable_CheckExact(objects.params[r])) return;
    now.param = objects.params[r];
    now.type = Py_TYPE(now.param);
    now.version = version;
    now.numel = handles[kParam]->numel();
    now.entries.take(objects.states[r]);
    now.contiguous = true;
    size_t taken = 0;
    objects.for_each_present(r, handles, [&](int k, const at::Tensor& t) {
      if (k != kGrad) now.tensors[taken++].take(t);
      if (k < kOperands) now.contiguous = now.contiguous && t.is_contiguous();
    });
    now.grad_keys = handles[kGrad]->key_set();
    now.grad_dtype = handles[kGrad]->dtype();
  }

  void drop(size_t r) {
    rows_[r].param = nullptr;
  }
  void drop_all() {
    for (RowWitness& row : rows_) row.param = nullptr;
  }

  // Whether row `r`, but for its gradient, is what it was, so that what was read of it holds, handles included.
  bool holds(size_t r, int64_t version, const Objects& objects) const {
    const RowWitness& was = rows_[r];
    PyObject* const object = objects.params[r];
    if (object != was.param || Py_TYPE(object) != was.type || version != was.version ||
        !was.entries.holds(objects.states[r]))
      return false;
    const Handles& handles = objects.handles[r];
    const at::Tensor& param = *handles[kParam];
    const TensorWitness* expected = was.tensors.data();
    if (!expected->holds(param) || param.numel() != was.numel) return false;
    if (was.contiguous ? !param.is_contiguous() : !param.is_non_overlapping_and_dense()) return false;
    for (unsigned rest = objects.present[r] & ~(1u << kParam | 1u << kGrad); rest; rest &= rest - 1) {
      const int k = std::countr_zero(rest);
      const at::Tensor& t = *handles[k];
      if (!(++expected)->holds(t)) return false;
      const bool lies = k < kOperands      ? lies_as(was, t, param)
                        : k == kStepHandle ? t.numel() == 1
                                           : t.dim() == 1 && t.numel() == tiles_of(was.numel) && t.is_contiguous();
      if (!lies) return false;
    }
    return true;
  }

  // Of a row that holds: whether `grad` may stand where its last gradient did, at whatever address.
  bool takes(size_t r, const at::Tensor& grad, const at::Tensor& param) const {
    const RowWitness& was = rows_[r];
    return grad.key_set() == was.grad_keys && grad.dtype() == was.grad_dtype && lies_as(was, grad, param) &&
           grad.device() == param.device();
  }

 private:
  struct RowWitness {
    PyObject* param = nullptr;  // null: there is none
    PyTypeObject* type = nullptr;
    int64_t version = 0, numel = 0;
    DictWitness entries;
    bool contiguous = false;  // all operands are; else they have the parameter's strides
    c10::DispatchKeySet grad_keys;
    caffe2::TypeMeta grad_dtype;
    std::array<TensorWitness, kHandles> tensors;  // of the handles that there are, in order, but for the gradient
  };

  static GENOPT_INLINE bool lies_as(const RowWitness& was, const at::Tensor& t, const at::Tensor& param) {
    return equal(t.sizes(), param.sizes()) &&
           (was.contiguous ? t.is_contiguous() : equal(t.strides(), param.strides()));
  }
  // Without a call, for a few dimensions.
  static GENOPT_INLINE bool equal(at::IntArrayRef a, at::IntArrayRef b) {
    if (a.size() != b.size()) return false;
    for (size_t d = 0; d < a.size(); ++d)
      if (a[d] != b[d]) return false;
    return true;
  }

  std::vector<RowWitness> rows_;
};

}  // namespace genopt
