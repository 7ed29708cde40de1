// Attention of a tile of queries to all keys of a head: its rows of scores are all that ever
// exists.
#pragma once
#include "../../ops.h"
#include "gemm.h"

namespace fastddpm {
namespace {

constexpr int64_t ROWS = 48;  // queries in a tile: whole strips

// Images of a group when n images are cut into the fewest groups of about the same size, at most
// `fit` each.
inline int64_t equal_groups(int64_t n, int64_t fit) {
  const int64_t groups = fit > 1 ? (n + fit - 1) / fit : n;
  return (n + groups - 1) / groups;
}

// The panels of a linear layer's weight (rows, columns): B is its transpose.
inline void pack_matrix(const Matrix& weight, int64_t rows, int64_t columns, float* panels) {
  const auto as = [&](auto* data) {
    pack(data, columns, rows, weight.stride_c, weight.stride_n, panels);
  };
  if (weight.dtype == DType::bf16)
    as(static_cast<const BF16*>(weight.data));
  else if (weight.dtype == DType::f16)
    as(static_cast<const F16*>(weight.data));
  else
    as(static_cast<const float*>(weight.data));
}

inline void pack_row(const Matrix& bias, int64_t count, float* row) {
  if (bias.data) pack_matrix({bias.data, bias.dtype, bias.stride_c, 0}, count, 1, row);
}

// softmax up to the factor that is returned: x[i] becomes e^{scale (x[i] - max x)}.
inline float exponentiate(float* __restrict x, int64_t count, float scale) {
  float top = x[0], sum = 0.0f;
  Vector tops = vector_of(top), sums{};
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) {
    const Vector v = load_vector(x + i);
    tops = v > tops ? v : tops;
  }
  for (; i < count; ++i) top = x[i] > top ? x[i] : top;
  for (int64_t j = 0; j < WIDTH; ++j) top = tops[j] > top ? tops[j] : top;
  for (i = 0; i < count; ++i) x[i] = exponential(scale * (x[i] - top));
  for (i = 0; i + WIDTH <= count; i += WIDTH) sums += load_vector(x + i);
  for (; i < count; ++i) sum += x[i];
  for (int64_t j = 0; j < WIDTH; ++j) sum += sums[j];
  return 1.0f / sum;
}

// dp becomes scale p (dp - sum p dp).
inline void softmax_gradient(const float* __restrict p, float* __restrict dp, int64_t count,
                             float scale) {
  Vector sums{};
  float sum = 0.0f;
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH)
    sums = vector_madd(load_vector(p + i), load_vector(dp + i), sums);
  for (; i < count; ++i) sum = madd(p[i], dp[i], sum);
  for (int64_t j = 0; j < WIDTH; ++j) sum += sums[j];
  for (i = 0; i < count; ++i) dp[i] = scale * (p[i] * (dp[i] - sum));
}

// out = softmax(q k^T / sqrt(depth)) v for `rows` queries. keys: k^T packed; values: v packed;
// scores: (rows, pixels rounded up to whole panels); out may be q.
inline void attend_rows(const float* q, int64_t ldq, const float* keys, const float* values,
                        int64_t rows, int64_t pixels, int64_t depth, float* scores, float* out,
                        int64_t ldo) {
  const int64_t ld = round_up(pixels, PANEL);
  multiply(q, ldq, keys, rows, depth, pixels, nullptr, scores, ld);
  float factor[ROWS];
  const float scale = float(1.0 / sqrt(double(depth)));
  for (int64_t i = 0; i < rows; ++i) factor[i] = exponentiate(scores + i * ld, pixels, scale);
  multiply(scores, ld, values, rows, pixels, depth, nullptr, out, ldo);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < depth; ++j) out[i * ldo + j] *= factor[i];
}

}  // namespace
}  // namespace fastddpm
