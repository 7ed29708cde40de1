// Standard normals of the RNG contract for a run of elements of one sample.
#pragma once
#include "../philox.h"
#include "view.h"

namespace fastddpm {
namespace {

inline Philox stream(const Random& random, int64_t n) {
  return make_philox(random.seed, random.step.data[n * random.step.stride],
                     random.sample_index.data[n * random.sample_index.stride]);
}

// All 4 * count normals of blocks first .. first + count; count is at most CHUNK / 4 + 1.
inline void normal_blocks(const Philox& stream, int64_t first, int64_t count, float* z) {
  uint32_t words[4][CHUNK / 4 + 1];
  for (int64_t i = 0; i < count; ++i) {
    uint32_t word[4];
    philox4x32(stream, uint32_t(first + i), word);
    for (int j = 0; j < 4; ++j) words[j][i] = word[j];
  }
  for (int j = 0; j < 4; j += 2)
    for (int64_t i = 0; i < count; ++i)
      box_muller(words[j][i], words[j + 1][i], z[4 * i + j], z[4 * i + j + 1]);
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
