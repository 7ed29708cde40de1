// Standard normals of the RNG contract for a run of elements of one sample.
#pragma once
#include "../../philox.h"
#include "../simd.h"
#include "../view.h"

namespace fastddpm {
namespace {

inline Philox stream(const Random& random, int64_t n) {
  return make_philox(random.seed, random.step.data[n * random.step.stride],
                     random.sample_index.data[n * random.sample_index.stride]);
}

constexpr int64_t BLOCKS = CHUNK / 4 + 1;                         // that a chunk touches, at most
constexpr int64_t PADDED = (BLOCKS + WIDTH - 1) / WIDTH * WIDTH;  // in whole vectors

#if defined(__AVX2__)
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint64_t Products __attribute__((vector_size(4 * WIDTH)));

// m times the low half of each 64 bits. By intrinsics: compilers widen, which takes twice as long.
inline Products multiply_even(uint32_t m, Products x) {
#if defined(__AVX512F__)
  return Products(_mm512_maskz_mul_epu32(0xff, __m512i(x), _mm512_set1_epi64(m)));
#else
  return Products(_mm256_mul_epu32(__m256i(x), _mm256_set1_epi64x(m)));
#endif
}

// The high half of m x, and the low half.
inline Words multiply_words(uint32_t m, Words x, Words& low) {
  const Products even = multiply_even(m, Products(x)), odd = multiply_even(m, Products(x) >> 32);
  low = Words((even & 0xffffffffu) | (odd << 32));
  return Words((even >> 32) | (odd & ~uint64_t(0xffffffffu)));
}

// philox4x32 of WIDTH blocks.
inline void philox_vector(const Philox& stream, Words block, int64_t at,
                          uint32_t words[4][PADDED]) {
  Words c[4] = {block, Words{} + stream.step, Words{} + stream.index_low,
                Words{} + stream.index_high};
  uint32_t k0 = stream.key_low, k1 = stream.key_high;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    Words low0, low1;
    const Words high0 = multiply_words(0xD2511F53u, c[0], low0);
    const Words high1 = multiply_words(0xCD9E8D57u, c[2], low1);
    c[0] = high1 ^ c[1] ^ k0, c[1] = low1, c[2] = high0 ^ c[3] ^ k1, c[3] = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  for (int j = 0; j < 4; ++j) __builtin_memcpy(&words[j][at], &c[j], sizeof c[j]);
}

// philox4x32 of blocks first .. first + count.
inline void philox_words(const Philox& stream, int64_t first, int64_t count,
                         uint32_t words[4][PADDED]) {
  Words lane{};
  for (int64_t j = 0; j < WIDTH; ++j) lane[j] = uint32_t(j);
  for (int64_t i = 0; i < count; i += WIDTH)
    philox_vector(stream, lane + uint32_t(first + i), i, words);
}

// philox4x32 of any blocks; those up to a multiple of WIDTH are read.
inline void philox_words_at(const Philox& stream, const uint32_t blocks[PADDED], int64_t count,
                            uint32_t words[4][PADDED]) {
  for (int64_t i = 0; i < count; i += WIDTH) {
    Words block;
    __builtin_memcpy(&block, blocks + i, sizeof block);
    philox_vector(stream, block, i, words);
  }
}
#else
inline void philox_words_at(const Philox& stream, const uint32_t blocks[PADDED], int64_t count,
                            uint32_t words[4][PADDED]) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t word[4];
    philox4x32(stream, blocks[i], word);
    for (int j = 0; j < 4; ++j) words[j][i] = word[j];
  }
}

inline void philox_words(const Philox& stream, int64_t first, int64_t count,
                         uint32_t words[4][PADDED]) {
  uint32_t blocks[PADDED];
  for (int64_t i = 0; i < count; ++i) blocks[i] = uint32_t(first + i);
  philox_words_at(stream, blocks, count, words);
}
#endif

// All 4 * count normals of blocks first .. first + count, count <= BLOCKS.
inline void normal_blocks(const Philox& stream, int64_t first, int64_t count, float* __restrict z) {
  uint32_t words[4][PADDED];
  float normal[4][PADDED];
  philox_words(stream, first, count, words);
  for (int j = 0; j < 4; j += 2)
    for (int64_t i = 0; i < count; ++i)
      box_muller(words[j][i], words[j + 1][i], normal[j][i], normal[j + 1][i]);
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < 4; ++j) z[4 * i + j] = normal[j][i];
}

// Normals of elements first .. first + count in (C, H, W) order, count <= CHUNK, first anywhere.
inline void normals_chw(const Philox& stream, int64_t first, int64_t count, float* z) {
  const int64_t skip = first % 4, blocks = (skip + count + 3) / 4;
  if (skip == 0 && count % 4 == 0) return normal_blocks(stream, first / 4, blocks, z);
  float aligned[CHUNK + 4];
  normal_blocks(stream, first / 4, blocks, aligned);
  __builtin_memcpy(z, aligned + skip, size_t(count) * sizeof(float));
}

// Normals of elements first .. first + count in the given order; a chunk as chunk_length() cuts it.
inline void normals(const Philox& stream, const Shape& shape, Order order, int64_t first,
                    int64_t count, float* z) {
  if (order == Order::chw) return normals_chw(stream, first, count, z);
  const int64_t pixel = first / shape.c, pixels = count / shape.c;
  float channel[CHUNK];
  for (int64_t c = 0; c < shape.c; ++c) {
    normals_chw(stream, c * shape.h * shape.w + pixel, pixels, channel);
    for (int64_t i = 0; i < pixels; ++i) z[i * shape.c + c] = channel[i];
  }
}

}  // namespace
}  // namespace fastddpm
