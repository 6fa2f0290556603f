// See device_plan.h.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../rules/all.h"
#include "device_plan.h"

namespace genopt::cuda {
namespace {

int64_t layout_words(const Layout& layout) {
  return 1 + static_cast<int64_t>(layout.sizes.size()) * (1 + kOperands);
}

}  // namespace

DevicePlan::DevicePlan(const RuleInfo& rule, int device) : rule_(rule), device_(device) {
  for_each_rule([this]<class Rule, int kIndex>() {
    if (kIndex == rule_.index) kernels_ = rule_kernels<Rule>();
  });
}

bool kernels_run_here() {
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, rule_kernels<Adam>().update_float) == cudaSuccess;
  static_cast<void>(cudaGetLastError());
  return found;
}

void DevicePlan::renew(int rows, int groups, int64_t layout_words, const Queue& queue) {
  Table table{nullptr, groups, rows, 0};
  const int64_t words = table.layouts() + layout_words;
  std::vector<uint64_t> image(words);
  std::shared_ptr<void> memory = queue.allocate(words * sizeof(uint64_t));
  table.words = static_cast<uint64_t*>(memory.get());
  // Nothing fails from here on.
  table_ = table;
  image_.swap(image);
  memory_.swap(memory);
  stream_ = queue.stream;
  layout_words_ = layout_words;
}

void DevicePlan::put(int64_t at, const void* words, int count) {
  if (std::memcmp(&image_[at], words, count * sizeof(uint64_t)) == 0) return;
  std::memcpy(&image_[at], words, count * sizeof(uint64_t));
  if (!changes_.empty() && at == changes_.back().end) {
    changes_.back().end += count;
  } else {
    changes_.push_back({at, at + count});
  }
}

void DevicePlan::put_row(int r, const Row& row, unsigned used) {
  DeviceRow made{};
  bool halves = true;
  for (int k = 0; k < kOperands; ++k) {
    made.dtype[k] = row.dtype[k];
    if (k >= kState && !(used >> (k - kState) & 1)) continue;
    if (k != kGrad) made.data[k] = row.data[k];
    halves = halves && size_of(row.dtype[k]) == 2;
    if (row.layout && !row.layout->strides[k].empty()) made.strided |= 1 << k;
  }
  made.numel = row.numel;
  made.step = row.step;
  made.step_dtype = row.step_dtype;
  made.group = row.group;
  made.used = static_cast<uint8_t>(used);
  made.piece = row.dtype[kParam] == DType::kFloat64 ? 2 : halves ? 8 : 4;
  if (row.layout) {
    const auto& sizes = row.layout->sizes;
    made.layout = layout_end_;
    std::vector<uint64_t> words{sizes.size()};
    words.insert(words.end(), sizes.begin(), sizes.end());
    for (const auto& strides : row.layout->strides) {
      words.insert(words.end(), strides.begin(), strides.end());
      if (strides.empty()) words.resize(words.size() + sizes.size());
    }
    put(table_.layouts() + layout_end_, words.data(), static_cast<int>(words.size()));
    layout_end_ += static_cast<int64_t>(words.size());
  }
  put(table_.row(r), &made, kRowWords);
}

