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
bool needs_totals(const Options& values) {
  if constexpr (kTotalsOf<Rule> > 0) return Rule::needs_totals(options_of<Rule>(values.data()));
  return false;
}

template <class Rule>
bool allows(const Options& values) {
  if constexpr (requires { Rule::allows; }) return Rule::allows(options_of<Rule>(values.data()));
  return true;
}

template <class Rule>
void settle(void* scalars, bool in_double, const double* totals, double count) {
  if constexpr (kTotalsOf<Rule> > 0 && kSharedOf<Rule> == 0) {
    if (in_double) {
      static_cast<Scalars<Rule, double>*>(scalars)->update.settle(totals, count);
    } else {
      static_cast<Scalars<Rule, float>*>(scalars)->update.settle(totals, count);
    }
  }
}

template <class Rule>
void settle_shared(void* scalars, bool in_double, const Options& values, const double* totals, double* shared) {
  if constexpr (kSharedOf<Rule> > 0) {
    const auto options = options_of<Rule>(values.data());
    if (in_double) {
      static_cast<Scalars<Rule, double>*>(scalars)->update.settle(options, totals, shared);
    } else {
      static_cast<Scalars<Rule, float>*>(scalars)->update.settle(options, totals, shared);
    }
  }
}

// Calls visit(update) with that of Scalars.
template <class Rule, class Visit>
double with_update(const void* scalars, bool in_double, Visit visit) {
  return in_double ? visit(static_cast<const Scalars<Rule, double>*>(scalars)->update)
                   : visit(static_cast<const Scalars<Rule, float>*>(scalars)->update);
}

template <class Rule>
double factor(const void* scalars, bool in_double, double state, double mean_square) {
  if constexpr (kFactorsOf<Rule> != 0)
    return with_update<Rule>(scalars, in_double, [=](const auto& update) -> double {
      return update.factor(static_cast<decltype(update.divisor(0))>(state), mean_square);
    });
  return 0;
}

template <class Rule>
double divisor(const void* scalars, bool in_double, double mean) {
  if constexpr (kFactorsOf<Rule> != 0)
    return with_update<Rule>(scalars, in_double, [=](const auto& update) -> double { return update.divisor(mean); });
  return 1;
}

template <class Rule>
RuleInfo describe(int index) {
  static_assert(std::size(Rule::kOptions) <= kMaxOptions && std::size(Rule::kStates) <= kMaxStates &&
                kRunningOf<Rule> <= kMaxRunning && kTotalsOf<Rule> <= kMaxTotals && kSharedOf<Rule> <= kMaxShared &&
                (kSharedOf<Rule> == 0 || (kTotalsOf<Rule> > 0 && kRunningOf<Rule> == 0)));
  unsigned structural = 0;
  int cautious = -1;
  unsigned totaled = 0;
  if constexpr (kTotalsOf<Rule> > 0) totaled = Rule::kTotaled;
  std::vector<OptionName> options;
  for (size_t i = 0; i < std::size(Rule::kOptions); ++i) {
    Options values{};
    values[i] = 1;
    if (used_states<Rule>(values) != used_states<Rule>({})) structural |= 1u << i;
    options.push_back(Rule::kOptions[i].name);
    if (options.back().words[0]) cautious = static_cast<int>(i);
  }
  std::vector<const char*> running;
  if constexpr (kRunningOf<Rule> > 0) running = {std::begin(Rule::kRunning), std::end(Rule::kRunning)};
  return {Rule::kName,
          index,
          std::is_same_v<Rule, Transfer>,
          Rule::kHasStep,
          {std::begin(Rule::kStates), std::end(Rule::kStates)},
          running,
          kSharedOf<Rule>,
          options,
          Rule::kSquares,
          kWeightsOf<Rule>,
          structural,
          cautious,
          kEpsOf<Rule>,
          kFactorsOf<Rule>,
          totaled,
          used_states<Rule>,
          [](const Options& values, double t, double* running, bool in_double, void* storage) {
            (in_double ? construct<Rule, double> : construct<Rule, float>)(values, t, running, storage);
          },
          needs_totals<Rule>,
          settle<Rule>,
          allows<Rule>,
          factor<Rule>,
          divisor<Rule>,
          settle_shared<Rule>};
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
