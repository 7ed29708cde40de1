// Matrices of bfloat16 by rows, whole blocks with zeros behind their ends, and what products read
// of them: themselves, their panels as B, the panels of their transposes, and their transposes.
// Only copies, but for the rounding.
#pragma once
#include "../view.h"
#include "bf16.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fastddpm {
namespace {

// `rows` rows of floats, rounded, to `all` rows of `ld` values: zeros behind a row's end and for
// missing rows.
inline void round_rows(const float* x, int64_t ldx, int64_t rows, int64_t count, int64_t all,
                       BF16* out, int64_t ld) {
  for (int64_t i = 0; i < all; ++i) {
    const int64_t filled = i < rows ? count : 0;
    narrow(x + i * ldx, filled, out + i * ld);
    __builtin_memset(out + i * ld + filled, 0, size_t(ld - filled) * sizeof(BF16));
  }
}

constexpr int64_t EIGHT = 8;

// to[j to_ld + i] = from[i][j] for i, j < 8.
inline void transpose_eight(const BF16* const* from, BF16* to, int64_t to_ld) {
#if defined(__SSE2__)
  __m128i a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i]));
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm_unpacklo_epi32(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm_unpackhi_epi32(b[i + j], b[i + j + 2]);
    }
  for (int j = 0; j < 4; ++j) {
    auto* rows = reinterpret_cast<__m128i*>(to + 2 * j * to_ld);
    _mm_storeu_si128(rows, _mm_unpacklo_epi64(a[j], a[j + 4]));
    rows = reinterpret_cast<__m128i*>(to + (2 * j + 1) * to_ld);
    _mm_storeu_si128(rows, _mm_unpackhi_epi64(a[j], a[j + 4]));
  }
#else
  for (int64_t i = 0; i < EIGHT; ++i)
    for (int64_t j = 0; j < EIGHT; ++j) to[j * to_ld + i] = from[i][j];
#endif
}

// to[j to_ld + i] = from[i ld + j] for (rows, columns), whole eights.
inline void transpose_rows(const BF16* from, int64_t ld, int64_t rows, int64_t columns, BF16* to,
                           int64_t to_ld) {
  for (int64_t j = 0; j < columns; j += EIGHT)
    for (int64_t i = 0; i < rows; i += EIGHT) {
      const BF16* eight[EIGHT];
      for (int64_t l = 0; l < EIGHT; ++l) eight[l] = from + (i + l) * ld + j;
      transpose_eight(eight, to + j * to_ld + i, to_ld);
    }
}

// to[j to_ld + i] = from[i ld + j] for i, j < 4, of pairs of values.
inline void transpose_pairs(const BF16* from, int64_t ld, BF16* to, int64_t to_ld) {
#if defined(__SSE2__)
  __m128i a[4], b[4];
  for (int i = 0; i < 4; ++i)
    a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * ld));
  for (int i = 0; i < 2; ++i) {
    b[2 * i] = _mm_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  for (int j = 0; j < 2; ++j) {
    auto* rows = reinterpret_cast<__m128i*>(to + 2 * j * to_ld);
    _mm_storeu_si128(rows, _mm_unpacklo_epi64(b[j], b[j + 2]));
    rows = reinterpret_cast<__m128i*>(to + (2 * j + 1) * to_ld);
    _mm_storeu_si128(rows, _mm_unpackhi_epi64(b[j], b[j + 2]));
  }
#else
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t j = 0; j < 4; ++j)
      __builtin_memcpy(to + j * to_ld + 2 * i, from + i * ld + 2 * j, 2 * sizeof(BF16));
#endif
}

// Pairs of the first `count` values of both, zeros up to TILE of them.
inline void interleave(const BF16* low, const BF16* high, int64_t count, BF16* to) {
  uint32_t pairs[TILE] = {};
  for (int64_t j = 0; j < count; ++j) pairs[j] = low[j].bits | uint32_t(high[j].bits) << 16;
  __builtin_memcpy(to, pairs, sizeof pairs);
}

// Panels of B (k, n), whose rows these are: whole blocks; `panel` values from one to the next.
inline void pack_rows(const BF16* rows, int64_t ld, int64_t k, int64_t n, BF16* panels,
                      int64_t panel) {
  for (int64_t step = 0; step < k; step += BLOCK)
    for (int64_t j = 0; j < n; j += TILE) {
      BF16* to = panels + j / BLOCK * panel + j % BLOCK * BLOCK + step / BLOCK * STEP;
      for (int64_t i = step; i < step + BLOCK; i += 2, to += 2 * TILE)
        interleave(rows + i * ld + j, rows + (i + 1) * ld + j, TILE, to);
    }
}

// Panels of B (k, n), whose columns these are: (n, k) by rows, whole blocks.
inline void pack_columns(const BF16* rows, int64_t ld, int64_t k, int64_t n, BF16* panels,
                         int64_t panel) {
  for (int64_t j = 0; j < n; j += TILE)
    for (int64_t step = 0; step < k; step += BLOCK) {
      BF16* to = panels + j / BLOCK * panel + j % BLOCK * BLOCK + step / BLOCK * STEP;
      const BF16* from = rows + j * ld + step;
      for (int64_t i = 0; i < BLOCK; i += 8)
        for (int64_t l = 0; l < TILE; l += 4)
          transpose_pairs(from + l * ld + i, ld, to + i * TILE + 2 * l, 2 * TILE);
    }
}

}  // namespace
}  // namespace fastddpm