void DevicePlan::step(const std::vector<Row>& rows, const std::vector<Options>& groups,
                      const std::vector<Sources>& sources, const Queue& queue) {
  int64_t layouts = 0;
  bool active[2] = {};  // float, double
  for (const Row& row : rows) {
    if (!row.active || row.device != device_) continue;
    active[row.dtype[kParam] == DType::kFloat64] = true;
    if (row.layout) layouts += layout_words(*row.layout);
  }
  if (!active[0] && !active[1]) return;

  const int row_count = static_cast<int>(rows.size()), group_count = static_cast<int>(groups.size());
  // A table is only used on the stream that its memory belongs to, and no more once a graph has it: the
  // graph writes it at every replay. A graph may take over a table from before: it is never given back.
  const bool stale = !captured_.empty() && captured_.back() == memory_;
  const bool anew = !memory_ || stale || (queue.stream != stream_ && !queue.capturing) || row_count != table_.rows ||
                    group_count != table_.groups || layouts > layout_words_;
  if (anew) renew(row_count, group_count, layouts, queue);
  if (queue.capturing) captured_.push_back(memory_);

  // First what mostly stays: the prologue reads rows from the table.
  if (anew) changes_ = {{table_.first_tile(0), static_cast<int64_t>(image_.size())}};
  layout_end_ = 0;
  int64_t tiles = 0;
  for (int r = 0; r < row_count; ++r) {
    if (rows[r].active && rows[r].device == device_) put_row(r, rows[r], rule_.used_states(groups[rows[r].group]));
    put(table_.first_tile(r), tiles);
    DeviceRow known;  // of a row that rests too, as it will return
    std::memcpy(&known, &image_[table_.row(r)], sizeof known);
    tiles += (known.numel + kTile - 1) / kTile;
  }
  table_.tiles = tiles;
  flush(0, queue);

  // Then what changes at every step. At a replay the device may hold anything: a graph brings all of it.
  if (anew || queue.capturing) changes_ = {{table_.source(0, 0), table_.grad(row_count)}};
  for (int g = 0; g < group_count; ++g)
    for (int k = 0; k < kMaxOptions; ++k) {
      const Source& source = sources[g][k];
      const uint64_t address = reinterpret_cast<uintptr_t>(source.address);
      put(table_.source(k, g), address ? address | static_cast<uint64_t>(source.dtype) << kDTypeShift : 0);
      uint64_t bits;
      std::memcpy(&bits, &groups[g][k], sizeof bits);
      put(table_.option(k, g), bits);
    }
  for (int r = 0; r < row_count; ++r) {
    const Row& row = rows[r];
    const uint64_t address = row.numel ? reinterpret_cast<uintptr_t>(row.data[kGrad]) : kEmpty;
    put(table_.grad(r), row.active && row.device == device_ ? address | (row.fresh ? kFresh : 0) : 0);
  }
  flush(row_count, queue);

  const int64_t threads = tiles * kWarp;
  if (tiles && active[0]) launch(kernels_.update_float, threads, queue, table_);
  if (tiles && active[1]) launch(kernels_.update_double, threads, queue, table_);
}

// Sends what changed; the last launch derives the scalars of the first `rows` rows.
void DevicePlan::flush(int rows, const Queue& queue) {
  std::sort(changes_.begin(), changes_.end(), [](Range a, Range b) { return a.begin < b.begin; });
  Range range{};
  for (const Range& next : changes_) {
    // What one launch can carry travels together, with what lies between: cheaper than a launch of its own.
    if (range.end && (next.begin <= range.end || next.end - range.begin <= kLargePayload)) {
      range.end = std::max(range.end, next.end);
      continue;
    }
    if (range.end) send(range, 0, queue);
    range = next;
  }
  changes_.clear();
  if (range.end || rows) send(range, rows, queue);
}

void DevicePlan::send(Range range, int rows, const Queue& queue) {
  const auto prologue = [&](auto kernel, auto payload, int64_t begin, int64_t end, int derived) {
    payload.at = begin;
    payload.count = end - begin;
    std::copy(image_.begin() + begin, image_.begin() + end, payload.words);
    launch(kernel, std::max<int64_t>(end - begin, derived), queue, table_, payload, derived);
  };
  for (; range.end - range.begin > kLargePayload; range.begin += kLargePayload)
    prologue(kernels_.prologue_large, Payload<kLargePayload>{}, range.begin, range.begin + kLargePayload, 0);
  if (range.end - range.begin > kSmallPayload) {
    prologue(kernels_.prologue_large, Payload<kLargePayload>{}, range.begin, range.end, rows);
  } else {
    prologue(kernels_.prologue_small, Payload<kSmallPayload>{}, range.begin, range.end, rows);
  }
}

template <class... Parameters, class... Arguments>
void DevicePlan::launch(void (*kernel)(Parameters...), int64_t threads, const Queue& queue,
                        const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads));
  config.blockDim = dim3(kThreads);
  config.stream = queue.stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) {
    memory_.reset();                        // what it holds is not known: the next step begins anew
    static_cast<void>(cudaGetLastError());  // told here: torch must not meet it again
    throw std::runtime_error(std::string("genopt_ext: launching a kernel failed: ") + cudaGetErrorString(error));
  }
  ++launches_;
}

}  // namespace genopt::cuda
