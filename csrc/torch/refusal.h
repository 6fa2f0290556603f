// Why a step was not taken.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace genopt {

// A Python call failed; the interpreter holds the error.
struct PythonError {};

// Rows are numbered across all groups.
struct Refusal {
  std::vector<int64_t> rows;                              // unsupported
  std::vector<int64_t> groups;                            // with an option that is no finite number
  std::vector<std::pair<int64_t, int64_t>> overlaps;      // of what belongs to one row with what belongs to another
  std::vector<std::pair<int64_t, int64_t>> grad_overlaps; // of a row's gradient with what belongs to a row
  std::vector<int> devices;        // of active rows, where a norm has to meet on one, or a tensor is missing on one
  bool gradients_overlap = false;  // and are to be written, which another row's step would then see

  bool is_empty() const {
    return rows.empty() && groups.empty() && overlaps.empty() && grad_overlaps.empty() && devices.empty() &&
           !gradients_overlap;
  }
};

}  // namespace genopt
