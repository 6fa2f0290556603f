// One step of one optimizer, from its Python objects: reads param_groups, state and gradients into plan rows, and has
// the backends take them. A row that is as it was at the last step is only compared with what it was (witness.h).
//
// A row that the kernels can not take as it is (state yet to be made, a wrong dtype, another device, a tensor
// subclass, ...) is unsupported: the step then changes nothing and says of each such row what is wrong with it.
// Python makes the state, words the error (optim/refusals.py) or lets the reference serve the row.
#pragma once

#include <ATen/Parallel.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/run.h"
#include "../cpu/threads.h"
#include "held.h"
#include "overlaps.h"
#include "rows.h"
#include "scope.h"

namespace genopt {

// What a caller says of one step, beside the groups' options.
struct StepArguments {
  Control control;
  std::vector<int64_t> skipped;  // rows that are served elsewhere
  PyObject* grads = nullptr;     // a list with a gradient for each row, or None; without it: the parameters' .grad
  TensorLists tensors{};         // inputs that are read, and results that are written, as the step runs on their device
  bool only_check = false;       // says why the step could not be taken, and takes none
};

class Stepper {
 public:
  // backend: as RowReader's.
  Stepper(const std::string& rule, const std::string& backend)
      : plan_(rule_info(rule)), cuda_(plan_.rule), groups_(plan_.rule), reader_(plan_.rule, backend) {
  }

  // Takes one step, or changes nothing and says why. Called with the GIL; a Python error is thrown as such.
  std::optional<Refusal> step(PyObject* param_groups, PyObject* state, const StepArguments& arguments) {
    if (busy_) throw std::runtime_error("step() of this optimizer is already running in another thread");
    const Scope busy([this] { busy_ = true; }, [this] { busy_ = false; });
    Refusal refusal;
    Control& control = plan_.control;
    control = arguments.control;
    control.measure = control.measure || control.max_norm >= 0 || control.guard;
    const bool watched = is_watched();
    spread_type.find();
    groups_.read(param_groups, watched, plan_, objects_.params, refusal);
    objects_.resize();
    witnesses_.resize(objects_.rows());
    objects_.set_grads(arguments.grads);
    states_.find_all(state, objects_);
    const int64_t host_elements = read_rows(watched, arguments.skipped, refusal);
    groups_.forget_idle(plan_.rows, refusal);
    groups_.read_options_on_devices(plan_, refusal);
    if (!control.only_measure) overlaps_.check(plan_.rows, objects_, refusal);
    refusal.gradients_overlap = overlaps_.gradients_overlap();

    const std::vector<int>& devices = groups_.devices();
    std::vector<DeviceTensors> tensors;
    for (const int device : devices)
      if (const auto found = tensors_on(device, arguments.tensors)) tensors.push_back(*found);
    // Unless the factors are given.
    const bool joined = arguments.tensors[kRowSums] || arguments.tensors[kRowParts];
    const bool meets = control.measure && devices.size() > 1 && !joined && !arguments.tensors[kGroupScales];
    refusal.of_processes = control.measure && has_parts_ && !joined;
    if (meets || tensors.size() < devices.size()) refusal.devices = devices;
    if (devices.empty() && arguments.tensors[kGradNorm]) refusal.devices = {kNoDevice};  // nothing to write it
    if (!refusal.is_empty()) return refusal;
    if (arguments.only_check) return std::nullopt;
    if (plan_.rule.shared)
      for (const DeviceTensors& each : tensors)
        if (each[kSharedNumbers].count != plan_.rule.shared || each[kSharedNumbers].dtype != DType::kFloat64)
          throw std::invalid_argument("the rule's shared numbers must be a float64 tensor of " +
                                      std::to_string(plan_.rule.shared));

    const int64_t columns = 2 * static_cast<int64_t>(objects_.rows());
    for (const DeviceTensors& each : tensors) {
      if (each[kRowSums].address && (each[kRowSums].count != columns || each[kRowSums].dtype != DType::kFloat64))
        throw std::invalid_argument("row_sums must be float64 tensors of two numbers for each row");
      if (each[kRowParts].address && each[kRowParts].count != columns * BinnedTotal::kWords)
        throw std::invalid_argument("row_parts must be int64 tensors of two BinnedTotals for each row");
    }

    Held held;
    for (size_t i = 0; i < devices.size(); ++i)
      if (devices[i] != kHost) cuda_.step(devices[i], plan_, groups_.sources(), tensors[i]);
    for (size_t i = 0; i < devices.size(); ++i) {  // last: it changes the plan's control
      if (devices[i] != kHost) continue;
      read_host_tensors(tensors[i], plan_);
      run(host_elements, held);
      write_host_tensors(tensors[i], plan_);
    }
    bump_versions(held);
    return std::nullopt;
  }

  // CUDA kernels launched so far.
  int64_t launches() const {
    return cuda_.launches();
  }

