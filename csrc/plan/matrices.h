// The matrices that a tensor's last two dimensions make, for rules that know something of their rows and columns
// (rules/rule.h): how sums over these are divided. The order of additions is in csrc/README.md.
#pragma once

#include <cstdint>

#include "../math/numbers.h"
#include "tiles.h"

namespace genopt {

// Columns of a panel, and of rows that are added up together.
constexpr int kPanel = kTile, kRowsTogether = 32;

struct Matrices {
  int64_t count, rows, columns;

  GENOPT_INLINE int64_t panels() const {
    return (columns + kPanel - 1) / kPanel;
  }
  // Rows of a band: such that a large matrix has some 1000 pieces, each of a band and a panel.
  GENOPT_INLINE int64_t band() const {
    constexpr int64_t kRows = 64, kPieces = 1024;
    const int64_t times = (rows * panels() + kRows * kPieces - 1) / (kRows * kPieces);
    return kRows * (times > 0 ? times : 1);  // of nothing too
  }
  GENOPT_INLINE int64_t bands() const {
    return (rows + band() - 1) / band();
  }
};

}  // namespace genopt
