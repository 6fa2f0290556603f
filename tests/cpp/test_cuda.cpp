// The CUDA backend without torch: on a GPU where nvcc compiles this, else on the CPU stand-in (tests/cuda_on_cpu).
// Every step against the rule element by element (step_cases.h), then against the CPU backend: rows, options and
// addresses that change between steps, captured graphs, and how many launches all of it takes.
#include "cpu/run.h"
#include "on_device.h"

namespace {

using cuda::DevicePlan;

void run_on_device(const RuleInfo& info, const std::vector<Options>& groups, std::vector<Tensor>& tensors, int steps,
                   int /*variant*/) {
  DevicePlan plan(info, kHost);
  std::vector<OnDevice> on_device(tensors.begin(), tensors.end());
  const std::shared_ptr<void> shared = allocate(sizeof kSharedAtFirst);
  copy(shared.get(), kSharedAtFirst.data(), sizeof kSharedAtFirst);
  for (int step = 0; step < steps; ++step) {
    Plan host(info);
    host.groups = groups;
    for (size_t i = 0; i < tensors.size(); ++i) host.rows.push_back(on_device[i].row(tensors[i], 1));
    DeviceTensors given{};
    if (info.shared) given[kSharedNumbers] = {shared.get(), k64, info.shared};
    plan.step(host, std::vector<Sources>(groups.size()), given, {nullptr, false, allocate});
    check(cudaDeviceSynchronize());
  }
  for (size_t i = 0; i < tensors.size(); ++i) on_device[i].fetch(tensors[i]);
}

// Tensors on both sides, stepped by both backends.
struct Twins {
  const RuleInfo& info;
  std::vector<Options> groups;
  std::vector<Sources> sources;
  std::vector<Tensor> tensors;
  std::vector<int> group_of;
  std::vector<OnDevice> on_device;
  DevicePlan plan{info, kHost};
  cudaStream_t stream = nullptr;
  bool capturing = false;
  Control control;
  float loss_scale = 1;
  std::shared_ptr<void> loss_scale_on_device, shared_on_device = allocate(sizeof kSharedAtFirst);
  std::array<double, kMaxShared> shared = kSharedAtFirst;
  std::minstd_rand random{7};

  Twins(const char* rule, std::vector<Options> groups) : info(rule_info(rule)), groups(groups), sources(groups.size()) {
    copy(shared_on_device.get(), shared.data(), sizeof shared);
  }

  void add(int64_t numel, Kind kind, const DType (&dtypes)[3], int turn = 0, unsigned more = 0) {
    tensors.emplace_back(dtypes, numel, kind, turn, used_by(turn) | more, 1.0, true, info.factored);
    tensors.back().active = true;
    on_device.emplace_back(tensors.back());
    group_of.push_back(static_cast<int>(random() % groups.size()));
  }

  // Every other tensor has factors, if the rule knows such.
  unsigned used_by(int turn) const {
    return info.factored && turn % 2 ? info.factored : info.used_states(groups[0]);
  }

  void set_loss_scale(float scale) {
    loss_scale = scale;
    loss_scale_on_device = allocate(sizeof scale);
    copy(loss_scale_on_device.get(), &scale, sizeof scale);
  }

