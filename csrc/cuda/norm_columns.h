// The columns of a step's table in which norms, and the totals that a rule needs, are made.
#pragma once

#include "table.h"

namespace genopt::cuda {

// A span's sum in two words: the bin takes the low bits of both.
struct PackedSum {
  double words[2];
};

struct NormColumns {
  double* group_factors;                  // [group]
  double *row_sums, *row_factors;         // [row]
  uint64_t* spans_done;                   // [row]
  PackedSum *partials, *weight_partials;  // [span]

  GENOPT_INLINE explicit NormColumns(const Table& table) {
    group_factors = reinterpret_cast<double*>(table.words + table.norms());
    row_sums = group_factors + table.groups;
    row_factors = row_sums + table.rows;
    spans_done = reinterpret_cast<uint64_t*>(row_factors + table.rows);
    partials = reinterpret_cast<PackedSum*>(row_factors + 2 * int64_t{table.rows});
    weight_partials = partials + table.norm_spans;
  }
};

struct TotalColumns {
  uint64_t* spans_done;  // [row]
  double* rows_sums;     // [total][row], where the rule needs totals of all rows together
  PackedSum* partials;   // [total][span]
  int64_t rows, spans;

  GENOPT_INLINE explicit TotalColumns(const Table& table) : rows(table.rows), spans(table.total_spans) {
    spans_done = table.words + table.totals();
    rows_sums = reinterpret_cast<double*>(spans_done + rows);
    partials = reinterpret_cast<PackedSum*>(rows_sums + kMaxTotals * rows);
  }
  GENOPT_INLINE PackedSum* of(int total) const {
    return partials + total * spans;
  }
  GENOPT_INLINE double* of_rows(int total) const {
    return rows_sums + total * rows;
  }
};

}  // namespace genopt::cuda
