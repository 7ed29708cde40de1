// Which elements dropout keeps: the words of the RNG contract against a threshold.
#pragma once
#include "normals.h"

namespace fastddpm {
namespace {

inline uint32_t mask_of(uint32_t word, uint32_t threshold) { return word >= threshold ? ~0u : 0u; }

// x scaled where the mask's bits are set, else times 0: a NaN or an infinity is not hidden.
inline float drop(float x, float keep_scale, uint32_t mask) {
  return x * bit_cast<float>(bit_cast<uint32_t>(keep_scale) & mask);
}

// Masks of the elements of blocks first .. first + count, count <= BLOCKS.
inline void draw_mask_blocks(const Philox& stream, uint32_t threshold, int64_t first, int64_t count,
                             uint32_t* __restrict mask) {
  uint32_t words[4][PADDED];
  philox_words(stream, first, count, words);
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < 4; ++j) mask[4 * i + j] = mask_of(words[j][i], threshold);
}

// Masks of elements first, first + stride, ... of a sample. Where elements are not neighbours each
// takes a block of its own.
inline void draw_mask(const Philox& stream, uint32_t threshold, int64_t first, int64_t stride,
                      int64_t count, uint32_t* mask) {
  while (count > 0) {
    int64_t done;
    if (stride == 1) {
      const int64_t skip = first % 4;
      done = count < CHUNK ? count : CHUNK;
      if (skip == 0 && done % 4 == 0) {
        draw_mask_blocks(stream, threshold, first / 4, done / 4, mask);
      } else {
        uint32_t aligned[4 * BLOCKS];
        draw_mask_blocks(stream, threshold, first / 4, (skip + done + 3) / 4, aligned);
        __builtin_memcpy(mask, aligned + skip, size_t(done) * sizeof(uint32_t));
      }
    } else {
      uint32_t blocks[PADDED], words[4][PADDED];
      done = count < BLOCKS ? count : BLOCKS;
      for (int64_t i = 0; i < done; ++i) blocks[i] = uint32_t((first + i * stride) / 4);
      philox_words_at(stream, blocks, done, words);
      for (int64_t i = 0; i < done; ++i)
        mask[i] = mask_of(words[(first + i * stride) % 4][i], threshold);
    }
    first += done * stride, mask += done, count -= done;
  }
}

}  // namespace
}  // namespace fastddpm
