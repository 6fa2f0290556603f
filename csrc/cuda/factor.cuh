// Before totals and updates, for rules that know something of the rows and columns of matrices (rules/rule.h): the sums
// of squared gradients, and what a matrix' factors become by these. As cpu/factor.h. And for all kernels after that:
// what a lane's elements are given of their rows and columns.
#pragma once

#include "lane_operand.cuh"
#include "sums.cuh"

namespace genopt::cuda {

// A row's place in Table::factors(), in numbers of 8 bytes.
struct FactorColumns {
  void* divisors;       // [matrix], of what the rule computes in
  uint64_t* rows_done;  // [matrix], groups of rows of which the factors are known
  double* row_sums;     // [matrix][group of rows], of their factors
  double* across;       // [panel][row of any matrix], of squares
  double* down;         // [matrix][band][column], of squares
  int64_t row_groups, all_rows, bands;

  GENOPT_INLINE FactorColumns(const Table& table, const DeviceRow& row)
      : row_groups((row.matrices.rows + kRowsTogether - 1) / kRowsTogether),
        all_rows(row.matrices.count * row.matrices.rows),
        bands(row.matrices.bands()) {
    const Matrices& matrices = row.matrices;
    uint64_t* const words = table.words + table.factors() + row.factors_at;
    divisors = words;
    rows_done = words + matrices.count;
    row_sums = reinterpret_cast<double*>(rows_done + matrices.count);
    across = row_sums + matrices.count * row_groups;
    down = across + matrices.panels() * all_rows;
  }
};

// Whether a kernel that computes in T has to do with a row's factors in this step.
template <class T>
__device__ bool has_factors(const Table& table, const DeviceRow& row, int r) {
  return table.words[table.grad(r)] && !row.only_average && row.factors != 0 && row.numel != 0 && computes_in<T>(row);
}

// What a warp adds up the rows of a piece in, by lane: one more, so that lanes can each have a row of it at once.
using Squares = double[kWarps][kRowsTogether][kWarp + 1];

// The sum of what 32 lanes have.
__device__ inline double by_halves_of(const double* of_lanes) {
  double sums[kWarp / 2];
#pragma unroll
  for (int k = 0; k < kWarp / 2; ++k) sums[k] = of_lanes[k] + of_lanes[k + kWarp / 2];
#pragma unroll
  for (int bit = 3; bit >= 0; --bit)
#pragma unroll
    for (int k = 0; k < kWarp / 4; ++k)
      if (k < 1 << bit) sums[k] += sums[k + (1 << bit)];
  return sums[0];
}

// One warp, one band of a matrix in one panel.
template <class Rule, class T>
__global__ void __launch_bounds__(kThreads, 3) add_squares(const __grid_constant__ Table table) {
  constexpr int kColumns = kPanel / kWarp, kAtOnce = 4;  // of a lane; rows whose loads are under way
  __shared__ Squares all_squares;
  const int lane = lane_here();
  const int64_t number = warp_here();
  if (number >= table.pieces || (table.may_skip && table.words[Table::kSkip] != 0)) return;
  const int r = find_row(table.words + table.first_piece(0), table.rows, number, lane);
  const DeviceRow& row = *reinterpret_cast<const DeviceRow*>(table.words + table.row(r));
  if (!has_factors<T>(table, row, r)) return;
  const Matrices matrices = row.matrices;
  const FactorColumns columns(table, row);
  const int64_t panels = matrices.panels(), band = matrices.band();
  const int64_t piece = number - static_cast<int64_t>(table.words[table.first_piece(r)]);
  const int64_t strip = piece / panels, panel = piece % panels, matrix = strip / columns.bands;
  const int64_t first = strip % columns.bands * band,
                last = first + band < matrices.rows ? first + band : matrices.rows;
  const auto around = scalars_of<Scalars<Rule, T>>(table, row, r).around;
  const void* const gradient = reinterpret_cast<const void*>(table.words[table.grad(r)]);
  const uint64_t* const layout = table.words + table.layouts() + row.layout;
  const bool strided = row.strided >> kGrad & 1;
  double (*const squares)[kWarp + 1] = all_squares[threadIdx.x / kWarp];
  double down[kColumns] = {};
  const int64_t column = panel * kPanel + lane;
  if (first == 0 && panel == 0 && lane == 0) columns.rows_done[matrix] = 0;
  with_codec(row.dtype[kGrad], [&](auto codec) {
    using Codec = decltype(codec);
    const auto* const from = static_cast<const typename Codec::Stored*>(gradient);
#pragma unroll 1
    for (int64_t i = first; i < last; i += kRowsTogether) {
      const int some = last - i < kRowsTogether ? static_cast<int>(last - i) : kRowsTogether;
#pragma unroll 1
      for (int k = 0; k < some; k += kAtOnce) {
        typename Codec::Stored stored[kAtOnce][kColumns];
#pragma unroll
        for (int a = 0; a < kAtOnce; ++a) {
          const int64_t start = (matrix * matrices.rows + i + k + a) * matrices.columns;
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            const int64_t at = column + c * kWarp;
            stored[a][c] = {};
            if (k + a < some && at < matrices.columns)
              stored[a][c] = from[strided ? offset_of(layout, kGrad, start + at) : start + at];
          }
        }
#pragma unroll
        for (int a = 0; a < kAtOnce; ++a) {
          double sum = 0;
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            const double g = static_cast<double>(around.gradient(Codec::template decode<T>(stored[a][c])));
            const double square = k + a < some && column + c * kWarp < matrices.columns ? g * g : 0.0;
            sum += square;
            down[c] += square;
          }
          if (k + a < some) squares[k + a][lane] = sum;
        }
      }
      __syncwarp();
      if (lane < some)
        columns.across[panel * columns.all_rows + matrix * matrices.rows + i + lane] = by_halves_of(squares[lane]);
      __syncwarp();  // before the next rows take their place
    }
  });
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
    if (column + c * kWarp < matrices.columns) columns.down[strip * matrices.columns + column + c * kWarp] = down[c];
}

