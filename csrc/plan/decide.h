// What norms decide: a factor for the gradients of each group, or of each row where a group clips by tensor. Written
// once, for CPU (Plan::decide) and CUDA (cuda/norm.cu). genopt_ext/optim/apart.py decides likewise for rows on several
// devices.
#pragma once

#include "norm.h"

namespace genopt {

// A row's factor, in a group that clips by tensor. `scale`: the group's; `sum`, `weights`: of gradient and parameter.
GENOPT_INLINE double row_factor(Norm kind, const double* options, double scale, double sum, double weights) {
  return scale * tensor_coefficient(options, norm_of(kind, sum) * scale, norm_of(kind, weights));
}

// The factors of groups. A ledger has what was measured, and takes what is decided. All lanes of one call this; groups
// and rows are shared out among them, and only join() is done together.
//
//   lane, lanes, rows, groups      this lane, and how many there are of each
//   kind, scale, max_norm          which norm; of all gradients; the bound for groups that do not clip alone
//   is_told                        the coefficients of groups were decided elsewhere: scale_of() has them
//   join(first, count, number)     number(r) of so many rows, joined as LaneSums does
//   sum(r)                         of a row's gradient: norm_of() makes a norm of it
//   options(g), scale_of(g)        of a group
//   first_row(g)                   the group's first row; first_row(groups): the number of rows
//   some_clip_alone                groups have norms of their own
//   clips_alone(r)                 the row's group does
//   group_factor(g)                where factors go
//
// Returns the norm of all gradients, with their scale.
#pragma nv_exec_check_disable
template <class Ledger>
GENOPT_INLINE double decide(Ledger& ledger) {
  const auto sum = [&](int64_t r) { return ledger.sum(r); };
  const auto norm_over = [&](int64_t first, int64_t count, auto number) {
    return norm_of(ledger.kind, ledger.join(first, count, number)) * ledger.scale;
  };
  const double norm = norm_over(0, ledger.rows, sum);
  const double shared = !ledger.some_clip_alone ? norm : norm_over(0, ledger.rows, [&](int64_t r) {
    const double given = ledger.sum(r);
    return ledger.clips_alone(r) ? 0.0 : given;
  });
#pragma unroll 1
  for (int g = 0; g < ledger.groups; ++g) {
    const bool is_mine = g % ledger.lanes == ledger.lane;
    if (!is_mine && !ledger.some_clip_alone) continue;
    const auto& options = ledger.options(g);
    const int64_t first = ledger.first_row(g);
    const double own = options[kMaxGradNorm] >= 0 ? norm_over(first, ledger.first_row(g + 1) - first, sum) : 0;
    if (!is_mine) continue;
    ledger.group_factor(g) =
        ledger.scale_of(g) * (ledger.is_told ? 1 : group_coefficient(options.data(), ledger.max_norm, own, shared));
  }
  return norm;
}

}  // namespace genopt
