// See device_plan.h.
#include <algorithm>
#include <cstring>

#include "../rules/all.h"
#include "device_plan.h"
#include "device_row.h"
#include "launch.h"

namespace genopt::cuda {

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

void DevicePlan::renew(const Table& wanted, const Queue& queue) {
  Table table = wanted;
  table.place();
  std::vector<uint64_t> image(table.norms());
  std::shared_ptr<void> memory = queue.allocate(table.end() * sizeof(uint64_t));
  table.words = static_cast<uint64_t*>(memory.get());
  // Nothing fails from here on.
  table_ = table;
  image_.swap(image);
  memory_.swap(memory);
  stream_ = queue.stream;
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

int DevicePlan::kind_of(const Row& row, const Options& options, const Control& control) const {
  const bool cautious = rule_.cautious >= 0 && options[rule_.cautious] > 0;
  if (const Way* const way = way_of(row, control))
    for (size_t i = 0; i < kernels_.lean.size(); ++i) {
      const LeanKernel& each = kernels_.lean[i];
      if (each.used == row.used % kWithAverage && each.way == way - kWays && each.cautious == cautious)
        return kFirstLean + static_cast<int>(i);
    }
  return row.dtype[kParam] == DType::kFloat64 ? kDouble : kFloat;
}

void DevicePlan::put_row(int r, const Row& row, const Options& options, const Control& control, int64_t factors_at) {
  DeviceRow made = device_row(row, options, kind_of(row, options, control), rule_.needs_totals(options));
  made.factors_at = factors_at;
  if (row.layout) {
    const std::vector<uint64_t> words = words_of(*row.layout);
    made.layout = layout_end_;
    put(table_.layouts() + layout_end_, words.data(), static_cast<int>(words.size()));
    layout_end_ += static_cast<int64_t>(words.size());
  }
  put(table_.row(r), &made, kRowWords);
}

void DevicePlan::step(const Plan& plan, const std::vector<Sources>& sources, const DeviceTensors& tensors,
                      const Queue& queue) {
  if (broken_)
    throw std::runtime_error(
        "genopt_ext: an earlier step failed after its step counters had been advanced on the device; make the "
        "optimizer anew and load a checkpoint");
  const std::vector<Row>& rows = plan.rows;
  const std::vector<Options>& groups = plan.groups;
  const Control& control = plan.control;
  const auto is_here = [this](const Row& row) { return row.active && row.device == device_; };
  Table wanted{};
  wanted.rows = static_cast<int>(rows.size());
  wanted.groups = static_cast<int>(groups.size());
  const bool sums_given = tensors[kRowSums].address != nullptr;
  wanted.factored = rule_.factored ? wanted.rows : 0;
  int measured = 0, active = 0;  // rows
  bool measures[kMeasured] = {};
  for (const Row& row : rows) {
    if (!is_here(row)) continue;
    ++active;
    if (row.layout) wanted.layout_words += layout_words(*row.layout);
    if (!control.measure || sums_given || row.spans(device_) == 0) continue;
    ++measured;
    measures[static_cast<int>(measured_as(row, groups[row.group]))] = true;
  }
  if (!active) return;
  // Of inactive rows and those elsewhere too, as the device knows them.
  const bool totals = !control.only_measure && plan.needs_totals();
  for (int r = 0; (control.measure || totals) && r < wanted.rows; ++r) {
    DeviceRow known{};
    if (memory_ && r < table_.rows) std::memcpy(&known, &image_[table_.row(r)], sizeof known);
    if (totals && wanted.factored)
      wanted.factor_words +=
          std::max(rows[r].factors ? factor_words(rows[r].matrices) : 0, factor_words(known.matrices));
    const int64_t most = std::max(spans_of(rows[r].numel, rows[r].tile), spans_of(known.numel, known.tile)) + 1;
    if (control.measure) wanted.norm_spans += most;
    if (totals) wanted.total_spans += most;
  }

  // A table is only used on the stream that its memory belongs to, and no more once a graph has it: the
  // graph writes it at every replay. A graph may take over a table from before: it is never given back.
  const bool stale = !captured_.empty() && captured_.back() == memory_;
  const bool anew = !memory_ || stale || (queue.stream != stream_ && !queue.capturing) || wanted.rows != table_.rows ||
                    wanted.groups != table_.groups || wanted.layout_words > table_.layout_words ||
                    wanted.norm_spans > table_.norm_spans || wanted.total_spans > table_.total_spans ||
                    wanted.factor_words > table_.factor_words;
  if (anew) renew(wanted, queue);
  if (queue.capturing) captured_.push_back(memory_);

  // First what mostly stays: the prologue reads rows from the table.
  if (anew) changes_ = {{table_.first_tile(0), static_cast<int64_t>(image_.size())}};
  layout_end_ = 0;
  int64_t spans = 0, pieces = 0, factor_groups = 0, factors_at = 0;
  std::vector<Kind> kinds(kFirstLean + kernels_.lean.size());
  std::vector<DeviceRow> known(wanted.rows);  // inactive ones too, as they will return
  for (int r = 0; r < wanted.rows; ++r) {
    if (is_here(rows[r])) put_row(r, rows[r], groups[rows[r].group], control, factors_at);
    put(table_.first_span(r), spans);
    std::memcpy(&known[r], &image_[table_.row(r)], sizeof(DeviceRow));
    spans += spans_of(known[r].numel, known[r].tile);
    if (table_.factored) {
      put(table_.first_piece(r), pieces);
      put(table_.first_factor_group(r), factor_groups);
      pieces += pieces_of(known[r].matrices);
      factor_groups += factor_groups_of(known[r].matrices);
      factors_at += factor_words(known[r].matrices);
    }
    Kind& kind = kinds[known[r].kind];
    ++kind.range.rows;
    kind.range.tiles += tiles_of(known[r].numel, known[r].tile);
    kind.range.one_each = kind.range.one_each && tiles_of(known[r].numel, known[r].tile) == 1;
    kind.active = kind.active || is_here(rows[r]);
    kind.totaled = kind.totaled || (totals && is_here(rows[r]) && rows[r].numel && plan.needs_totals(rows[r]));
  }
  for (size_t i = 1; i < kinds.size(); ++i) {
    kinds[i].range.first = kinds[i - 1].range.first + kinds[i - 1].range.rows;
    kinds[i].range.first_tile = kinds[i - 1].range.first_tile + kinds[i - 1].range.tiles;
  }
  for (int r = 0; r < wanted.rows; ++r) {
    Kind& kind = kinds[known[r].kind];
    put(table_.first_tile(kind.range.first + kind.placed), kind.range.first_tile + kind.placed_tiles);
    put(table_.order(kind.range.first + kind.placed), static_cast<uint64_t>(r));
    ++kind.placed;
    kind.placed_tiles += tiles_of(known[r].numel, known[r].tile);
  }
  for (int g = 0, r = 0; g <= wanted.groups; ++g) {
    while (r < wanted.rows && rows[r].group < g) ++r;
    put(table_.first_row(g), static_cast<uint64_t>(r));
  }
  table_.spans = spans;
  table_.pieces = pieces;
  table_.factor_groups = factor_groups;
  table_.measures = control.measure;
  table_.totals_rows = totals;
  table_.sums_given = sums_given;
  table_.gradients = control.gradients;
  table_.some_clip_alone =
      std::any_of(groups.begin(), groups.end(), [](const Options& each) { return clips_alone(each.data()); });
  table_.may_skip = control.guard || tensors[kFoundInf].address;
  flush(0, queue);

  // Then what changes at every step. At a replay the device may hold anything: a graph brings all of it.
  if (anew || queue.capturing) changes_ = {{table_.source(0, 0), table_.first_tile(0)}};
  for (int g = 0; g < wanted.groups; ++g) {
    for (int k = 0; k < kMaxOptions; ++k) put(table_.source(k, g), word_of(sources[g][k].address, sources[g][k].dtype));
    for (int k = 0; k < kAllOptions; ++k) put(table_.option(k, g), bits_of(groups[g][k]));
  }
  put(table_.control(kMaxNorm), bits_of(control.max_norm));
  put(table_.control(kScale), bits_of(control.scale));
  put(table_.control(kNormKind), static_cast<uint64_t>(control.norm));
  put(table_.control(kGuard), control.guard);
  for (int k = 0; k < kDeviceTensors; ++k) put(table_.tensor(k), word_of(tensors[k].address, tensors[k].dtype));
  for (int r = 0; r < wanted.rows; ++r) {
    const Row& row = rows[r];
    const bool has_elements = row.numel && !row.only_average;
    const uint64_t address = has_elements ? reinterpret_cast<uintptr_t>(row.data[kGrad]) : kEmpty;
    put(table_.grad(r), is_here(row) ? address : 0);
  }
  flush(wanted.rows, queue);
  has_begun_ = !rule_.is_transfer && !queue.capturing && !control.only_measure;

  if (control.measure) {
    const NormKernels norms = norm_kernels(control.norm);
    const int64_t threads = (measured ? spans : 1) * kWarp;
    if (!measured) measures[0] = true;  // which decides
    for (int i = 0; i < kMeasured; ++i)
      if (measures[i]) launch(norms[i], threads, queue, table_, measured);
  }
  if (control.only_measure) return;
  const auto is_totaled = [&](const Row& row) { return is_here(row) && row.numel && plan.needs_totals(row); };
  for (const bool in_double : {false, true}) {
    const auto is_factored = [&](const Row& row) {
      return row.factors && is_totaled(row) && (row.dtype[kParam] == DType::kFloat64) == in_double;
    };
    if (!rule_.factored || std::none_of(rows.begin(), rows.end(), is_factored)) continue;
    launch(kernels_.squares[in_double], pieces * kWarp, queue, table_);
    launch(kernels_.factors[in_double], factor_groups * kWarp, queue, table_);
  }
  for (int i = 0; i < static_cast<int>(kinds.size()); ++i) {
    if (!kinds[i].totaled) continue;
    const TotalKernel total = i == kFloat    ? kernels_.total_float
                              : i == kDouble ? kernels_.total_double
                                             : kernels_.lean[i - kFirstLean].total;
    launch(total, spans * kWarp, queue, table_, i);
  }
  if (kernels_.settle)
    if (const auto first = std::find_if(rows.begin(), rows.end(), is_totaled); first != rows.end())
      launch(kernels_.settle, wanted.rows, queue, table_, static_cast<int>(first - rows.begin()));
  for (size_t i = 0; i < kinds.size(); ++i) {
    const TileRange& range = kinds[i].range;
    if (!kinds[i].active || !range.tiles) continue;
    const UpdateKernel update = i == kFloat    ? kernels_.update_float
                                : i == kDouble ? kernels_.update_double
                                               : kernels_.lean[i - kFirstLean].update;
    launch(update, range.tiles * kWarp, queue, table_, range);
  }
  has_begun_ = false;
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
  try {
    cuda::launch(kernel, threads, queue, arguments...);
  } catch (...) {
    memory_.reset();  // what it holds is not known: the next step begins anew
    broken_ = has_begun_;
    throw;
  }
  ++launches_;
}

}  // namespace genopt::cuda