  // As rows of an optimizer are.
  static bool by_group(const Row& a, const Row& b) {
    return a.group < b.group;
  }
  // Kernels that one step launched.
  int64_t step_on_device() {
    Plan step(info);
    step.groups = groups;
    step.control = control;
    for (size_t i = 0; i < tensors.size(); ++i) step.rows.push_back(on_device[i].row(tensors[i], group_of[i]));
    std::stable_sort(step.rows.begin(), step.rows.end(), by_group);
    DeviceTensors given{};
    if (loss_scale_on_device) given[kGradScale] = {loss_scale_on_device.get(), DType::kFloat32, 1};
    if (info.shared) given[kSharedNumbers] = {shared_on_device.get(), k64, info.shared};
    const int64_t before = plan.launches();
    plan.step(step, sources, given, {stream, capturing, allocate});
    return plan.launches() - before;
  }
  void step_on_host() {
    Plan twin(info);
    twin.groups = groups;
    twin.control = control;
    twin.shared = shared.data();
    twin.control.scale *= twin.control.unscale = static_cast<float>(1.0 / loss_scale);
    for (size_t i = 0; i < tensors.size(); ++i) twin.rows.push_back(tensors[i].row(group_of[i]));
    std::stable_sort(twin.rows.begin(), twin.rows.end(), by_group);
    cpu::step(twin, 1);
  }
  int64_t step() {
    const int64_t launches = step_on_device();
    step_on_host();
    return launches;
  }
  void compare(const std::string& when) {
    check(cudaDeviceSynchronize());
    std::array<double, kMaxShared> numbers{};
    copy(numbers.data(), shared_on_device.get(), sizeof numbers);
    CHECK(numbers == shared, when + ": " + info.name);
    for (size_t i = 0; i < tensors.size(); ++i) {
      Tensor there = tensors[i];
      on_device[i].fetch(there);
      const std::string what = when + ", tensor " + std::to_string(i) + ": " + show(groups[0], info, tensors[i], 0);
      CHECK(there.step == tensors[i].step && there.step64 == tensors[i].step64, what);
      for (int k = 0; k < kOperands; ++k) CHECK(there.operands[k].bytes == tensors[i].operands[k].bytes, what);
    }
  }
  void move(size_t i, int k) {
    const std::shared_ptr<void> old = on_device[i].memory[k];  // held: the new address is another
    const size_t bytes = tensors[i].operands[k].bytes.size();
    on_device[i].memory[k] = allocate(bytes);
    copy(on_device[i].memory[k].get(), old.get(), bytes);
  }
};

// Anything may change between two steps: gradients come, go and move, so do states, layouts and options.
void test_changes(const char* rule) {
  const RuleInfo& info = rule_info(rule);
  Twins twins(rule, {options_of(info, 0.1), options_of(info, 0.2), options_of(info, 0.3)});
  for (int i = 0; i < 60; ++i)
    twins.add(kSizes[i % std::size(kSizes)] % 1000, static_cast<Kind>(i % kOneByteOn), kDTypes[i % 8], i);
  for (int step = 0; step < 12; ++step) {
    for (size_t i = 0; i < twins.tensors.size(); ++i) {
      Tensor& t = twins.tensors[i];
      t.active = twins.random() % 4 != 0 && step != 5;  // at one step none has a gradient
      if (twins.random() % 3 == 0) twins.move(i, kGrad);
      if (twins.random() % 10 == 0) twins.move(i, kState);
      if (twins.random() % 10 == 0) twins.move(i, kParam);
      if (twins.random() % 20 == 0) twins.group_of[i] = static_cast<int>(twins.random() % twins.groups.size());
      if (twins.random() % 20 == 0) {
        // Another tensor in its place: of another size, dtype and layout.
        t = Tensor(kDTypes[twins.random() % 8], kSizes[twins.random() % 6],
                   static_cast<Kind>(twins.random() % kOneByteOn), step, twins.used_by(step), 1.0, true, info.factored);
        twins.on_device[i] = OnDevice(t);
      }
    }
    if (step % 3 == 1) twins.groups[step % 2][0] *= 0.5;
    if (step == 7) {
      twins.groups.push_back(options_of(info, 0.4));
      twins.sources.emplace_back();
    }
    if (step == 8) twins.add(300, kContiguous, kDTypes[0]);
    if (step == 9) check(cudaStreamCreate(&twins.stream));
    twins.step();
    twins.compare(std::string(rule) + " step " + std::to_string(step));
  }
}

void test_launches() {
  for (const int count : {1, 2000, 4000, 10'000}) {
    Twins twins("adam", std::vector<Options>(count >= 2000 ? 500 : 1, options_of(rule_info("adam"), 0.1)));
    for (int i = 0; i < count; ++i) twins.add(1 + i % 3 * 200, kContiguous, kDTypes[0], i);
    twins.step();
    CHECK(twins.step() == 2, count);  // nothing changed: prologue and update
    for (int step = 0; step < 2; ++step) {
      for (size_t i = 0; i < twins.tensors.size(); ++i) twins.move(i, kGrad);
      if (step == 1 && count <= 2000)
        for (Options& each : twins.groups) each[0] *= 0.5;  // as a scheduler does
      CHECK(twins.step() == (count <= 4000 ? 2 : 4), count);
    }
    // Few gradients move, far from one another.
    for (int i = 0; i < count; i += 600) twins.move(i, kGrad);
    CHECK(twins.step() <= (count <= 4000 ? 2 : 4), count);
    twins.compare("launches");
  }
  Twins twins("sgd", {options_of(rule_info("sgd"), 0.1)});
  twins.add(300, kContiguous, kDTypes[0]);
  twins.add(300, kContiguous, kDTypes[1]);
  twins.step();
  CHECK(twins.step() == 3, "float and double rows");
  twins.compare("float and double");

  Twins empty("lamb", {options_of(rule_info("lamb"), 0.1)});
  empty.add(0, kContiguous, kDTypes[0]);
  CHECK(empty.step() == 2, "the table and the prologue: no elements to make totals of");
  empty.compare("empty");
}

// Norms, clips of every kind, skipped steps, zeroed and unscaled gradients and averages, in all of their combinations.
void test_gradient_path(const char* rule) {
  const RuleInfo& info = rule_info(rule);
  std::vector<Options> groups(5, options_of(info, 0.1));
  groups[1][kMaxGradNorm] = 0.5;
  groups[2][kClipPerParam] = 0.25;
  groups[3][kAgc] = 0.125;
  groups[4][kClipGradValue] = 0.5;
  for (Options& each : groups) each[kEmaDecay] = 0.75;
  Twins twins(rule, groups);
  for (int i = 0; i < 80; ++i)
    twins.add(kSizes[i % std::size(kSizes)] * (i % 7 == 0 ? 5 : 1), static_cast<Kind>(i % kOneByteOn), kDTypes[i % 8],
              i, kWithAverage);
  // More than 32 spans: norms are no rule's own, and totals are those of a row or of all.
  if (info.index == 0 || info.shared || info.name == std::string("lamb"))
    twins.add(kSpan * kTile * 33 + 5, kContiguous, kDTypes[0], 1, kWithAverage);
  twins.set_loss_scale(3);
  using enum Gradients;
  constexpr Gradients kLeft[] = {kKept, kZeroed, kUnscaled, kUnscaled, kKept, kUnscaled, kZeroed, kUnscaled};
  for (int step = 0; step < 8; ++step) {
    Control& control = twins.control = {};
    control.max_norm = step % 4 == 3 ? kUnset : 2;
    control.scale = step % 2 ? 0.5 : 1;
    control.norm = static_cast<Norm>(step % 3);
    control.measure = true;
    control.guard = step % 4 > 1;
    control.gradients = kLeft[step];
    for (size_t i = 0; i < twins.tensors.size(); ++i) {
      Tensor& t = twins.tensors[i];
      t.active = (i + step) % 5 != 0;
      Buffer& grad = t.operands[kGrad];
      for (int64_t at = 0; t.kind == kContiguous && at < t.numel; at += 3)
        grad.set(at, (step + 1.0) / static_cast<double>(at + 1));
      if (t.numel == 4099 && step > 5) grad.set(0, step == 6 ? NAN : INFINITY);
      twins.on_device[i].send(t, kGrad);
    }
    twins.step();
    twins.compare(std::string(rule) + " gradient path, step " + std::to_string(step));
  }
}

// A graph goes on doing what was captured, whatever steps are taken beside it; only options on the device change.
void test_graphs(const char* rule) {
  const RuleInfo& info = rule_info(rule);
  Twins twins(rule, {options_of(info, 0.1), options_of(info, 0.2)});
  for (int i = 0; i < 20; ++i) twins.add(kSizes[i % 6], static_cast<Kind>(i % kOneByteOn), kDTypes[i % 3], i);
  // Captured without a table from before, and with one.
  for (const bool warm : {false, true}) {
    const std::vector<Options> before = twins.groups;
    const std::vector<std::shared_ptr<void>> lr = {allocate(8), allocate(8)};
    const auto set_lr = [&](float a, double b) {
      copy(lr[0].get(), &a, sizeof a);
      copy(lr[1].get(), &b, sizeof b);
      twins.groups[0][0] = a;
      twins.groups[1][0] = b;
    };
    set_lr(0.25f, 0.3);
    twins.sources[0][0] = {lr[0].get(), k32};
    twins.sources[1][0] = {lr[1].get(), k64};
    if (warm) twins.step();
    cudaStream_t stream = nullptr;
    check(cudaStreamCreate(&stream));
    check(cudaDeviceSynchronize());
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    std::swap(twins.stream, stream);
    twins.capturing = true;
    const int64_t launches = twins.step_on_device();
    // A prologue, one for each of four kinds of rows, as many before those where the rule needs totals, and one more
    // where these are of all rows; two for factors in float, and in double. One more kind where some have factors.
    const int kinds = info.factored ? 6 : 4;
    CHECK(!warm || launches <= 1 + kinds + (info.totaled ? kinds : 0) + (info.shared ? 1 : 0) + (info.factored ? 4 : 0),
          launches);
    twins.capturing = false;
    std::swap(twins.stream, stream);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    check(cudaStreamEndCapture(stream, &graph));
    check(cudaGraphInstantiate(&executable, graph));
    twins.compare("captured, not run");
    const auto replay = [&](const char* when) {
      check(cudaGraphLaunch(executable, stream));
      twins.step_on_host();
      twins.compare(std::string(rule) + " replay " + when);
    };
    replay("at once");
    set_lr(0.5f, 0.0625);
    replay("with another lr");
    // A step beside it, with other gradients, options and rows at rest; then the graph again.
    const auto captured_groups = twins.groups;
    const auto captured_gradients = twins.on_device;
    twins.sources[0][0] = {};
    twins.groups[0][1] = 0.25;
    for (size_t i = 0; i < twins.tensors.size(); ++i) {
      if (i % 3 == 0) twins.tensors[i].active = false;
      twins.move(i, kGrad);
    }
    twins.step();
    twins.compare("beside the graph");
    for (Tensor& t : twins.tensors) t.active = true;
    twins.groups = captured_groups;
    replay("after another step");
    twins.step();
    twins.compare("after the graph");
    twins.groups = before;
    twins.sources.assign(2, {});
  }
}

}  // namespace

// test_cuda [rules | plans | few]: halves of it, or few cases, for checkers that are slow; else all.
int main(int count, char** arguments) {
  const std::string asked = count > 1 ? arguments[1] : "";
  if (asked != "plans") test_backend({run_on_device, {0}, kOneByteOn, asked == "few"});
  if (asked == "rules") return 0;
  for (const RuleInfo& info : rule_infos()) {
    test_changes(info.name);
    test_gradient_path(info.name);
    test_graphs(info.name);
  }
  if (asked != "few") test_launches();
}