// Numbers [0, count) as LaneSums adds them up, by one lane.
template <class Number>
__device__ double join_alone(int64_t count, Number number) {
  double sums[kWarp];
#pragma unroll
  for (int k = 0; k < kWarp; ++k) sums[k] = k < count ? number(k) : 0;
#pragma unroll 1
  for (int64_t first = kWarp; first < count; first += kWarp) {
#pragma unroll
    for (int k = 0; k < kWarp; ++k)
      if (first + k < count) sums[k] += number(first + k);
  }
  return by_halves_of(sums);
}

// One warp, as many rows or columns of a matrix as it has lanes. The last of the matrix' rows also makes its divisor.
template <class Rule, class T>
__global__ void __launch_bounds__(kThreads, 2) renew_factors(const __grid_constant__ Table table) {
  using M = TotalOf<Rule>;
  __shared__ Places all_places;
  const int lane = lane_here();
  const int64_t number = warp_here();
  if (number >= table.factor_groups || (table.may_skip && table.words[Table::kSkip] != 0)) return;
  const int r = find_row(table.words + table.first_factor_group(0), table.rows, number, lane);
  const DeviceRow& row = *reinterpret_cast<const DeviceRow*>(table.words + table.row(r));
  if (!has_factors<T>(table, row, r)) return;
  const Matrices matrices = row.matrices;
  const FactorColumns columns(table, row);
  const auto& update = reinterpret_cast<const Scalars<Rule, T>*>(table.words + table.scalars(r))->update;
  const int64_t here = number - static_cast<int64_t>(table.words[table.first_factor_group(r)]);
  const int64_t groups = columns.row_groups + (matrices.columns + kWarp - 1) / kWarp;
  const int64_t matrix = here / groups, group = here % groups;
  if (group >= columns.row_groups) {
    const int64_t column = (group - columns.row_groups) * kWarp + lane;
    if (column >= matrices.columns) return;
    const double* const down = columns.down + matrix * columns.bands * matrices.columns + column;
    const double sum = join_alone(columns.bands, [&](int64_t b) { return down[b * matrices.columns]; });
    T& state = static_cast<T*>(row.data[row.factors + 1])[matrix * matrices.columns + column];
    state = update.factor(state, sum / static_cast<double>(matrices.rows));
    return;
  }
  const int64_t in_matrix = group * kRowsTogether + lane, at = matrix * matrices.rows + in_matrix;
  double* const places = all_places[threadIdx.x / kWarp];
  places[lane] = 0;
  if (in_matrix < matrices.rows) {
    const double sum =
        join_alone(matrices.panels(), [&](int64_t panel) { return columns.across[panel * columns.all_rows + at]; });
    T& state = static_cast<T*>(row.data[row.factors])[at];
    state = update.factor(state, sum / static_cast<double>(matrices.columns));
    places[lane] = static_cast<double>(state);
  }
  const double sum = by_halves<M>(places, lane);
  double* const sums = columns.row_sums + matrix * columns.row_groups;
  if (lane == 0) sums[group] = sum;
  if (!arrives_last(columns.rows_done + matrix, columns.row_groups, lane)) return;
  const double whole = join<M>(columns.row_groups, lane, places, [&](int64_t k) { return __ldcg(sums + k); });
  if (lane == 0) static_cast<T*>(columns.divisors)[matrix] = update.divisor(whole / static_cast<double>(matrices.rows));
}

