// What a Python dict held, compared without reading it where Python tells versions of dicts.
#pragma once

#include <torch/csrc/python_headers.h>

#include <cstdint>
#include <vector>

namespace genopt {

// A dict's content at one time: its version, or its entries where this Python tells no version.
class DictWitness {
 public:
#ifdef GENOPT_NO_DICT_VERSIONS
  static constexpr bool kHasVersions = false;
#else
  static constexpr bool kHasVersions = PY_VERSION_HEX < 0x030c0000;
#endif

  // dict: or null.
  void take(PyObject* dict) {
    dict_ = dict;
    if constexpr (kHasVersions) {
      version_ = dict ? version_of(dict) : 0;
    } else {
      entries_.clear();
      each_entry(dict, [this](const Entry& entry) {
        entries_.push_back(entry);
        return true;
      });
    }
  }

  // Whether `dict` is the same, and holds the same objects.
  bool holds(PyObject* dict) const {
    if (dict != dict_ || !dict) return dict == dict_;
    if constexpr (kHasVersions) return version_of(dict) == version_;
    if (PyDict_GET_SIZE(dict) != static_cast<Py_ssize_t>(entries_.size())) return false;
    auto expected = entries_.begin();
    return each_entry(dict, [&](const Entry& entry) { return entry == *expected++; });
  }

 private:
  // The type too: what was freed may have left its address to an object of another.
  struct Entry {
    PyObject *key, *value;
    PyTypeObject* type;
    bool operator==(const Entry&) const = default;
  };

  static uint64_t version_of(PyObject* dict) {
    if constexpr (kHasVersions) return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
    return 0;
  }

  // False: visit() was false of an entry.
  template <class Visit>
  static bool each_entry(PyObject* dict, Visit visit) {
    PyObject *key, *value;
    for (Py_ssize_t position = 0; dict && PyDict_Next(dict, &position, &key, &value);)
      if (!visit(Entry{key, value, Py_TYPE(value)})) return false;
    return true;
  }

  PyObject* dict_ = nullptr;
  uint64_t version_ = 0;
  std::vector<Entry> entries_;
};

}  // namespace genopt
