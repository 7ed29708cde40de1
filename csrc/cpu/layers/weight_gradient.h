// What the algorithms of a weight gradient share: sums of products of channels, a matrix for each
// point (a tap of the filter, or a point of Winograd's), and how they become dweight.
//
// The side with fewer rows to fill lends the rows: mostly grad's channels, for which x's are the
// columns. Each element of a matrix is summed over runs of DEPTH tiles (or pixels), and the runs in
// their order.
#pragma once
#include "../isa.h"
#include "../parallel.h"
#include "gemm.h"
#include "place.h"
#include "winograd.h"

namespace fastddpm {
namespace {

constexpr int64_t power_below(int64_t x) { return x < 2 ? 1 : 2 * power_below(x / 2); }

constexpr int64_t ROWS = power_below(STRIP) < WIDTH ? power_below(STRIP) : WIDTH;  // of a strip
constexpr int64_t DEPTH = 128;
constexpr int64_t PAD = 16;  // matrices are a cache line further apart than a power of two

static_assert(WIDTH % ROWS == 0, "whole strips");

// Matrices of (rows, columns) in panels of columns, [point][panel][row][column].
struct Sums {
  int64_t points, rows, columns;
  bool columns_of_x;
  int64_t strips, plane;  // of ROWS rows; floats from one matrix to the next

  Sums(int64_t points, int64_t c_in, int64_t c_out) : points(points) {
    const auto area = [](int64_t a, int64_t b) { return round_up(a, ROWS) * packed_columns(b); };
    columns_of_x = area(c_out, c_in) <= area(c_in, c_out);
    rows = columns_of_x ? c_out : c_in, columns = columns_of_x ? c_in : c_out;
    strips = ceil_div(rows, ROWS);
    plane = strips * ROWS * packed_columns(columns) + PAD;
  }

  int64_t size() const { return points * plane; }

  int64_t panels() const { return ceil_div(columns, PANEL); }

  int64_t at(int64_t point, int64_t row, int64_t column) const {
    const int64_t panel = column / PANEL * PANEL, width = panel_width(columns - panel);
    return point * plane + panel * strips * ROWS + row * width + column % PANEL;
  }
};

// Stands at the beginning of the workspace; the sums follow it, then what an algorithm needs.
struct State {
  int64_t waiting;  // tiles that the sums do not hold yet
  int64_t summed;   // whether the sums hold any
};

inline State state_of(const float* workspace) {
  State state;
  __builtin_memcpy(&state, workspace, sizeof state);
  return state;
}

inline void set_state(float* workspace, State state) {
  __builtin_memcpy(workspace, &state, sizeof state);
}

inline float* sums_of(float* workspace) { return workspace + PAD; }

// sums (ROWS, VECTORS WIDTH) = or += `count` tiles of ROWS channels of a times those of a panel of
// b.
template <int VECTORS, bool FIRST>
inline void add_strip(const float* a, const float* b, int64_t count, float* sums) {
  constexpr int64_t COLUMNS = VECTORS * WIDTH;
  for (int64_t i = 0; i < ROWS * VECTORS; ++i)
    __builtin_prefetch(sums + ROWS * COLUMNS + i * WIDTH, 1);
  Vector sum[ROWS][VECTORS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = Vector{};
  for (int64_t tile = 0; tile < count; ++tile, a += WIDTH, b += PANEL) {
    Vector right[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) right[j] = load_vector(b + j * WIDTH);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Vector left = vector_of(a[i]);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = vector_madd(left, right[j], sum[i][j]);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) {
      float* at = sums + i * COLUMNS + j * WIDTH;
      store_vector(at, FIRST ? sum[i][j] : load_vector(at) + sum[i][j]);
    }
}

// Where the taps of rows' and columns' channels go.
struct Filters {
  float* data;
  int64_t row, column, down, right;  // strides

  Filters(const WeightGradient& op, bool columns_of_x)
      : data(op.dweight),
        row(op.stride[columns_of_x ? 0 : 1]),
        column(op.stride[columns_of_x ? 1 : 0]),
        down(op.stride[2]),
        right(op.stride[3]) {}

  // `count` columns from `c` on of one row: taps[tap][WIDTH].
  template <int kernel>
  void store(int64_t r, int64_t c, int64_t count, const float* taps) const {
    float* out = data + r * row + c * column;
    if (column == 1 && count == WIDTH) {
      for (int tap = 0; tap < kernel * kernel; ++tap)
        store_vector(out + tap / kernel * down + tap % kernel * right,
                     load_vector(taps + tap * WIDTH));
      return;
    }
    for (int64_t j = 0; j < count; ++j, out += column)
      for (int tap = 0; tap < kernel * kernel; ++tap)
        out[tap / kernel * down + tap % kernel * right] = taps[tap * WIDTH + j];
  }
};

// dweight = G^T sums G for Winograd's F(3x3, m x m), the sums themselves for m = 1.
template <int m, int kernel>
inline void write_filters(const WeightGradient& op, const Sums& sums, const float* workspace,
                          int threads) {
  const Filters filters(op, sums.columns_of_x);
  const bool empty = !state_of(workspace).summed;  // no image came
  const int64_t work = sums.points * sums.rows * sums.columns;
  parallel_for(sums.panels() * sums.strips, work, threads, [&](int64_t job, int) {
    const int64_t begin = job / sums.strips * PANEL, first = job % sums.strips * ROWS;
    const int64_t end = least(begin + PANEL, sums.columns);
    for (int64_t row = first; row < least(first + ROWS, sums.rows); ++row)
      for (int64_t column = begin; column < end; column += WIDTH) {
        float taps[kernel * kernel * WIDTH] = {};
        const float* from = workspace + PAD + sums.at(0, row, column);
        if constexpr (m > 1) {
          if (!empty) transform_filter<m>(from, sums.plane, taps);
        } else {
          for (int tap = 0; tap < kernel * kernel && !empty; ++tap)
            store_vector(taps + tap * WIDTH, load_vector(from + tap * sums.plane));
        }
        filters.store<kernel>(row, column, least(end - column, WIDTH), taps);
      }
  });
}

}  // namespace
}  // namespace fastddpm