 private:
  // Returns the number of elements to step on the CPU.
  int64_t read_rows(bool watched, const std::vector<int64_t>& skipped, Refusal& refusal) {
    const size_t rows = objects_.rows();
    const bool writes_gradients = plan_.control.may_write_gradients();
    settled_.assign(rows, false);
    for (const int64_t row : skipped) settled_.at(row) = true;
    const std::array<bool, 3> now{writes_gradients, objects_.grads != nullptr, c10::InferenceMode::is_enabled()};
    if (now != read_under_ || watched) witnesses_.drop_all();
    read_under_ = now;
    reader_.begin(watched, writes_gradients);
    moves_.begin(rows, writes_gradients);
    compare_rows();
    int64_t host_elements = 0;
    has_parts_ = false;
    for (size_t r = 0; r < rows; ++r) {
      Row& row = plan_.rows[r];
      if (!settled_[r]) read_row(r, row, refusal);
      if (!row.active) continue;
      if (row.device == kHost) host_elements += row.numel;
      groups_.note_device(row);
      has_parts_ = has_parts_ || row.is_part;
    }
    return host_elements;
  }

  // Settles the rows that are as they were. Comparing waits for memory, which each thread does for itself.
  void compare_rows() {
    const int64_t rows = static_cast<int64_t>(objects_.rows());
    const auto compare = [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        witnesses_.prefetch(r, objects_);
        compare_row(r, plan_.rows[r]);
      }
    };
    // Which type an object of a list has may be told by Python, on the thread that has the GIL.
    cpu::in_parallel(rows, kRowsOfAThread, objects_.grads ? 1 : at::get_num_threads(), compare);
  }

  void compare_row(size_t r, Row& row) {
    row.active = false;
    objects_.has_grad[r] = false;
    if (settled_[r] || !witnesses_.holds(r, groups_.version(row.group), objects_)) return;
    try {
      if (!reader_.renew(r, row, witnesses_, objects_)) return;
      if (row.active && !plan_.control.only_measure) moves_.note(r, row, true, objects_);
      settled_[r] = true;
    } catch (...) {  // of a storage that gives no address: read_row() says so, on the caller's thread
    }
  }

  void read_row(size_t r, Row& row, Refusal& refusal) {
    row.active = false;
    objects_.has_grad[r] = false;
    witnesses_.drop(r);
    if (!reader_.read(r, row, groups_, states_, objects_))
      refusal.rows.push_back({static_cast<int64_t>(r), reader_.problems()});
    if (!row.active) {
      moves_.forget(r);
      return;
    }
    objects_.note_present(r);
    if (plan_.control.only_measure) return;
    if (!row.only_average) witnesses_.take(r, row, groups_.version(row.group), objects_);
    moves_.note(r, row, false, objects_);
  }

  // Steps the rows on the CPU.
  void run(int64_t elements, Held& held) {
    const int threads = at::get_num_threads();
    // A long run lets other Python threads work, and so holds what they could take away: worth it where
    // rows are large, as holding one costs about as much as stepping a thousand elements.
    constexpr int64_t kLong = 1 << 20, kLongRow = 1 << 14;
    if (elements < kLong || elements < kLongRow * static_cast<int64_t>(objects_.rows())) {
      cpu::step(plan_, threads);
      return;
    }
    held.hold(objects_, plan_.rows);
    PyThreadState* thread = nullptr;
    const Scope without_gil([&thread] { thread = PyEval_SaveThread(); }, [&thread] { PyEval_RestoreThread(thread); });
    cpu::step(plan_, threads);
  }

  // Autograd then knows that these changed; torch's own fused kernels leave this out.
  void bump_versions(const Held& held) const {
    const bool same = held.is_empty();  // nobody has changed anything since rows were read
    const auto bump = [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        if (same) witnesses_.prefetch_versions(r);
        if (plan_.rows[r].active) bump_versions(r, same, same ? objects_.handles[r] : held.handles(r));
      }
    };
    cpu::in_parallel(static_cast<int64_t>(objects_.rows()), kRowsOfAThread, at::get_num_threads(), bump);
  }

  void bump_versions(size_t r, bool same, const Handles& handles) const {
    const Control& control = plan_.control;
    const Row& row = plan_.rows[r];
    const bool steps = !(control.skip && row.device == kHost) && !control.only_measure;
    const bool zeroes = control.gradients == Gradients::kZeroed;
    const bool writes_grad = control.may_write_gradients() && (steps || zeroes);
    const bool done = same && steps && !row.is_part && witnesses_.bump_versions(r);
    if (done && !writes_grad) return;
    const auto bump = [](const at::Tensor& t) {  // tensors made in inference mode have no version
      if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
    };
    objects_.for_each_present(r, handles, [&](int k, const at::Tensor& t) {
      if (!(k == kGrad ? writes_grad : steps && !(k == kParam && row.only_average))) return;
      // Of what is spread the whole has the version that torch's own operations count; a model may have a part of it.
      PyObject* const whole = objects_.wholes[r][k];
      if (whole) bump(THPVariable_Unpack(whole));
      if (whole ? k == kParam : k == kGrad || !done) bump(t);
    });
  }

  static constexpr int64_t kRowsOfAThread = 1000;  // a thread needs some microseconds to begin

  Plan plan_;
  CudaDevices cuda_;
  bool busy_ = false;
  std::array<bool, 3> read_under_{};  // of the last step: gradients are written, are given, inference mode is on
  bool has_parts_ = false;            // a row of this step is part of a tensor that is spread over processes
  std::vector<char> settled_;         // rows that are served elsewhere
  Objects objects_;
  Groups groups_;
  StateDicts states_;
  RowReader reader_;
  Witnesses witnesses_;
  Moves moves_;
  Overlaps overlaps_{moves_};
};

}  // namespace genopt
