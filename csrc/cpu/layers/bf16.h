// Products of bfloat16 matrices with float32 sums, a block of 32 x 32 at a time: AMX tiles, the dot
// products of AVX512-BF16, or float32 arithmetic on the same operands where a build has neither.
//
// B (k, n) is packed into panels of 32 columns, its rows in steps of 32: [panel][step][2 halves of
// the columns][16 pairs of rows][16 columns][2 rows], zeros where the matrix ends. So one register
// holds 16 columns' pairs, as both instruction sets want them. Every element of a result is one sum
// in the order of k: its bits depend on its row of A and its column of B alone.
#pragma once
#include <cstddef>

#include "../../types.h"
#include "../simd.h"
#include "ahead.h"

#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace fastddpm {
namespace {

constexpr int64_t BLOCK = 32;            // rows and columns of a result, rows of B in a step
constexpr int64_t TILE = 16;             // of a block's two by two tiles
constexpr int64_t STEP = BLOCK * BLOCK;  // values of B in a step

inline int64_t blocks_of(int64_t x) { return (x + BLOCK - 1) / BLOCK; }

inline int64_t packed_size_bf16(int64_t k, int64_t n) { return blocks_of(k) * blocks_of(n) * STEP; }

inline uint32_t pair_of(float low, float high) {
  return from_float<BF16>(low).bits | uint32_t(from_float<BF16>(high).bits) << 16;
}

// What a thread holds while it multiplies: for AMX the processor's tiles are set up.
#if defined(__AMX_BF16__)

struct Multiplier {
  static constexpr bool ANY_ROWS = false;
  struct alignas(64) Configuration {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };

  Multiplier() {
    Configuration all;
    for (int i = 0; i < 8; ++i) all.row_bytes[i] = 64, all.rows[i] = TILE;
    settle(&all);
    _tile_loadconfig(&all);
  }
  ~Multiplier() { _tile_release(); }

  // Compilers do not know how much memory a tile's load and its configuration read: everything has
  // to be there before.
  static void settle(void* memory = nullptr) { __asm__ volatile("" : : "r"(memory) : "memory"); }

  static int64_t fetches(int64_t, int64_t) { return 0; }

  static void multiply(int64_t count, const BF16* const* rows, int64_t lda, const int64_t* offsets,
                       int64_t runs, int64_t steps, const BF16* b, Ahead&, float* c, int64_t ldc) {
    const BF16* const a[2] = {rows[0], rows[count > TILE ? TILE : 0]};
    if (count > TILE)
      multiply_tiles<2>(a, lda, offsets, runs, steps, b, c, ldc);
    else
      multiply_tiles<1>(a, lda, offsets, runs, steps, b, c, ldc);
  }

