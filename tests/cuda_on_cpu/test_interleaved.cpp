// A short training in random order, again and again: a table longer than one launch can carry, rows of all kinds,
// several spans, clips of every kind, a skipped step, rows that change between steps; then quantization. The
// interleaved stand-in (interleaved.cpp) stops at the first race; what is left is compared with the bits that a run in
// order leaves.
//
// test_interleaved [first seed]: GENOPT_SEEDS of them, else 100. A seed alone does again what it did among others.
#include <cmath>

#include "../cpp/on_device.h"
#include "interleaved.h"
#include "quant/cuda.h"

namespace {

constexpr int64_t kLong = int64_t{kSpan} * kTile;
constexpr size_t kRows = 255;
static_assert(kRows * cuda::kRowWords > cuda::kLargePayload);

// In a state's buffer, after its codes.
size_t scales_at(int64_t numel) {
  return static_cast<size_t>(numel + 3) / 4 * 4;
}

std::vector<Tensor> make_tensors(const RuleInfo& info, const Options& options) {
  std::vector<Tensor> tensors;
  const auto add = [&](int64_t numel, Kind kind, int dtypes, unsigned more = 0) -> Tensor& {
    const int turn = static_cast<int>(tensors.size());
    const unsigned used = info.factored && turn % 2 == 0 ? info.factored : info.used_states(options);
    tensors.emplace_back(kDTypes[dtypes], numel, kind, turn, used | more, 1.0, true, info.factored);
    return tensors.back();
  };
  // Lean rows: floats, halves, codes; a short last tile, several spans.
  for (const int dtypes : {0, 2, 4}) add(600, kContiguous, dtypes);
  add(kLong + 5, kContiguous, 0);
  add(2 * kLong + 5, kContiguous, 2);
  Tensor& codes = add(300, kContiguous, 0);
  for (int k = kState; k < kAverage; ++k) {
    Buffer& buffer = codes.operands[k];
    if (buffer.bytes.empty()) continue;
    buffer.dtype = info.squares >> (k - kState) & 1 ? DType::kUInt8 : DType::kInt8;
    const float scales[] = {0.01f, 0.02f};
    buffer.bytes.assign(scales_at(codes.numel) + sizeof scales, 3);
    std::memcpy(&buffer.bytes[scales_at(codes.numel)], scales, sizeof scales);
  }
  // Rows of the general kernels: layouts, odd addresses, mixed dtypes, doubles, averages.
  add(300, kTransposed, 0);
  for (const int dtypes : {1, 5, 7}) add(300, kSliced, dtypes, kWithAverage);
  for (const int dtypes : {0, 1, 3}) add(257, kOneElementOn, dtypes);
  while (tensors.size() < kRows) add(0, kContiguous, 0);
  return tensors;
}

// Adds memory of the device to what is compared.
void leave(std::string& left, const void* from, size_t bytes) {
  std::string text(bytes, 0);
  copy(text.data(), from, bytes);
  left += text;
}

// All bits that four steps leave.
std::string train(const RuleInfo& info, const std::vector<Tensor>& initial, std::vector<Options> groups) {
  std::vector<Tensor> tensors = initial;
  std::vector<OnDevice> on_device(tensors.begin(), tensors.end());
  cuda::DevicePlan plan(info, kHost);
  const auto norm = allocate(sizeof(float)), skipped = allocate(sizeof(int64_t)), loss_scale = allocate(sizeof(float)),
             shared = allocate(sizeof kSharedAtFirst);
  const int64_t none = 0;
  const float three = 3;
  copy(norm.get(), &none, sizeof(float));
  copy(skipped.get(), &none, sizeof none);
  copy(loss_scale.get(), &three, sizeof three);
  copy(shared.get(), kSharedAtFirst.data(), sizeof kSharedAtFirst);
  DeviceTensors given{};
  given[kGradScale] = {loss_scale.get(), k32, 1};
  given[kGradNorm] = {norm.get(), k32, 1};
  given[kSkippedSteps] = {skipped.get(), k32, 1};
  if (info.shared) given[kSharedNumbers] = {shared.get(), k64, info.shared};

  std::string left;
  using enum Gradients;
  constexpr Gradients kLeft[] = {kKept, kZeroed, kKept, kUnscaled};
  for (int step = 0; step < 4; ++step) {
    Plan host(info);
    host.groups = groups;
    host.control.max_norm = 2;
    host.control.norm = static_cast<Norm>(step % 3);
    host.control.measure = true;
    host.control.guard = step > 0;
    host.control.gradients = kLeft[step];
    for (size_t i = 0; i < tensors.size(); ++i) {
      Tensor& t = tensors[i];
      t.active = step == 0 || (i + step) % 5 != 0;
      if (i == 3 && step == 3) t.operands[kGrad].set(0, INFINITY);  // the step is skipped
      if (t.numel && (i + step) % 3 == 0) on_device[i].send(t, kGrad);
      Row row = on_device[i].row(t, static_cast<int>(i % groups.size()));
      for (int k = kState; k < kAverage; ++k)
        if (is_block(row.dtype[k]))
          row.scales[k - kState] = reinterpret_cast<float*>(static_cast<char*>(row.data[k]) + scales_at(row.numel));
      host.rows.push_back(row);
    }
    std::stable_sort(host.rows.begin(), host.rows.end(), [](const Row& a, const Row& b) { return a.group < b.group; });
    plan.step(host, std::vector<Sources>(groups.size()), given, {nullptr, false, allocate});
    groups[step][0] *= 0.5;
    leave(left, norm.get(), sizeof(float));
  }
  leave(left, skipped.get(), sizeof(int64_t));
  leave(left, shared.get(), sizeof kSharedAtFirst);
  for (size_t i = 0; i < tensors.size(); ++i) {
    leave(left, on_device[i].step.get(), tensors[i].double_step ? sizeof(double) : sizeof(float));
    for (int k = 0; k < kOperands; ++k) leave(left, on_device[i].memory[k].get(), tensors[i].operands[k].bytes.size());
  }
  return left;
}

// All bits of scales, zero points, codes and the numbers behind these: of blocks, and of units that warps share.
std::string quantize() {
  constexpr int64_t kNumel = 6000;
  struct Case {
    bool blocks;
    int64_t run, units;
    int bits;
    bool symmetric;
  };
  std::string left;
  for (const Case& each : {Case{true, 64, 94, 4, true}, Case{true, 512, 12, 8, false}, Case{false, kNumel, 1, 8, false},
                           Case{false, 500, 12, 4, true}, Case{false, 1, 60, 8, false}}) {
    std::vector<float> numbers(kNumel);
    for (int64_t i = 0; i < kNumel; ++i) numbers[i] = static_cast<float>(i * 7919 % 1000) - 400;
    const std::vector<uint64_t> zeros(2 * each.units);
    const auto x = allocate(kNumel * 4), back = allocate(kNumel * 4), codes = allocate(kNumel * each.bits / 8),
               scale = allocate(each.units * 4), zero_point = allocate(each.units), ranges = allocate(16 * each.units);
    copy(x.get(), numbers.data(), kNumel * 4);
    copy(ranges.get(), zeros.data(), 16 * each.units);
    quant::Quantization q{};
    q.numbers = x.get();
    q.dtype = k32;
    q.numel = kNumel;
    q.run = each.run;
    q.units = each.units;
    q.codes = codes.get();
    q.scale = static_cast<float*>(scale.get());
    q.zero_point = each.symmetric ? nullptr : static_cast<int8_t*>(zero_point.get());
    q.bits = each.bits;
    const cuda::Queue queue{nullptr, false, allocate};
    if (each.blocks) {
      quant::cuda::quantize_blocks(q, queue);
    } else {
      quant::cuda::find_scales(q, ranges.get(), queue);
      quant::cuda::encode(q, queue);
    }
    q.numbers = back.get();
    quant::cuda::decode(q, queue);
    leave(left, back.get(), kNumel * 4);
    leave(left, codes.get(), kNumel * each.bits / 8);
    leave(left, scale.get(), each.units * 4);
    if (q.zero_point) leave(left, q.zero_point, each.units);
  }
  return left;
}

// Of one rule, what a run in order leaves.
struct Expected {
  const RuleInfo& info;
  std::vector<Options> groups{5, options_of(info, 0.1)};
  std::vector<Tensor> initial;
  std::string left;

  explicit Expected(const RuleInfo& info) : info(info) {
    groups[1][kMaxGradNorm] = 0.5;
    groups[2][kClipPerParam] = 0.25;
    groups[3][kAgc] = 0.125;
    groups[4][kClipGradValue] = 0.5;
    for (Options& each : groups) each[kEmaDecay] = 0.75;
    initial = make_tensors(info, groups[0]);
    cuda_on_cpu_seed(0);
    left = run();
  }
  std::string run() const {
    return train(info, initial, groups) + quantize();
  }
};

}  // namespace

int main(int count, char** arguments) {
  const char* const given = std::getenv("GENOPT_SEEDS");
  const uint64_t first = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1;
  const uint64_t seeds = given ? std::strtoull(given, nullptr, 10) : 100, rules = rule_infos().size();
  std::vector<Expected> expected;
  for (const RuleInfo& info : rule_infos()) expected.emplace_back(info);
  for (uint64_t seed = first; seed < first + seeds; ++seed) {
    const Expected& each = expected[seed % rules];
    cuda_on_cpu_seed(seed);
    CHECK(each.run() == each.left, each.info.name + (" seed " + std::to_string(seed)));
  }
}
