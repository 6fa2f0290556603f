// Rules as data: what Python and the plan need to know of them.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "../rules/all.h"

namespace genopt {

// A rule's own options, then the common ones.
using Options = std::array<double, kAllOptions>;

// Options of which none is set.
constexpr Options kNoOptions = [] {
  Options options{};
  for (int k = kMaxOptions; k < kAllOptions; ++k) options[k] = kUnset;
  options[kSeed] = 0;
  return options;
}();

// Room for any rule's Scalars.
constexpr int kScalarsBytes = 144;

struct RuleInfo {
  const char* name;
  int index;
  bool is_transfer;  // no optimizer's
  bool has_step;
  std::vector<const char*> states;
  std::vector<const char*> running;  // states that are one number each
  int shared;                        // how many numbers all rows share
  std::vector<OptionName> options;
  unsigned squares;     // states that are never negative, as a mask
  unsigned weights;     // states that are weights, as a mask
  unsigned structural;  // options that used_states depends on, as a mask
  int cautious;         // the option of that name; -1: there is none
  int eps;              // the option of which None is the epsilon of the parameter's dtype; -1: there is none
  unsigned factored;    // states that are factors, as a mask
  unsigned totaled;     // operands that a row's totals are made of, as a mask; 0: there are none
  unsigned (*used_states)(const Options&);
  // Builds the rule's Scalars for step count t in `storage`, and advances its running numbers; those that rows share
  // stay.
  void (*make_scalars)(const Options&, double t, double* running, bool in_double, void* storage);
  bool (*needs_totals)(const Options&);
  // Gives Scalars the totals of a row of `count` elements.
  void (*settle)(void* scalars, bool in_double, const double* totals, double count);
  bool (*allows)(const Options&);
  // Of a rule with factors: what a factor becomes, and a matrix' divisor.
  double (*factor)(const void* scalars, bool in_double, double state, double mean_square);
  double (*divisor)(const void* scalars, bool in_double, double mean);
  // Gives Scalars the totals of all rows, and advances the numbers that these share.
  void (*settle_shared)(void* scalars, bool in_double, const Options&, const double* totals, double* shared);
};

// Throws std::invalid_argument for a name that is no rule's.
const RuleInfo& rule_info(const std::string& name);
const std::vector<RuleInfo>& rule_infos();

}  // namespace genopt
