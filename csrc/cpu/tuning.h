// What is chosen for the processor at hand, and changes no bits. Set by run.cpp before the first kernel runs.
#pragma once

namespace genopt::cpu {

struct Tuning {
  // How many tiles ahead of the one that is stepped memory is prefetched; 0: that is left to the processor.
  int prefetch = 0;
  // Likewise, of what is only read: norms.
  int norm = 0;
};
inline Tuning tuning;

}  // namespace genopt::cpu
