// What rows were when they were last read, so that the next step compares instead of reading them again. Nothing is
// followed that may be gone: objects are reached anew, from the list of parameters and the state dicts, and all that
// was concluded from is compared. A row of which anything differs is read again, that row alone.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <bit>
#include <vector>

#include "dict_witness.h"
#include "objects.h"
#include "tensor_witness.h"

namespace genopt {

class Witnesses {
 public:
  void resize(size_t rows) {
    rows_.resize(rows);
    if (!parts_.empty()) parts_.resize(rows);
  }

  // Row `r` has been read, with a gradient. `version`: as Groups::version() of its group.
  void take(size_t r, const Row& row, int64_t version, const Objects& objects) {
    RowWitness& now = rows_[r];
    const Handles& handles = objects.handles[r];
    drop(r);
    // An object of another type may be freed with its type, and leave its address to anything. Where operands lie in
    // several orders, there is more to compare.
    if (row.layout || row.numel == 0 || !(row.is_part || THPVariable_CheckExact(objects.params[r]))) return;
    now.param = objects.params[r];
    now.type = Py_TYPE(now.param);
    now.entries.take(objects.states[r]);
    now.version = version;
    now.is_part = row.is_part;
    if (row.is_part) {
      parts_.resize(rows_.size());
      parts_[r].take(objects.wholes[r]);
    }
    now.numel = handles[kParam]->numel();
    now.keys = handles[kParam]->key_set();
    now.tiles = tiles_of(row.numel, row.tile);
    now.factors = row.factors;
    now.contiguous = true;
    now.count = 0;
    objects.for_each_present(r, handles, [&](int k, const at::Tensor& t) {
      now.dtypes[k] = t.dtype();
      if (k < kOperands) now.contiguous = now.contiguous && t.is_contiguous();
      if (k != kGrad) now.places[now.count++] = TensorWitness(t);
    });
    if (!holds(r, version, objects)) drop(r);
  }

  void drop(size_t r) {
    rows_[r].param = nullptr;
  }
  void drop_all() {
    for (RowWitness& row : rows_) row.param = nullptr;
  }

  // Whether row `r`, but for its gradient, is what it was, so that what was read of it holds, handles included. Only
  // follows pointers, and so may be called by any thread while one has the GIL.
  bool holds(size_t r, int64_t version, const Objects& objects) const {
    const RowWitness& was = rows_[r];
    PyObject* const object = objects.params[r];
    if (object != was.param || Py_TYPE(object) != was.type || version != was.version ||
        !was.entries.holds(objects.states[r]) || (was.is_part && !parts_[r].holds(objects.wholes[r])))
      return false;
    const TensorWitness* place = was.places.data();
    const at::Tensor& param = *place->handle;
    if (!was.is_at(*place, kParam) || param.numel() != was.numel) return false;
    if (was.contiguous ? !param.is_contiguous() : !param.is_non_overlapping_and_dense()) return false;
    const at::IntArrayRef sizes = param.sizes();
    for (unsigned rest = objects.present[r] & ~(1u << kParam | 1u << kGrad); rest; rest &= rest - 1) {
      const int k = std::countr_zero(rest);
      if (!was.is_at(*++place, k)) return false;
      const at::Tensor& t = *place->handle;
      const bool lies = was.is_factor(k) ? was.lies_as_factor(k, t, sizes)
                        : k < kOperands  ? was.lies_as(t, param, sizes)
                        : is_number(k)   ? t.numel() == 1
                                         : was.are_scales(t, sizes);
      if (!lies) return false;
    }
    return true;
  }

  // Of a row that holds: whether `grad` may stand where its last gradient did, at whatever address.
  bool takes(size_t r, const at::Tensor& grad, const at::Tensor& param) const {
    const RowWitness& was = rows_[r];
    return was.is_kept_as(kGrad, grad) && was.lies_as(grad, param, param.sizes()) && grad.device() == param.device() &&
           !is_lazy_copy(*storage_of(grad));
  }

  // Of a row that holds and is a part: whether `grad`, the whole, is cut as its last one was.
  bool takes_part(size_t r, PyObject* grad) const {
    return parts_[r].is_cut_alike(grad);
  }

  // Of a row that was taken or holds in this step: bumps the versions of all its tensors but its gradient. False: there
  // is no such witness.
  bool bump_versions(size_t r) const {
    const RowWitness& was = rows_[r];
    if (!was.param) return false;
    for (int i = 0; i < was.count; ++i) was.places[i].bump();
    return true;
  }

