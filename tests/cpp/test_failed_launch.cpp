// Steps of which a launch fails, on the CPU stand-in: one that fails before counters are advanced has not happened, and
// after one that fails later no step may pretend that nothing has.
#include <exception>
#include <string>

#include "on_device.h"

namespace {

struct Case {
  const RuleInfo& info;
  Tensor tensor{{k32, k32, k32}, 8, kContiguous, 1, info.used_states(options_of(info, 0.1)), 1.0, true, 0};
  OnDevice on_device{tensor};
  cuda::DevicePlan plan{info, kHost};

  explicit Case(const char* rule) : info(rule_info(rule)) {
  }

  // What is thrown, of a step of which so many launches succeed; below 0: all.
  std::string step(int launches) {
    Plan host(info);
    host.groups = {options_of(info, 0.1)};
    host.rows = {on_device.row(tensor, 0)};
    host.rows[0].active = true;
    cuda_on_cpu_launches_left = launches;
    std::string thrown;
    try {
      plan.step(host, std::vector<Sources>(1), {}, {nullptr, false, allocate});
    } catch (const std::exception& error) {
      thrown = error.what();
    }
    cuda_on_cpu_launches_left = -1;
    on_device.fetch(tensor);
    return thrown;
  }
};

bool has(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

int main() {
  Case early("adam");
  const float start = early.tensor.step;
  CHECK(early.step(-1).empty() && early.tensor.step == start + 1, "a step");
  CHECK(has(early.step(0), "launching a kernel failed") && early.tensor.step == start + 1, "no prologue");
  CHECK(early.step(-1).empty() && early.tensor.step == start + 2, "the next step");

  Case late("adam");
  const int launches = 2;  // of a first step, before its update: the table, then the prologue
  CHECK(has(late.step(launches), "launching a kernel failed") && late.tensor.step == start + 1, "no update");
  for (int i = 0; i < 2; ++i) CHECK(has(late.step(-1), "counters had been advanced"), "every later step");
  CHECK(late.tensor.step == start + 1, "refused steps");

  Case clip("transfer");  // which counts no steps, and whose plan all clips of a thread share
  CHECK(has(clip.step(launches), "launching a kernel failed") && clip.step(-1).empty(), "the next clip");
  return 0;
}