  template <int ROW_TILES>
  static void multiply_tiles(const BF16* const* a, int64_t lda, const int64_t* offsets,
                             int64_t runs, int64_t steps, const BF16* b, float* c, int64_t ldc) {
    const size_t stride = size_t(lda) * sizeof(BF16), out = size_t(ldc) * sizeof(float);
    settle();
    _tile_zero(0);
    _tile_zero(1);
    if (ROW_TILES == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t run = 0; run < runs; ++run)
      for (int64_t s = 0; s < steps; ++s, b += STEP) {
        const int64_t at = offsets[run] + s * BLOCK;
        _tile_loadd(6, b, 64);
        _tile_loadd(4, a[0] + at, stride);
        _tile_dpbf16ps(0, 4, 6);
        if (ROW_TILES == 2) {
          _tile_loadd(5, a[1] + at, stride);
          _tile_dpbf16ps(2, 5, 6);
        }
        _tile_loadd(7, b + STEP / 2, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (ROW_TILES == 2) {
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    _tile_stored(0, c, out);
    _tile_stored(1, c + TILE, out);
    if (ROW_TILES == 2) {
      _tile_stored(2, c + TILE * ldc, out);
      _tile_stored(3, c + TILE * ldc + TILE, out);
    }
  }
};

#else

struct Multiplier {
  static constexpr bool ANY_ROWS = true;
#if defined(__AVX512BF16__)
  // Rows in flight, halves of a panel's columns, vectors of a half: 16 sums hide the latency of the
  // products and need fewer loads than there are products.
  static constexpr int STRIP_ROWS = 8, HALVES = 2, PARTS = 1;
  typedef float Floats __attribute__((vector_size(64)));
  typedef uint32_t Pairs __attribute__((vector_size(64)));

  static Floats add_pairs(Floats sum, Pairs a, Pairs b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
#else
  static constexpr int STRIP_ROWS = 4, HALVES = 1, PARTS = int(TILE / WIDTH);
  typedef Vector Floats;
  typedef uint32_t Pairs __attribute__((vector_size(sizeof(Vector))));

  static Floats add_pairs(Floats sum, Pairs a, Pairs b) {
    constexpr uint32_t HIGH = 0xffff0000u;
    sum = vector_madd((Floats)(a << 16), (Floats)(b << 16), sum);
    return vector_madd((Floats)(a & HIGH), (Floats)(b & HIGH), sum);
  }
#endif

  // STRIP_ROWS rows times HALVES halves of a panel's columns. A function of its own, since inlined
  // into some callers its sums or its part of B do not stay in registers.
  __attribute__((noinline)) static void multiply_strip(const BF16* const* row,
                                                       const int64_t* offsets, int64_t runs,
                                                       int64_t steps, const BF16* b, Ahead& ahead,
                                                       float* c, int64_t ldc) {
    Floats sum[STRIP_ROWS][HALVES * PARTS] = {};
    Ahead next = ahead;  // in a register
    for (int64_t run = 0; run < runs; ++run) {
      const BF16* a[STRIP_ROWS];
      for (int i = 0; i < STRIP_ROWS; ++i) a[i] = row[i] + offsets[run];
      for (int64_t s = 0; s < steps; ++s, b += STEP)
        for (int64_t k = 0; k < BLOCK; k += 2) {
          next.fetch();
          Pairs right[HALVES * PARTS];
          for (int h = 0; h < HALVES; ++h)
            __builtin_memcpy(right + h * PARTS, b + h * (STEP / 2) + k * TILE,
                             PARTS * sizeof(Pairs));
#pragma GCC unroll 8
          for (int i = 0; i < STRIP_ROWS; ++i) {
            uint32_t pair;
            __builtin_memcpy(&pair, a[i] + s * BLOCK + k, sizeof pair);
            const Pairs left = pair - Pairs{};
#pragma GCC unroll 4
            for (int j = 0; j < HALVES * PARTS; ++j)
              sum[i][j] = add_pairs(sum[i][j], left, right[j]);
          }
        }
    }
    ahead = next;
    for (int i = 0; i < STRIP_ROWS; ++i) __builtin_memcpy(c + i * ldc, sum[i], sizeof sum[i]);
  }

  static int64_t fetches(int64_t count, int64_t steps) {
    return (count + STRIP_ROWS - 1) / STRIP_ROWS * (2 / HALVES) * steps * (BLOCK / 2);
  }

  static void multiply(int64_t count, const BF16* const* rows, int64_t, const int64_t* offsets,
                       int64_t runs, int64_t steps, const BF16* b, Ahead& ahead, float* c,
                       int64_t ldc) {
    for (int64_t row = 0; row < count; row += STRIP_ROWS)
      for (int64_t half = 0; half < 2; half += HALVES)
        multiply_strip(rows + row, offsets, runs, steps, b + half * (STEP / 2), ahead,
                       c + row * ldc + half * TILE, ldc);
  }
};

#endif

// C (count, 32) = A times one panel of B, for 1 .. 32 rows of A, in `runs` runs of 32 steps each,
// run r at offsets[r]. rows: where the rows of A begin, whole tiles of them: those from count on
// are read as well, and C gets as many. Without ANY_ROWS a tile's rows have to lie lda values
// apart.
inline void multiply_bf16(const Multiplier&, int64_t count, const BF16* const* rows, int64_t lda,
                          const int64_t* offsets, int64_t runs, int64_t steps, const BF16* panel,
                          Ahead& ahead, float* c, int64_t ldc) {
  Multiplier::multiply(count, rows, lda, offsets, runs, steps, panel, ahead, c, ldc);
}

// For all of a panel's products with `count` rows.
inline Ahead ahead_of(const BF16* panel, int64_t steps, int64_t count) {
  return Ahead(panel + steps * STEP, steps * STEP, Multiplier::fetches(count, steps));
}

// The same for rows of one matrix, lda values apart.
inline void multiply_bf16(const Multiplier& multiplier, int64_t count, const BF16* a, int64_t lda,
                          int64_t steps, const BF16* panel, float* c, int64_t ldc) {
  const BF16* rows[BLOCK];
  for (int64_t i = 0; i < BLOCK; ++i) rows[i] = a + i * lda;
  const int64_t none = 0;
  Ahead ahead = ahead_of(panel, steps, count);
  multiply_bf16(multiplier, count, rows, lda, &none, 1, steps, panel, ahead, c, ldc);
}

}  // namespace
}  // namespace fastddpm
