// Tensors that live on while other Python threads work, which may let go of them.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "objects.h"

namespace genopt {

class Held {
 public:
  void hold(const Objects& objects, const std::vector<Row>& rows) {
    handles_ = objects.handles;
    for (size_t r = 0; r < objects.rows(); ++r)
      if (rows[r].active) {
        for (const at::Tensor* t : handles_[r])
          if (t) tensors_.push_back(*t);
        for (PyObject* whole : objects.wholes[r])
          if (whole) wholes_.emplace_back(whole);
      }
    for (size_t r = 0, i = 0; r < objects.rows(); ++r)
      if (rows[r].active)
        for (const at::Tensor*& t : handles_[r])
          if (t) t = &tensors_[i++];
  }
  bool is_empty() const {
    return handles_.empty();
  }
  // Of an active row: as Objects::handles, of what is held.
  const Handles& handles(size_t r) const {
    return handles_[r];
  }

 private:
  std::vector<at::Tensor> tensors_;
  std::vector<Reference> wholes_;
  std::vector<Handles> handles_;
};

}  // namespace genopt
