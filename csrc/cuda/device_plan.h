// The step plan on one CUDA device: keeps the table (table.h), sends what changed, launches the kernels.
// Free of torch, so that it also runs against the CPU stand-in for the CUDA runtime in tests/cuda_on_cpu.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <memory>
#include <vector>

#include "kernels.h"

namespace genopt::cuda {

// Where a step is enqueued.
struct Queue {
  cudaStream_t stream;
  bool capturing;  // into a CUDA graph
  // Memory on the device for work on this stream, given back in the stream's order.
  std::function<std::shared_ptr<void>(size_t bytes)> allocate;
};

// Whether this build has code for the current device.
bool kernels_run_here();

class DevicePlan {
 public:
  DevicePlan(const RuleInfo& rule, int device);

  // Enqueues one step of the active rows on this device: a prologue, again where more changed than one launch can
  // carry, then one launch for each kind of rows, after one each to measure usual, float and double ones, if asked, and
  // one for each kind with rows that the rule needs totals of. Nothing that is passed needs to live on after it. Row r
  // of one step is row r of the next: an inactive row keeps its place. Throws std::runtime_error; of an optimizer,
  // after one between the prologue and the last update, always.
  void step(const Plan& plan, const std::vector<Sources>& sources, const DeviceTensors& tensors, const Queue& queue);

  // Kernels launched since the plan was made.
  int64_t launches() const {
    return launches_;
  }

 private:
  struct Range {
    int64_t begin, end;
  };
  // Kinds of rows, by the kernel that updates them: any that compute in float, in double, then RuleKernels::lean.
  enum : int { kFloat, kDouble, kFirstLean };
  struct Kind {
    TileRange range{.first = 0, .rows = 0, .first_tile = 0, .tiles = 0, .one_each = true};
    int32_t placed = 0;
    int64_t placed_tiles = 0;
    bool active = false;   // a row of it
    bool totaled = false;  // one that the rule needs totals of
  };

  void renew(const Table& wanted, const Queue& queue);
  void put(int64_t at, const void* words, int count);
  void put(int64_t at, uint64_t word) {
    put(at, &word, 1);
  }
  void put_row(int r, const Row& row, const Options& options, const Control& control, int64_t factors_at);
  int kind_of(const Row& row, const Options& options, const Control& control) const;
  void flush(int rows, const Queue& queue);
  void send(Range range, int rows, const Queue& queue);
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t threads, const Queue& queue, const Arguments&... arguments);

  const RuleInfo& rule_;
  const int device_;
  RuleKernels kernels_;
  Table table_{};
  std::shared_ptr<void> memory_;
  // Tables that graphs have, one a capture: a graph may be replayed for as long as the plan lives, and no longer.
  std::vector<std::shared_ptr<void>> captured_;
  cudaStream_t stream_ = nullptr;
  std::vector<uint64_t> image_;  // what the device has, but for its updates
  int64_t layout_end_ = 0;
  std::vector<Range> changes_;
  bool has_begun_ = false;  // counters are advanced, updates not yet launched
  bool broken_ = false;     // and will not be
  int64_t launches_ = 0;
};

}  // namespace genopt::cuda
