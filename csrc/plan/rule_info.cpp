// See rule_info.h.
#include "rule_info.h"

#include <cstring>
#include <iterator>
#include <new>
#include <stdexcept>

namespace genopt {
namespace {

template <class Rule, class T>
void construct(const Options& values, double t, double* running, void* storage) {
  using Made = Scalars<Rule, T>;
  static_assert(sizeof(Made) <= kScalarsBytes && alignof(Made) <= 16);
  new (storage) Made(values.data(), t, running);
}

template <class Rule>
unsigned used_states(const Options& values) {
  return Rule::used_states(options_of<Rule>(values.data()));
}

template <class Rule>
RuleInfo describe(int index) {
  static_assert(std::size(Rule::kOptions) <= kMaxOptions && std::size(Rule::kStates) <= kMaxStates &&
                kRunningOf<Rule> <= kMaxRunning);
  unsigned structural = 0;
  int cautious = -1;
  std::vector<OptionName> options;
  for (size_t i = 0; i < std::size(Rule::kOptions); ++i) {
    Options values{};
    values[i] = 1;
    if (used_states<Rule>(values) != used_states<Rule>({})) structural |= 1u << i;
    options.push_back(Rule::kOptions[i].name);
    if (options.back().word) cautious = static_cast<int>(i);
  }
  std::vector<const char*> running;
  if constexpr (kRunningOf<Rule> > 0) running = {std::begin(Rule::kRunning), std::end(Rule::kRunning)};
  return {Rule::kName,
          index,
          std::is_same_v<Rule, Transfer>,
          Rule::kHasStep,
          {std::begin(Rule::kStates), std::end(Rule::kStates)},
          running,
          options,
          Rule::kSquares,
          structural,
          cautious,
          used_states<Rule>,
          [](const Options& values, double t, double* running, bool in_double, void* storage) {
            (in_double ? construct<Rule, double> : construct<Rule, float>)(values, t, running, storage);
          }};
}

}  // namespace

const std::vector<RuleInfo>& rule_infos() {
  static const std::vector<RuleInfo> infos = [] {
    std::vector<RuleInfo> list;
    for_each_rule([&]<class Rule, int kIndex>() { list.push_back(describe<Rule>(kIndex)); });
    return list;
  }();
  return infos;
}

const RuleInfo& rule_info(const std::string& name) {
  for (const RuleInfo& info : rule_infos())
    if (name == info.name) return info;
  throw std::invalid_argument("genopt_ext has no rule named '" + name + "'");
}

}  // namespace genopt
