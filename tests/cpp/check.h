// CHECK(condition, case): stops the program with the place, the condition and the case.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <type_traits>

template <class What>
std::string text(const What& what) {
  if constexpr (std::is_arithmetic_v<What>) {
    return std::to_string(what);
  } else {
    return what;
  }
}

#define CHECK(condition, what)                                                                          \
  do {                                                                                                  \
    if (!(condition)) {                                                                                 \
      std::fprintf(stderr, "%s:%d: %s, case %s\n", __FILE__, __LINE__, #condition, text(what).c_str()); \
      std::exit(1);                                                                                     \
    }                                                                                                   \
  } while (false)
