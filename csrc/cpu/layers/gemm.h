// Small matrix products in float32: A (m, k) by rows times a packed B (k, n).
//
// B is packed into panels of PANEL columns, [k][PANEL], the last one filled up with zeros. Every
// element of the result is one sum in the order of k, whatever the tile it falls into: its bits
// depend on its row of A and its column of B alone.
#pragma once
#include <cstddef>

#include "../../types.h"
#include "../simd.h"
#include "ahead.h"

namespace fastddpm {
namespace {

constexpr int64_t PANEL = 2 * WIDTH;  // columns of a register tile
constexpr int64_t STRIP = 6;          // its rows: 12 sums in flight hide the latency of the adds

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

inline int64_t packed_size(int64_t k, int64_t n) { return k * round_up(n, PANEL); }

// B[i][j] = b[i stride_k + j stride_n].
template <class T>
inline void pack(const T* b, int64_t k, int64_t n, int64_t stride_k, int64_t stride_n,
                 float* panels) {
  for (int64_t first = 0; first < n; first += PANEL, panels += k * PANEL) {
    const int64_t columns = n - first < PANEL ? n - first : PANEL;
    const T* source = b + first * stride_n;
    if (columns < PANEL)
      for (int64_t i = 0; i < k * PANEL; ++i) panels[i] = 0.0f;
    if (stride_n == 1)
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < columns; ++j)
          panels[i * PANEL + j] = to_float(source[i * stride_k + j]);
    else
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t i = 0; i < k; ++i)
          panels[i * PANEL + j] = to_float(source[i * stride_k + j * stride_n]);
  }
}

// sum += ROWS rows of A times `length` rows of a panel.
template <int ROWS>
inline void add_products(const float* const row[ROWS], int64_t length, const float* panel,
                         Ahead& ahead, Vector sum[ROWS][2]) {
  for (int64_t l = 0; l < length; ++l, panel += PANEL) {
    ahead.fetch();
    const Vector left = load_vector(panel), right = load_vector(panel + WIDTH);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      const Vector v = vector_of(row[i][l]);
      sum[i][0] = vector_madd(v, left, sum[i][0]);
      sum[i][1] = vector_madd(v, right, sum[i][1]);
    }
  }
}

// `strips` strips of ROWS rows, one after the other.
template <int ROWS>
inline void multiply_strips(const float* a, int64_t lda, const float* panel, int64_t k,
                            const float* bias, float* c, int64_t ldc, int64_t columns,
                            int64_t strips, Ahead& ahead) {
  for (; strips > 0; --strips, a += ROWS * lda, c += ROWS * ldc) {
    Vector sum[ROWS][2];
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < 2; ++j) sum[i][j] = bias ? load_vector(bias + j * WIDTH) : Vector{};
    const float* row[ROWS];
    for (int i = 0; i < ROWS; ++i) row[i] = a + i * lda;
    add_products<ROWS>(row, k, panel, ahead, sum);
    for (int i = 0; i < ROWS; ++i) {
      if (columns == PANEL) {
        store_vector(c + i * ldc, sum[i][0]);
        store_vector(c + i * ldc + WIDTH, sum[i][1]);
      } else {
        float values[PANEL];
        store_vector(values, sum[i][0]);
        store_vector(values + WIDTH, sum[i][1]);
        __builtin_memcpy(c + i * ldc, values, size_t(columns) * sizeof(float));
      }
    }
  }
}

// C (m, n) = A B + bias; bias: null, or one value per column up to the end of the last panel.
inline void multiply(const float* a, int64_t lda, const float* panels, int64_t m, int64_t k,
                     int64_t n, const float* bias, float* c, int64_t ldc) {
  using Strips = void (*)(const float*, int64_t, const float*, int64_t, const float*, float*,
                          int64_t, int64_t, int64_t, Ahead&);
  static constexpr Strips last[STRIP - 1] = {multiply_strips<1>, multiply_strips<2>,
                                             multiply_strips<3>, multiply_strips<4>,
                                             multiply_strips<5>};
  const int64_t whole = m / STRIP, done = whole * STRIP, rest = m - done;
  for (int64_t first = 0; first < n; first += PANEL, panels += k * PANEL) {
    const int64_t columns = n - first < PANEL ? n - first : PANEL;
    const float* offset = bias ? bias + first : nullptr;
    Ahead ahead(panels + k * PANEL, k * PANEL, (whole + (rest > 0)) * k);
    multiply_strips<STRIP>(a, lda, panels, k, offset, c + first, ldc, columns, whole, ahead);
    if (rest)
      last[rest - 1](a + done * lda, lda, panels, k, offset, c + done * ldc + first, ldc, columns,
                     1, ahead);
  }
}

template <int ROWS>
inline void add_transposed_strip(const float* a, int64_t lda, const float* panel, int64_t k,
                                 float* c, int64_t ldc, int64_t columns) {
  Vector sum[ROWS][2];
  for (int i = 0; i < ROWS; ++i) sum[i][0] = sum[i][1] = Vector{};
  for (int64_t l = 0; l < k; ++l) {
    const Vector left = load_vector(panel + l * PANEL);
    const Vector right = load_vector(panel + l * PANEL + WIDTH);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      const Vector x = vector_of(a[l * lda + i]);
      sum[i][0] = vector_madd(x, left, sum[i][0]);
      sum[i][1] = vector_madd(x, right, sum[i][1]);
    }
  }
  for (int i = 0; i < ROWS; ++i, c += ldc) {
    if (columns == PANEL) {
      store_vector(c, load_vector(c) + sum[i][0]);
      store_vector(c + WIDTH, load_vector(c + WIDTH) + sum[i][1]);
    } else {
      float values[PANEL];
      store_vector(values, sum[i][0]);
      store_vector(values + WIDTH, sum[i][1]);
      for (int64_t j = 0; j < columns; ++j) c[j] += values[j];
    }
  }
}

// C (m, n) += A^T B; a: (k, m) by rows.
inline void add_transposed(const float* a, int64_t lda, const float* panels, int64_t m, int64_t k,
                           int64_t n, float* c, int64_t ldc) {
  using Strip = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t, int64_t);
  static constexpr Strip strips[STRIP] = {add_transposed_strip<1>, add_transposed_strip<2>,
                                          add_transposed_strip<3>, add_transposed_strip<4>,
                                          add_transposed_strip<5>, add_transposed_strip<6>};
  for (int64_t first = 0; first < n; first += PANEL, panels += k * PANEL) {
    const int64_t columns = n - first < PANEL ? n - first : PANEL;
    for (int64_t i = 0; i < m; i += STRIP)
      strips[(m - i < STRIP ? m - i : STRIP) - 1](a + i, lda, panels, k, c + i * ldc + first, ldc,
                                                  columns);
  }
}

}  // namespace
}  // namespace fastddpm
