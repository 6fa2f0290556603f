// The keys of a state dict: which of a row's tensors each one names, and in which form.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "../plan/rule_info.h"
#include "objects.h"

namespace genopt {

// A form that an entry may have: it counts where the group asks for it.
enum class Form : uint8_t { kAny, kNumbers, kCodes, kCompensation, kMaster };

struct StateKey {
  PyObject* name;
  int handle;
  Form form;
};

class StateKeys {
 public:
  explicit StateKeys(const RuleInfo& rule) {
    const int states = static_cast<int>(rule.states.size());
    for (int i = 0; i < states; ++i) add(rule.states[i], kState + i, Form::kNumbers);
    add("step", kStepHandle, Form::kAny);
    for (size_t i = 0; i < rule.running.size(); ++i)
      add(rule.running[i], kFirstRunning + static_cast<int>(i), Form::kAny);
    add("ema", kAverage, Form::kNumbers);
    for (int i = 0; i < states; ++i) {
      add(std::string(rule.states[i]) + "_codes", kState + i, Form::kCodes);
      add(std::string(rule.states[i]) + "_scales", kFirstScales + i, Form::kAny);
    }
    add("compensation", kExtra, Form::kCompensation);
    add("master", kExtra, Form::kMaster);
  }

  // The name of a handle in the given form. Of a number or scales, whatever the form.
  PyObject* name(int handle, Form form = Form::kNumbers) const {
    for (const StateKey& key : keys_)
      if (key.handle == handle && (key.form == form || key.form == Form::kAny)) return key.name;
    throw std::logic_error("a state without a name");
  }

  // What `key` names, or null. Keys are mostly the interned ones.
  const StateKey* find(PyObject* key) const {
    for (const bool by_value : {false, true})
      for (const StateKey& wanted : keys_)
        if (by_value ? PyUnicode_Check(key) && PyUnicode_Compare(key, wanted.name) == 0 : key == wanted.name)
          return &wanted;
    return nullptr;
  }

 private:
  // Names are interned and never freed.
  void add(const std::string& name, int handle, Form form) {
    keys_.push_back({PyUnicode_InternFromString(name.c_str()), handle, form});
  }

  std::vector<StateKey> keys_;
};

}  // namespace genopt