  // Prefetches what holds() of the next row will read, and takes() of this one. What a witness names may be gone: it is
  // prefetched, not followed.
  void prefetch(size_t r, const Objects& objects) const {
    if (r + 1 < rows_.size()) {
      PyObject* const entries = objects.states[r + 1];
      prefetch_bytes(entries, sizeof(PyDictObject));
      if (!DictWitness::kHasVersions && entries && PyDict_Check(entries))
        prefetch_bytes(reinterpret_cast<PyDictObject*>(entries)->ma_keys, 192);
      const RowWitness& next = rows_[r + 1];
      for (int i = 0; i < next.count; ++i) next.places[i].prefetch();
      if (next.is_part) Parts::prefetch(objects.wholes[r + 1]);
    }
    // The gradient is another tensor at every step: only the parameter leads to it.
    if (objects.grads || !THPVariable_CheckExact(objects.params[r])) return;
    const at::Tensor& grad = THPVariable_Unpack(objects.params[r]).unsafeGetTensorImpl()->grad();
    if (!grad.defined()) return;
    prefetch_bytes(grad.unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
    prefetch_bytes(storage_of(grad), 64);
  }

  // Prefetches what bump_versions() of the next row will write.
  void prefetch_versions(size_t r) const {
    if (r + 1 >= rows_.size()) return;
    const RowWitness& next = rows_[r + 1];
    if (next.is_part) return parts_[r + 1].prefetch_versions();
    for (int i = 0; i < next.count; ++i) __builtin_prefetch(next.places[i].counter, 1);
  }

 private:
  struct RowWitness {
    PyObject* param = nullptr;  // null: there is none
    PyTypeObject* type = nullptr;
    DictWitness entries;
    bool is_part = false;
    int64_t version = 0, numel = 0;
    c10::DispatchKeySet keys;                       // of all tensors
    std::array<caffe2::TypeMeta, kHandles> dtypes;  // by handle
    bool contiguous = false;                        // all operands are; else they have the parameter's strides
    int64_t tiles = 0;                              // of the row
    int factors = 0;                                // as Row::factors
    int count = 0;                                  // of places
    std::array<TensorWitness, kHandles> places;     // of the handles that there are, in order, but for the gradient

    // How a tensor's bytes are to be taken. Other kinds may have no storage to look at.
    GENOPT_INLINE bool is_kept_as(int handle, const at::Tensor& t) const {
      return t.key_set() == keys && t.dtype() == dtypes[handle];
    }
    GENOPT_INLINE bool is_at(const TensorWitness& place, int handle) const {
      return is_kept_as(handle, *place.handle) && place.holds();
    }

    // `sizes`: the parameter's.
    GENOPT_INLINE bool lies_as(const at::Tensor& t, const at::Tensor& param, at::IntArrayRef sizes) const {
      return equal(t.sizes(), sizes) && (contiguous ? t.is_contiguous() : equal(t.strides(), param.strides()));
    }
    GENOPT_INLINE bool are_scales(const at::Tensor& t, at::IntArrayRef sizes) const {
      return t.numel() == tiles && t.is_contiguous() && (t.dim() == 1 || (t.dim() == 2 && t.sizes()[0] == sizes[0]));
    }
    GENOPT_INLINE bool is_factor(int handle) const {
      return factors != 0 && (handle == factors || handle == factors + 1);
    }
    bool lies_as_factor(int handle, const at::Tensor& t, at::IntArrayRef sizes) const {
      const size_t dims = sizes.size(), one = dims - (handle == factors ? 1 : 2);
      if (dims < 2 || t.sizes().size() != dims || !t.is_contiguous()) return false;
      for (size_t d = 0; d < dims; ++d)
        if (t.sizes()[d] != (d == one ? 1 : sizes[d])) return false;
      return true;
    }
  };

  // Where the local tensors of what is spread were, and how they were cut.
  class Parts {
   public:
    void take(const std::array<PyObject*, kHandles>& wholes) {
      locals_.fill(nullptr);
      count_ = 0;
      for (int k = 0; k < kHandles; ++k) {
        if (!wholes[k] || k == kGrad) continue;
        locals_[k] = local_object(wholes[k]);
        const c10::TensorImpl* const impl = THPVariable_Unpack(wholes[k]).unsafeGetTensorImpl();
        bumped_[count_++] = {impl, TensorWitness::counter_of(*impl)};
      }
      spec_ = spec_of(wholes[kParam]);
      // A gradient's may be gone by the next step, and another in its place, were it not held.
      grad_spec_ = Reference(wholes[kGrad] ? spec_of(wholes[kGrad]) : nullptr);
    }
    // Once it is known that `wholes` are still there.
    bool holds(const std::array<PyObject*, kHandles>& wholes) const {
      for (int k = 0; k < kHandles; ++k)
        if (wholes[k] && k != kGrad && local_object(wholes[k]) != locals_[k]) return false;
      return spec_of(wholes[kParam]) == spec_;
    }
    bool is_cut_alike(PyObject* grad) const {
      PyObject* const spec = spec_of(grad);
      return spec == spec_ || spec == grad_spec_.object();
    }

    // What holds() of the next row will read, and what bumping its versions will; followed is nothing.
    static void prefetch(const std::array<PyObject*, kHandles>& wholes) {
      for (PyObject* const whole : wholes)
        if (whole) prefetch_bytes(whole, static_cast<int>(spread_type.spec) + 8);
    }
    void prefetch_versions() const {
      for (int i = 0; i < count_; ++i) {
        __builtin_prefetch(bumped_[i].impl);
        __builtin_prefetch(bumped_[i].counter, 1);
      }
    }

   private:
    struct Bumped {
      const c10::TensorImpl* impl;
      void* counter;
    };
    std::array<Bumped, kHandles> bumped_;  // of the wholes
    int count_ = 0;
    std::array<PyObject*, kHandles> locals_{};
    PyObject* spec_ = nullptr;
    Reference grad_spec_;
  };

  // Without a call, for a few dimensions.
  static GENOPT_INLINE bool equal(at::IntArrayRef a, at::IntArrayRef b) {
    if (a.size() != b.size()) return false;
    for (size_t d = 0; d < a.size(); ++d)
      if (a[d] != b[d]) return false;
    return true;
  }

  std::vector<RowWitness> rows_;
  std::vector<Parts> parts_;  // of rows that are parts; empty: there is none
};

}  // namespace genopt
