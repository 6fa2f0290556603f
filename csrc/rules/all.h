// The list of rules. A new optimizer adds its header and its name here.
#pragma once

#include <tuple>

#include "adadelta.h"
#include "adafactor.h"
#include "adagrad.h"
#include "adam.h"
#include "adamax.h"
#include "adamw_schedule_free.h"
#include "adan.h"
#include "ademamix.h"
#include "adopt.h"
#include "around.h"
#include "asgd.h"
#include "lamb.h"
#include "lars.h"
#include "lion.h"
#include "muon_momentum.h"
#include "muon_update.h"
#include "nadam.h"
#include "prodigy.h"
#include "radam.h"
#include "radam_schedule_free.h"
#include "rmsprop.h"
#include "rprop.h"
#include "sgd.h"
#include "sgd_schedule_free.h"
#include "stable_adamw.h"
#include "transfer.h"

namespace genopt {

using Rules = std::tuple<Adam, Sgd, RMSprop, Adagrad, Lion, Adamax, Adadelta, RAdam, Rprop, AdEMAMix, NAdam, Asgd,
                         Adopt, Adan, AdamWScheduleFree, SgdScheduleFree, RAdamScheduleFree, Lars, Lamb, StableAdamW,
                         Prodigy, Adafactor, MuonMomentum, MuonUpdate, Transfer>;

constexpr int kRules = static_cast<int>(std::tuple_size_v<Rules>);
constexpr int kMaxStates = 4;

// Calls visit.template operator()<Rule, index>() for every rule.
template <class Visit, int kIndex = 0>
void for_each_rule(Visit&& visit) {
  if constexpr (kIndex < kRules) {
    visit.template operator()<std::tuple_element_t<kIndex, Rules>, kIndex>();
    for_each_rule<Visit, kIndex + 1>(std::forward<Visit>(visit));
  }
}

}  // namespace genopt
