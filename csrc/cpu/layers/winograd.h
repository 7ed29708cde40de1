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

  static inline void gradient(const Vector* y, Vector* u) {  // u = A y
    u[0] = y[0];
    u[1] = y[0] + y[1];
    u[2] = y[0] - y[1];
    u[3] = -y[1];
  }

  static inline void filter(const Vector* p, Vector* g) {  // g = G^T p
    const Vector half = vector_of(0.5f), s = half * (p[1] + p[2]);
    g[0] = p[0] + s;
    g[1] = half * (p[1] - p[2]);
    g[2] = s + p[3];
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

  static inline void gradient(const Vector* y, Vector* u) {
    const Vector two = vector_of(2.0f), four = vector_of(4.0f);
    const Vector s = y[0] + y[2], d = y[1] + y[3];
    const Vector t = vector_madd(four, y[2], y[0]), e = vector_madd(four, y[3], y[1]);
    u[0] = y[0];
    u[1] = s + d;
    u[2] = s - d;
    u[3] = vector_madd(two, e, t);
    u[4] = vector_madd(-two, e, t);
    u[5] = y[3];
  }

  static inline void filter(const Vector* p, Vector* g) {
    const Vector sixth = vector_of(1.0f / 6), twelfth = vector_of(1.0f / 12);
    const Vector s = p[1] + p[2], d = p[2] - p[1], t = p[3] + p[4], e = p[3] - p[4];
    g[0] = vector_madd(vector_of(0.25f), p[0], sixth * vector_madd(vector_of(0.25f), t, -s));
    g[1] = vector_madd(twelfth, e, sixth * d);
    g[2] = vector_madd(sixth, t - s, p[5]);
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

// What the gradient of a filter needs (y's derivative by g, read backwards): dg = G^T [sum over
// tiles of (A dy A^T) * (B^T d B)] G. So F(m x m, 3 x 3) turns into F(3 x 3, m x m) with the same
// points.

// A dy A^T of a tile of m x m pixels of y's gradient; as transform_input.
template <int m>
inline void transform_gradient(const float* dy, int64_t line, int64_t pixel, float* u,
                               int64_t plane) {
  constexpr int TILE = Winograd<m>::TILE;
  Vector half[m][TILE];  // half[j]: column j of A dy
#pragma GCC unroll 4
  for (int j = 0; j < m; ++j) {
    Vector y[m];
#pragma GCC unroll 4
    for (int i = 0; i < m; ++i) y[i] = load_vector(dy + i * line + j * pixel);
    Winograd<m>::gradient(y, half[j]);
  }
#pragma GCC unroll 6
  for (int i = 0; i < TILE; ++i) {
    Vector y[m], values[TILE];
#pragma GCC unroll 4
    for (int j = 0; j < m; ++j) y[j] = half[j][i];
    Winograd<m>::gradient(y, values);
#pragma GCC unroll 6
    for (int j = 0; j < TILE; ++j) store_vector(u + (i * TILE + j) * plane, values[j]);
  }
}

// G^T p G of the TILE^2 sums of products: tap (i, j) of the filter to g + (3 i + j) WIDTH.
template <int m>
inline void transform_filter(const float* p, int64_t plane, float* g) {
  constexpr int TILE = Winograd<m>::TILE;
  Vector half[TILE][3];  // half[j]: column j of G^T p
#pragma GCC unroll 6
  for (int j = 0; j < TILE; ++j) {
    Vector x[TILE];
#pragma GCC unroll 6
    for (int i = 0; i < TILE; ++i) x[i] = load_vector(p + (i * TILE + j) * plane);
    Winograd<m>::filter(x, half[j]);
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    Vector x[TILE], taps[3];
#pragma GCC unroll 6
    for (int j = 0; j < TILE; ++j) x[j] = half[j][i];
    Winograd<m>::filter(x, taps);
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) store_vector(g + (3 * i + j) * WIDTH, taps[j]);
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