// Of indices, which mostly have 32 bits: a division of 64 takes a hundred instructions.
__device__ inline int64_t quotient(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
}

// What elements of a tile are given of their rows and columns.
template <class T>
class TileFactors {
 public:
  __device__ TileFactors(const Table& table, const DeviceRow& row, const Tile& tile)
      : of_rows_(static_cast<const T*>(row.data[row.factors])),
        of_columns_(static_cast<const T*>(row.data[row.factors + 1])),
        divisors_(reinterpret_cast<const T*>(table.words + table.factors() + row.factors_at)),
        rows_(row.matrices.rows),
        columns_(row.matrices.columns),
        row_(quotient(tile.start, columns_)),
        column_(tile.start - row_ * columns_),
        matrix_(quotient(row_, rows_)) {
  }

  // Of the tile's element e. Mostly in the row of the one before.
  __device__ void find(int e, T& of_row, T& of_column) {
    int64_t column = column_ + e, row = row_;
    if (column >= columns_) {
      const int64_t further = quotient(column, columns_);
      column -= further * columns_;
      row += further;
    }
    if (row != known_) {
      const int64_t in_matrix = row - matrix_ * rows_;
      const int64_t matrix = matrix_ + (in_matrix < rows_ ? 0 : quotient(in_matrix, rows_));
      number_ = of_rows_[row] / divisors_[matrix];
      of_matrix_ = of_columns_ + matrix * columns_;
      known_ = row;
    }
    of_row = number_;
    of_column = of_matrix_[column];
  }

 private:
  const T *const of_rows_, *const of_columns_, *const divisors_;
  const int64_t rows_, columns_, row_, column_, matrix_;  // those of the tile's first element last
  int64_t known_ = -1;                                    // the row of the last one
  T number_ = 0;
  const T* of_matrix_ = nullptr;
};

// Those of a lane's elements. element(j): which of the tile's is its j-th.
template <class T, class Element>
__device__ void load_factors(T (&of_rows)[kElements], T (&of_columns)[kElements], const Table& table,
                             const DeviceRow& row, const Tile& tile, Element element) {
  TileFactors<T> factors(table, row, tile);
#pragma unroll
  for (int j = 0; j < kElements; ++j) {
    of_rows[j] = of_columns[j] = 0;
    if (const int e = element(j); e < tile.count) factors.find(e, of_rows[j], of_columns[j]);
  }
}

}  // namespace genopt::cuda
