// The last elements of a tile, less than a vector of them, in memory where a vector of them can be stepped.
#pragma once

#include <cstring>

#include "../plan/row.h"
#include "vectors.h"

namespace genopt::GENOPT_CAPABILITY {

class Tail {
 public:
  // The elements [from, from + count) of `tile`, as those of the tile that is returned. Called once for each operand.
  template <class Stored>
  GENOPT_INLINE Stored* load(Stored* tile, int64_t from, int64_t count, bool is_written) {
    Copy& copy = copies_[size_++];
    copy.is_written = is_written;
    copy.elements = tile + from;
    copy.bytes = count * sizeof(Stored);
    std::memset(copy.bytes_at, 0, sizeof copy.bytes_at);
    std::memcpy(copy.bytes_at, copy.elements, copy.bytes);
    return reinterpret_cast<Stored*>(copy.bytes_at) - from;
  }
  void store() const {
    for (int i = 0; i < size_; ++i)
      if (copies_[i].is_written) std::memcpy(copies_[i].elements, copies_[i].bytes_at, copies_[i].bytes);
  }

 private:
  struct Copy {
    alignas(64) char bytes_at[kWidth * sizeof(float)];
    void* elements;
    int64_t bytes;
    bool is_written;
  };
  Copy copies_[kOperands];
  int size_ = 0;
};

}  // namespace genopt::GENOPT_CAPABILITY
