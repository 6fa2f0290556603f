// Why a step was not taken.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace genopt {

// A Python call failed; the interpreter holds the error.
struct PythonError {};

// Why the kernels can not take a tensor as it is.
enum class Reason : uint8_t {
  kNone,
  kMissing,  // state that is to be made, or made anew as the group's options ask for it
  kNotATensor,
  kWatched,         // something sees every torch operation, and would not see a kernel
  kDifferentiable,  // the group's steps are torch's own
  kNoKernel,        // its device, layout, dtype or subclass
  kInference,       // an inference tensor that would be written
  kShape,
  kDtype,
  kDevice,
  kCount,    // a step counter that can not be one
  kStorage,  // kept in another form than the group asks for
  kUnaligned,
  kReasons
};

// The names that Python has for them.
constexpr const char* kReasonNames[] = {"none",      "missing",   "not a tensor", "watched", "differentiable",
                                        "no kernel", "inference", "shape",        "dtype",   "device",
                                        "count",     "storage",   "unaligned"};
static_assert(sizeof kReasonNames / sizeof *kReasonNames == static_cast<int>(Reason::kReasons));

// What is wrong with a row, if anything is: the first operand that the kernels can not take.
struct Problem {
  int handle = 0;  // of Handles
  Reason reason = Reason::kNone;

  explicit operator bool() const {
    return reason != Reason::kNone;
  }
};

// Rows are numbered across all groups.
struct Refusal {
  std::vector<int64_t> rows;                               // unsupported
  std::vector<Problem> problems;                           // of each of them
  std::vector<int64_t> groups;                             // with an option that is no finite number
  std::vector<std::pair<int64_t, int64_t>> overlaps;       // of what belongs to one row with what belongs to another
  std::vector<std::pair<int64_t, int64_t>> grad_overlaps;  // of a row's gradient with what belongs to a row
  std::vector<int> devices;        // of active rows, where a norm has to meet on one, or a tensor is missing on one
  bool gradients_overlap = false;  // and are to be written, which another row's step would then see

  bool is_empty() const {
    return rows.empty() && groups.empty() && overlaps.empty() && grad_overlaps.empty() && devices.empty() &&
           !gradients_overlap;
  }
};

}  // namespace genopt
