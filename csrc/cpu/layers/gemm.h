// Small matrix products in float32: A (m, k) by rows times a packed B (k, n).
//
// B is packed into panels of PANEL columns, [k][PANEL]. Where no more than MIN_PANEL columns are
// left for the last one it is that narrow; zeros fill it up. Every element of the result is one sum
// in the order of k, whatever the tile it falls into: its bits depend on its row of A and its
// column of B alone.
#pragma once
#include <cstddef>

#include "../../types.h"
#include "../simd.h"
#include "../sizes.h"
#include "ahead.h"
#include "transpose.h"

namespace fastddpm {
namespace {

// A register tile: rows, and vectors of columns. 32 registers hold 24 sums, whose four loads of B
// and six of A are few enough for the panel to come from the L2 cache; 16 hold 12, which hide the
// latency of the adds.
constexpr int64_t STRIP = 6;
constexpr int WIDE = WIDTH == 16 ? 4 : 2, SLIM = 2;
constexpr int64_t PACKED_AT_ONCE = 64;  // rows: they stay in the L1 cache
constexpr int64_t PANEL = WIDE * WIDTH, MIN_PANEL = SLIM * WIDTH;

// Columns of the panel that begins where `columns` are left.
inline int64_t panel_width(int64_t columns) { return columns > MIN_PANEL ? PANEL : MIN_PANEL; }

inline int64_t packed_columns(int64_t n) {
  const int64_t whole = n / PANEL * PANEL;
  return n > whole ? whole + panel_width(n - whole) : whole;
}

inline int64_t packed_size(int64_t k, int64_t n) { return k * packed_columns(n); }

// B[i][j] = b[i stride_k + j stride_n].
template <class T>
inline void pack(const T* b, int64_t k, int64_t n, int64_t stride_k, int64_t stride_n,
                 float* panels) {
  for (int64_t first = 0; first < n; first += PANEL, panels += k * PANEL) {
    const int64_t columns = n - first < PANEL ? n - first : PANEL, width = panel_width(columns);
    const T* source = b + first * stride_n;
    if (columns < width)
      for (int64_t i = 0; i < k * width; ++i) panels[i] = 0.0f;
    for (int64_t i = 0; i < k; i += PACKED_AT_ONCE)
      copy_transposed(source + i * stride_k, stride_n, stride_k,
                      k - i < PACKED_AT_ONCE ? k - i : PACKED_AT_ONCE, columns, panels + i * width,
                      width);
  }
}

// sum += ROWS rows of A times `length` rows of VECTORS of a panel that is `width` columns wide.
template <int ROWS, int VECTORS>
inline void add_products(const float* const row[ROWS], int64_t length, const float* panel,
                         int64_t width, Ahead& ahead, Vector sum[ROWS][VECTORS]) {
  for (int64_t l = 0; l < length; ++l, panel += width) {
    Vector right[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      if (j % 2 == 0) ahead.fetch();
      right[j] = load_vector(panel + j * WIDTH);
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      const Vector left = vector_of(row[i][l]);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = vector_madd(left, right[j], sum[i][j]);
    }
  }
}

template <int VECTORS>
inline void store_row(const Vector sum[VECTORS], int64_t columns, float* c) {
  if (columns == VECTORS * WIDTH) {
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) store_vector(c + j * WIDTH, sum[j]);
  } else {
    float values[VECTORS * WIDTH];
    for (int j = 0; j < VECTORS; ++j) store_vector(values + j * WIDTH, sum[j]);
    __builtin_memcpy(c, values, size_t(columns) * sizeof(float));
  }
}

// `strips` strips of ROWS rows, one after the other.
template <int ROWS, int VECTORS>
inline void multiply_strips(const float* a, int64_t lda, const float* panel, int64_t width,
                            int64_t k, const float* bias, float* c, int64_t ldc, int64_t columns,
                            int64_t strips, Ahead& ahead) {
  for (; strips > 0; --strips, a += ROWS * lda, c += ROWS * ldc) {
    Vector sum[ROWS][VECTORS];
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = bias ? load_vector(bias + j * WIDTH) : Vector{};
    const float* row[ROWS];
    for (int i = 0; i < ROWS; ++i) row[i] = a + i * lda;
    add_products<ROWS, VECTORS>(row, k, panel, width, ahead, sum);
    for (int i = 0; i < ROWS; ++i) store_row<VECTORS>(sum[i], columns, c + i * ldc);
  }
}

// For `calls` rows of VECTORS of a panel of k rows: what follows it.
template <int VECTORS>
inline Ahead ahead_of(const float* panel, int64_t k, int64_t width, int64_t calls) {
  return Ahead(panel + k * width, k * width, calls * (VECTORS / 2));
}

// All m rows times VECTORS of one panel; bias: null, or as many values.
template <int VECTORS>
inline void multiply_panel(const float* a, int64_t lda, const float* panel, int64_t width,
                           int64_t m, int64_t k, const float* bias, float* c, int64_t ldc,
                           int64_t columns) {
  using Strips = void (*)(const float*, int64_t, const float*, int64_t, int64_t, const float*,
                          float*, int64_t, int64_t, int64_t, Ahead&);
  static constexpr Strips last[STRIP - 1] = {
      multiply_strips<1, VECTORS>, multiply_strips<2, VECTORS>, multiply_strips<3, VECTORS>,
      multiply_strips<4, VECTORS>, multiply_strips<5, VECTORS>};
  const int64_t whole = m / STRIP, done = whole * STRIP, rest = m - done;
  Ahead ahead = ahead_of<VECTORS>(panel, k, width, (whole + (rest > 0)) * k);
  multiply_strips<STRIP, VECTORS>(a, lda, panel, width, k, bias, c, ldc, columns, whole, ahead);
  if (rest)
    last[rest - 1](a + done * lda, lda, panel, width, k, bias, c + done * ldc, ldc, columns, 1,
                   ahead);
}

// C (m, n) = A B + bias; bias: null, or one value per column up to the end of the last panel.
inline void multiply(const float* a, int64_t lda, const float* panels, int64_t m, int64_t k,
                     int64_t n, const float* bias, float* c, int64_t ldc) {
  for (int64_t first = 0; first < n; first += PANEL) {
    const int64_t columns = n - first < PANEL ? n - first : PANEL;
    const auto panel = columns > MIN_PANEL ? multiply_panel<WIDE> : multiply_panel<SLIM>;
    panel(a, lda, panels + first * k, panel_width(columns), m, k, bias ? bias + first : nullptr,
          c + first, ldc, columns);
  }
}

template <int ROWS, int VECTORS>
inline void add_transposed_strip(const float* a, int64_t lda, const float* panel, int64_t k,
                                 float* c, int64_t ldc, int64_t columns) {
  Vector sum[ROWS][VECTORS] = {};
  for (int64_t l = 0; l < k; ++l) {
    Vector right[VECTORS];
    for (int j = 0; j < VECTORS; ++j) right[j] = load_vector(panel + (l * VECTORS + j) * WIDTH);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      const Vector left = vector_of(a[l * lda + i]);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = vector_madd(left, right[j], sum[i][j]);
    }
  }
  for (int i = 0; i < ROWS; ++i, c += ldc) {
    if (columns == VECTORS * WIDTH) {
      for (int j = 0; j < VECTORS; ++j)
        store_vector(c + j * WIDTH, load_vector(c + j * WIDTH) + sum[i][j]);
    } else {
      float values[VECTORS * WIDTH];
      for (int j = 0; j < VECTORS; ++j) store_vector(values + j * WIDTH, sum[i][j]);
      for (int64_t j = 0; j < columns; ++j) c[j] += values[j];
    }
  }
}

