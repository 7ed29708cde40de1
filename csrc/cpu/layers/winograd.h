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

// F d F^T of a tile for a matrix F: f(x, y) is y = F x, of IN values OUT; columns first. d[i][j] is
// load(i, j); store(i, j, value) gets the OUT^2 results.
template <int IN, int OUT, class V, class F, class Load, class Store>
__attribute__((always_inline)) inline void transform(const F& f, const Load& load,
                                                     const Store& store) {
  V half[IN][OUT];  // half[j]: column j of F d
#pragma GCC unroll 6
  for (int j = 0; j < IN; ++j) {
    V x[IN];
#pragma GCC unroll 6
    for (int i = 0; i < IN; ++i) x[i] = load(i, j);
    f(x, half[j]);
  }
#pragma GCC unroll 6
  for (int i = 0; i < OUT; ++i) {
    V x[IN], y[OUT];
#pragma GCC unroll 6
    for (int j = 0; j < IN; ++j) x[j] = half[j][i];
    f(x, y);
#pragma GCC unroll 6
    for (int j = 0; j < OUT; ++j) store(i, j, y[j]);
  }
}

// B^T d B of a tile of pixels: rows `line` floats apart, pixels `pixel`. Value p of the TILE^2 goes
// to v + p plane.
template <int m>
inline void transform_input(const float* d, int64_t line, int64_t pixel, float* v, int64_t plane) {
  constexpr int TILE = Winograd<m>::TILE;
  transform<TILE, TILE, Vector>(
      [](const Vector* x, Vector* y) { Winograd<m>::input(x, y); },
      [&](int i, int j) { return load_vector(d + i * line + j * pixel); },
      [&](int i, int j, Vector y) { store_vector(v + (i * TILE + j) * plane, y); });
}

// A^T p A of the TILE^2 products of a tile: store(i, j, y[i][j]) for all i, j < m.
template <int m, class Store>
inline void transform_output(const float* p, int64_t plane, const Store& store) {
  constexpr int TILE = Winograd<m>::TILE;
  transform<TILE, m, Vector>([](const Vector* x, Vector* y) { Winograd<m>::output(x, y); },
                             [&](int i, int j) { return load_vector(p + (i * TILE + j) * plane); },
                             store);
}

// What the gradient of a filter needs (y's derivative by g, read backwards): dg = G^T [sum over
// tiles of (A dy A^T) * (B^T d B)] G. So F(m x m, 3 x 3) turns into F(3 x 3, m x m) with the same
// points.

// A dy A^T of a tile of m x m pixels of y's gradient; as transform_input.
template <int m>
inline void transform_gradient(const float* dy, int64_t line, int64_t pixel, float* u,
                               int64_t plane) {
  constexpr int TILE = Winograd<m>::TILE;
  transform<m, TILE, Vector>(
      [](const Vector* x, Vector* y) { Winograd<m>::gradient(x, y); },
      [&](int i, int j) { return load_vector(dy + i * line + j * pixel); },
      [&](int i, int j, Vector y) { store_vector(u + (i * TILE + j) * plane, y); });
}

// G^T p G of the TILE^2 sums of products: tap (i, j) of the filter to g + (3 i + j) WIDTH.
template <int m>
inline void transform_filter(const float* p, int64_t plane, float* g) {
  constexpr int TILE = Winograd<m>::TILE;
  transform<TILE, 3, Vector>(
      [](const Vector* x, Vector* y) { Winograd<m>::filter(x, y); },
      [&](int i, int j) { return load_vector(p + (i * TILE + j) * plane); },
      [&](int i, int j, Vector y) { store_vector(g + (3 * i + j) * WIDTH, y); });
}

// G g G^T of HALF_WIDTH 3x3 filters, in float64 and rounded once. Tap t of them lies at g + t
// plane, value p of the TILE^2 goes to u + p u_plane.
template <int m>
inline void transform_weight(const float* g, int64_t plane, float* u, int64_t u_plane) {
  constexpr int TILE = Winograd<m>::TILE;
  transform<3, TILE, Doubles>(
      [](const Doubles* x, Doubles* y) { Winograd<m>::weight(x, y); },
      [&](int i, int j) { return load_doubles(g + (3 * i + j) * plane); },
      [&](int i, int j, Doubles y) { store_doubles(u + (i * TILE + j) * u_plane, y); });
}

}  // namespace
}  // namespace fastddpm
