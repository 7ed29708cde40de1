// AMX-BF16 and AVX512-BF16 on a processor that has neither: the intrinsics that
// csrc/cpu/layers/bf16.h uses, by name, in plain C++. A compiler's -include puts this file before
// everything else.
//
// Stricter than the processor: a tile that is used before the configuration, outside of it or with
// other sizes than it says ends the program.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tiles {
  bool configured = false;
  uint8_t rows[8];
  uint16_t row_bytes[8];
  alignas(64) uint8_t data[8][16][64];
};

inline thread_local Tiles tiles;

inline float widen(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

inline void demand(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

inline void configure(const void* memory) {
  uint8_t bytes[64];
  std::memcpy(bytes, memory, sizeof bytes);
  demand(bytes[0] == 1, "tiles are configured with a palette other than 1");
  for (int i = 1; i < 16; ++i) demand(bytes[i] == 0, "reserved bytes of the configuration are set");
  for (int i = 0; i < 8; ++i) {
    std::memcpy(&tiles.row_bytes[i], bytes + 16 + 2 * i, 2);
    tiles.rows[i] = bytes[48 + i];
    demand(tiles.rows[i] <= 16 && tiles.row_bytes[i] <= 64, "a tile is configured too large");
  }
  std::memset(tiles.data, 0, sizeof tiles.data);
  tiles.configured = true;
}

inline void release() { tiles.configured = false; }

inline int usable(int t) {
  demand(tiles.configured, "a tile is used without a configuration");
  demand(t >= 0 && t < 8, "there are 8 tiles");
  return t;
}

inline void zero(int t) { std::memset(tiles.data[usable(t)], 0, sizeof tiles.data[t]); }

inline void load(int t, const void* memory, size_t stride) {
  zero(t);
  for (int i = 0; i < tiles.rows[t]; ++i)
    std::memcpy(tiles.data[t][i], static_cast<const uint8_t*>(memory) + i * stride,
                tiles.row_bytes[t]);
}

inline void store(int t, void* memory, size_t stride) {
  for (int i = 0; i < tiles.rows[usable(t)]; ++i)
    std::memcpy(static_cast<uint8_t*>(memory) + i * stride, tiles.data[t][i], tiles.row_bytes[t]);
}

inline void add_pair(float& sum, const uint16_t* a, const uint16_t* b) {
  sum += widen(a[0]) * widen(b[0]);
  sum += widen(a[1]) * widen(b[1]);
}

inline void multiply(int c, int a, int b) {
  const int rows = tiles.rows[usable(c)], pairs = tiles.row_bytes[usable(a)] / 4;
  const int columns = tiles.row_bytes[c] / 4;
  demand(tiles.rows[a] == rows && tiles.rows[usable(b)] == pairs &&
             tiles.row_bytes[b] == tiles.row_bytes[c],
         "the tiles of a product do not fit");
  for (int m = 0; m < rows; ++m)
    for (int k = 0; k < pairs; ++k)
      for (int n = 0; n < columns; ++n) {
        uint16_t left[2], right[2];
        float sum;
        std::memcpy(left, tiles.data[a][m] + 4 * k, 4);
        std::memcpy(right, tiles.data[b][k] + 4 * n, 4);
        std::memcpy(&sum, tiles.data[c][m] + 4 * n, 4);
        add_pair(sum, left, right);
        std::memcpy(tiles.data[c][m] + 4 * n, &sum, 4);
      }
}

typedef float Floats __attribute__((vector_size(64)));

template <class Sum, class Operand>
inline Floats dot(Sum sum_, Operand a_, Operand b_) {
  float sum[16];
  uint16_t a[32], b[32];
  static_assert(sizeof sum == sizeof sum_ && sizeof a == sizeof a_, "64 bytes each");
  std::memcpy(sum, &sum_, sizeof sum);
  std::memcpy(a, &a_, sizeof a);
  std::memcpy(b, &b_, sizeof b);
  for (int i = 0; i < 16; ++i) add_pair(sum[i], a + 2 * i, b + 2 * i);
  Floats result;
  std::memcpy(&result, sum, sizeof result);
  return result;
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::configure
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply
#define _mm512_dpbf16_ps emulated::dot
