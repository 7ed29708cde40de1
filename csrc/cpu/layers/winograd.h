// Winograd's minimal filtering F(m x m, 3 x 3), m = 2 or 4 (Lavin and Gray 2016): the transforms of
// one tile, for a vector of channels at a time, and of the weights. No products between channels.
//
// y = A^T [(G g G^T) * (B^T d B)] A with the points 0, 1, -1, infinity for m = 2, and 2, -2 beside
// them for m = 4. In float32 the result errs about as much as the sum as it is written for m = 2,
// and about 4 times as much for m = 4.
#pragma once
#include "../simd.h"

namespace fastddpm {
namespace {

template <int m>
struct Winograd;

template <>
struct Winograd<2> {
  static constexpr int TILE = 4;

  static inline void weight(const Doubles* g, Doubles* u) {  // u = G g
    const Doubles even = 0.5 * (g[0] + g[2]), odd = 0.5 * g[1];
    u[0] = g[0];
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = g[2];
  }

  static inline void input(const Vector* d, Vector* v) {  // v = B^T d
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }

  static inline void output(const Vector* p, Vector* y) {  // y = A^T p
    y[0] = p[0] + (p[1] + p[2]);
    y[1] = (p[1] - p[2]) - p[3];
  }
};

template <>
struct Winograd<4> {
  static constexpr int TILE = 6;

  static inline void weight(const Doubles* g, Doubles* u) {
    const Doubles even = -1. / 6 * (g[0] + g[2]), odd = 1. / 6 * g[1];
    const Doubles far = 1. / 24 * g[0] + 1. / 6 * g[2], half = 1. / 12 * g[1];
    u[0] = 0.25 * g[0];
    u[1] = even - odd;
    u[2] = even + odd;
    u[3] = far + half;
    u[4] = far - half;
    u[5] = g[2];
  }

  static inline void input(const Vector* d, Vector* v) {
    const Vector four = vector_of(4.0f), minus_five = vector_of(-5.0f);
    const Vector a = vector_madd(-four, d[2], d[4]), b = vector_madd(-four, d[1], d[3]);
    const Vector c = d[4] - d[2], e = vector_of(2.0f) * (d[3] - d[1]);
    v[0] = vector_madd(four, d[0], vector_madd(minus_five, d[2], d[4]));
    v[1] = a + b;
    v[2] = a - b;
    v[3] = c + e;
    v[4] = c - e;
    v[5] = vector_madd(four, d[1], vector_madd(minus_five, d[3], d[5]));
  }

  static inline void output(const Vector* p, Vector* y) {
    const Vector s = p[1] + p[2], d = p[1] - p[2], t = p[3] + p[4], e = p[3] - p[4];
    y[0] = (p[0] + s) + t;
    y[1] = vector_madd(vector_of(2.0f), e, d);
    y[2] = vector_madd(vector_of(4.0f), t, s);
    y[3] = vector_madd(vector_of(8.0f), e, d) + p[5];
  }
};

// B^T d B of a tile of pixels: rows `line` floats apart, pixels `pixel`. Value p of the TILE^2 goes
// to v + p plane.
template <int m>
inline void transform_input(const float* d, int64_t line, int64_t pixel, float* v, int64_t plane) {
  constexpr int TILE = Winograd<m>::TILE;
  Vector half[TILE][TILE];  // half[j]: column j of B^T d
#pragma GCC unroll 6
  for (int j = 0; j < TILE; ++j) {
    Vector x[TILE];
#pragma GCC unroll 6
    for (int i = 0; i < TILE; ++i) x[i] = load_vector(d + i * line + j * pixel);
    Winograd<m>::input(x, half[j]);
  }
#pragma GCC unroll 6
  for (int i = 0; i < TILE; ++i) {
    Vector x[TILE], values[TILE];
#pragma GCC unroll 6
    for (int j = 0; j < TILE; ++j) x[j] = half[j][i];
    Winograd<m>::input(x, values);
#pragma GCC unroll 6
    for (int j = 0; j < TILE; ++j) store_vector(v + (i * TILE + j) * plane, values[j]);
  }
}

// A^T p A of the TILE^2 products of a tile: store(i, j, y[i][j]) for all i, j < m.
template <int m, class Store>
inline void transform_output(const float* p, int64_t plane, const Store& store) {
  constexpr int TILE = Winograd<m>::TILE;
  Vector half[TILE][m];  // half[j]: column j of A^T p
#pragma GCC unroll 6
  for (int j = 0; j < TILE; ++j) {
    Vector x[TILE];
#pragma GCC unroll 6
    for (int i = 0; i < TILE; ++i) x[i] = load_vector(p + (i * TILE + j) * plane);
    Winograd<m>::output(x, half[j]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < m; ++i) {
    Vector x[TILE], y[m];
#pragma GCC unroll 6
    for (int j = 0; j < TILE; ++j) x[j] = half[j][i];
    Winograd<m>::output(x, y);
#pragma GCC unroll 4
    for (int j = 0; j < m; ++j) store(i, j, y[j]);
  }
}

// G g G^T of HALF_WIDTH 3x3 filters, in float64 and rounded once. Tap t of them lies at g + t
// plane, value p of the TILE^2 goes to u + p u_plane.
template <int m>
inline void transform_weight(const float* g, int64_t plane, float* u, int64_t u_plane) {
  constexpr int TILE = Winograd<m>::TILE;
  Doubles half[3][TILE];  // half[b]: column b of G g
#pragma GCC unroll 3
  for (int b = 0; b < 3; ++b) {
    const Doubles column[3] = {load_doubles(g + b * plane), load_doubles(g + (3 + b) * plane),
                               load_doubles(g + (6 + b) * plane)};
    Winograd<m>::weight(column, half[b]);
  }
#pragma GCC unroll 6
  for (int i = 0; i < TILE; ++i) {
    const Doubles row[3] = {half[0][i], half[1][i], half[2][i]};
    Doubles values[TILE];
    Winograd<m>::weight(row, values);
#pragma GCC unroll 6
    for (int j = 0; j < TILE; ++j) store_doubles(u + (i * TILE + j) * u_plane, values[j]);
  }
}

}  // namespace
}  // namespace fastddpm
