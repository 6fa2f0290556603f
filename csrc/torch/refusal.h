// Why a step was not taken.
#pragma once

#include <torch/csrc/python_headers.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace genopt {

// A Python call failed; the interpreter holds the error.
struct PythonError {};

// What is wrong with an operand of a row. genopt_ext/optim/problems.py finds the same for the reference.
enum class Reason : uint8_t {
  // Can be mended before the step.
  kMissing,  // state that is to be made
  kStorage,  // kept in another form than the group asks for
  kAway,     // a step counter on another device
  // The kernels can not take the row; the reference or torch's own code may.
  kWatched,         // something sees every torch operation, and would not see a kernel
  kDifferentiable,  // the group's steps are torch's own
  kNoKernel,        // its device, layout, dtype or subclass
  kUnaligned,
  // Nobody can.
  kIncomplete,  // it lacks where other state of the row is there
  kNotADict,
  kNotATensor,
  kInference,  // an inference tensor that would be written
  kFreed,      // its storage was made smaller than it is
  kShape,
  kDtype,
  kDevice,
  kCount,       // a step counter that can not be one
  kCapturable,  // where there are no graphs
  kReasons
};
constexpr Reason kLastMendable = Reason::kAway;

// The names that Python has for them.
constexpr const char* kReasonNames[] = {"missing",   "storage",   "away",       "watched",    "differentiable",
                                        "no kernel", "unaligned", "incomplete", "not a dict", "not a tensor",
                                        "inference", "freed",     "shape",      "dtype",      "device",
                                        "count",     "capturable"};
static_assert(sizeof kReasonNames / sizeof *kReasonNames == static_cast<int>(Reason::kReasons));

struct Problem {
  PyObject* operand;  // "parameter", "gradient", "state" or a key of the state dict; interned, never freed
  Reason reason;

  bool operator==(const Problem&) const = default;
};

// A row that the kernels can not take as it is: all that can be mended, or the one thing that can not.
struct Unsupported {
  int64_t row;
  std::vector<Problem> problems;
};

// Rows are numbered across all groups.
struct Refusal {
  std::vector<Unsupported> rows;
  std::vector<int64_t> groups;                             // with an option that is wrong, or lacks what goes with it
  std::vector<std::pair<int64_t, int64_t>> overlaps;       // of what belongs to one row with what belongs to another
  std::vector<std::pair<int64_t, int64_t>> grad_overlaps;  // of a row's gradient with what belongs to a row
  std::vector<int> devices;        // of active rows, where a norm has to meet on one, or a tensor is missing on one
  bool of_processes = false;       // a norm is of what is spread, and row_sums were not given
  bool gradients_overlap = false;  // and are to be written, which another row's step would then see

  bool is_empty() const {
    return rows.empty() && groups.empty() && overlaps.empty() && grad_overlaps.empty() && devices.empty() &&
           !of_processes && !gradients_overlap;
  }
};

}  // namespace genopt
