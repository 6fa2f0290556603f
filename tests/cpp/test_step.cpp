// The CPU backend on several threads, with the kernel table that GENOPT_CPU_CAPABILITY names: see step_cases.h.
#include "cpu/run.h"
#include "step_cases.h"

static void run(const RuleInfo& info, const std::vector<Options>& groups, std::vector<Tensor>& tensors, int steps,
                int threads) {
  Plan plan(info);
  plan.groups = groups;
  std::array<double, kMaxShared> shared = kSharedAtFirst;
  plan.shared = shared.data();
  for (int step = 0; step < steps; ++step) {
    plan.rows.clear();
    for (Tensor& t : tensors) plan.rows.push_back(t.row(1));
    cpu::step(plan, threads);
    CHECK(plan.total_tiles() >= 3 * 128, plan.total_tiles());  // kTilesPerThread: all threads have work
  }
}

// Tiles that lie beyond 2^32 elements, of a tensor that has no memory before them, against the first tiles of another.
static void test_far_tiles() {
  constexpr int64_t kFar = int64_t{1} << 32, kCount = 2 * kTile - 5, kColumns = 256, kStride = 300;
  const KernelTable& kernels = cpu::kernel_table();
  const RuleInfo& info = rule_info("sgd");
  Options options = kNoOptions;
  options[0] = 0.25, options[1] = 0.75;  // lr, momentum
  for (const auto& dtypes : kDTypes)
    for (const bool strided : {false, true}) {
      std::vector<unsigned char> bytes[2][kState + 1];
      double norms[2];
      for (const bool far : {false, true}) {
        const int64_t start = far ? kFar : 0;
        Layout layout;
        layout.sizes = {(start + kCount) / kColumns + 1, kColumns};
        Row row;
        row.numel = start + kCount;
        row.used = 1;
        row.layout = strided ? &layout : nullptr;
        for (int k = 0; k <= kState; ++k) {
          Buffer buffer;
          row.dtype[k] = buffer.dtype = dtypes[k];
          const bool skips = strided && k == kGrad;
          buffer.bytes.resize((skips ? 2 * kStride : kCount) * size_of(dtypes[k]));
          for (int64_t i = 0; i < kCount; ++i)
            buffer.set(skips ? i / kColumns * kStride + i % kColumns : i, 1 + i % 7 + k);
          if (skips) layout.strides[k] = {kStride, 1};
          bytes[far][k] = std::move(buffer.bytes);
          const int64_t before = skips ? start / kColumns * kStride : start;
          row.data[k] = bytes[far][k].data() - before * size_of(dtypes[k]);
        }
        const bool in_double = dtypes[kParam] == k64;
        alignas(16) unsigned char scalars[kScalarsBytes];
        std::array<double, kMaxRunning> running{1, 1};
        info.make_scalars(options, 1, running.data(), in_double, scalars);
        norms[far] = widened(kernels.spans[0][in_double](row, kGrad, start / (kTile * kSpan))).value(Norm::kTwo);
        kernels.tiles[info.index][row.used][in_double](scalars, row, start / kTile, start / kTile + 2);
        Control control;
        control.gradients = Gradients::kZeroed;
        kernels.leave_gradient(row, control, start / kTile, start / kTile + 1);
        control.gradients = Gradients::kUnscaled;
        control.unscale = 0.25;
        kernels.leave_gradient(row, control, start / kTile + 1, start / kTile + 2);
      }
      const std::string name = std::to_string(static_cast<int>(dtypes[kParam])) + (strided ? " strided" : "");
      CHECK(norms[0] == norms[1] && norms[0] > 0, name);
      for (int k = 0; k <= kState; ++k) CHECK(bytes[0][k] == bytes[1][k], name);
    }
}

int main() {
  if (const char* wanted = std::getenv("GENOPT_CPU_CAPABILITY")) {
    bool found = false;
    for (const std::string& name : cpu::capabilities()) found = found || name == wanted;
    if (!found) return 77;  // this processor lacks it
    CHECK(cpu::capability() == wanted, wanted);
  }
  test_far_tiles();
  test_backend({run, {1, 2, 3}, kKinds});
}
