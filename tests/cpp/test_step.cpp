// The CPU backend on several threads, with the kernel table that GENOPT_CPU_CAPABILITY names: see step_cases.h.
#include "cpu/run.h"
#include "step_cases.h"

static void run(const RuleInfo& info, const std::vector<Options>& groups, std::vector<Tensor>& tensors, int steps,
                int threads) {
  Plan plan(info);
  plan.groups = groups;
  for (int step = 0; step < steps; ++step) {
    plan.rows.clear();
    for (Tensor& t : tensors) plan.rows.push_back(t.row(1));
    cpu::step(plan, threads);
    CHECK(plan.total_tiles() >= 3 * 128, plan.total_tiles());  // kTilesPerThread: all threads have work
  }
}

int main() {
  if (const char* wanted = std::getenv("GENOPT_CPU_CAPABILITY")) {
    bool found = false;
    for (const std::string& name : cpu::capabilities()) found = found || name == wanted;
    if (!found) return 77;  // this processor lacks it
    CHECK(cpu::capability() == wanted, wanted);
  }
  test_backend({run, {1, 2, 3}, kKinds});
}
