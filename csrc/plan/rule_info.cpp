// See rule_info.h.
#include "rule_info.h"

#include <cstring>
#include <iterator>
#include <new>
#include <stdexcept>

namespace genopt {
namespace {

template <class Rule>
typename Rule::Options options_of(const Options& values) {
  static_assert(std::size(Rule::kOptions) <= kMaxOptions && std::size(Rule::kStates) <= kMaxStates);
  typename Rule::Options options;
  std::memcpy(&options, values.data(), sizeof options);
  return options;
}

template <class Rule, class T>
void construct(const Options& values, double t, void* storage) {
  using Made = Scalars<Rule, T>;
  static_assert(sizeof(Made) <= kScalarsBytes && alignof(Made) <= 16);
  new (storage) Made(values.data(), t);
}

template <class Rule>
unsigned used_states(const Options& values) {
  return Rule::used_states(options_of<Rule>(values));
}

template <class Rule>
RuleInfo describe(int index) {
  unsigned structural = 0;
  for (size_t i = 0; i < std::size(Rule::kOptions); ++i) {
    Options values{};
    values[i] = 1;
    if (used_states<Rule>(values) != used_states<Rule>({})) structural |= 1u << i;
  }
  return {Rule::kName,
          index,
          Rule::kHasStep,
          {std::begin(Rule::kStates), std::end(Rule::kStates)},
          {std::begin(Rule::kOptions), std::end(Rule::kOptions)},
          Rule::kSquares,
          structural,
          used_states<Rule>,
          [](const Options& values, double t, bool in_double, void* storage) {
            (in_double ? construct<Rule, double> : construct<Rule, float>)(values, t, storage);
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