template <int VECTORS>
inline void add_transposed_panel(const float* a, int64_t lda, const float* panel, int64_t m,
                                 int64_t k, float* c, int64_t ldc, int64_t columns) {
  using Strip = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t, int64_t);
  static constexpr Strip strips[STRIP] = {
      add_transposed_strip<1, VECTORS>, add_transposed_strip<2, VECTORS>,
      add_transposed_strip<3, VECTORS>, add_transposed_strip<4, VECTORS>,
      add_transposed_strip<5, VECTORS>, add_transposed_strip<6, VECTORS>};
  for (int64_t i = 0; i < m; i += STRIP)
    strips[(m - i < STRIP ? m - i : STRIP) - 1](a + i, lda, panel, k, c + i * ldc, ldc, columns);
}

// C (m, n) += A^T B; a: (k, m) by rows.
inline void add_transposed(const float* a, int64_t lda, const float* panels, int64_t m, int64_t k,
                           int64_t n, float* c, int64_t ldc) {
  for (int64_t first = 0; first < n; first += PANEL) {
    const int64_t columns = n - first < PANEL ? n - first : PANEL;
    const auto panel =
        columns > MIN_PANEL ? add_transposed_panel<WIDE> : add_transposed_panel<SLIM>;
    panel(a, lda, panels + first * k, m, k, c + first, ldc, columns);
  }
}

}  // namespace
}  // namespace fastddpm
