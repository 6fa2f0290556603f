// The columns of a step's table in which norms are made.
#pragma once

#include "table.h"

namespace genopt::cuda {

// Doubles, and one counter.
struct NormColumns {
  double* group_factors;               // [group]
  double *row_sums, *row_factors;      // [row]
  uint64_t* spans_done;                // [row]
  double *partials, *weight_partials;  // [span]

  GENOPT_INLINE explicit NormColumns(const Table& table) {
    group_factors = reinterpret_cast<double*>(table.words + table.norms());
    row_sums = group_factors + table.groups;
    row_factors = row_sums + table.rows;
    spans_done = reinterpret_cast<uint64_t*>(row_factors + table.rows);
    partials = row_factors + 2 * int64_t{table.rows};
    weight_partials = partials + table.norm_spans;
  }
};

}  // namespace genopt::cuda
