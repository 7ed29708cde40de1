// The random number contract, the same on every backend: Philox4x32-10 (Salmon et al. 2011).
//
//   key     = (seed low, seed high)
//   counter = (block of 4 elements in the sample, step, sample index low, sample index high)
//
// Element 4 b + j of a sample comes from word j of block b, in the order of a contiguous (C, H, W)
// sample whatever the memory layout. The codec's files depend on this: it is frozen.
#pragma once
#include "math.h"

namespace fastddpm {
namespace {

struct Philox {  // one sample's stream: everything but the block
  uint32_t step, index_low, index_high, key_low, key_high;
};

FASTDDPM_HD Philox make_philox(uint64_t seed, int64_t step, int64_t sample_index) {
  return {uint32_t(step), uint32_t(sample_index), uint32_t(uint64_t(sample_index) >> 32),
          uint32_t(seed), uint32_t(seed >> 32)};
}

FASTDDPM_HD void philox4x32(const Philox& stream, uint32_t block, uint32_t words[4]) {
  uint32_t c0 = block, c1 = stream.step, c2 = stream.index_low, c3 = stream.index_high;
  uint32_t k0 = stream.key_low, k1 = stream.key_high;
#if defined(__CUDACC__)
#pragma unroll
#elif defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

FASTDDPM_HD void normal4(const Philox& stream, uint32_t block, float z[4]) {
  uint32_t words[4];
  philox4x32(stream, block, words);
  box_muller(words[0], words[1], z[0], z[1]);
  box_muller(words[2], words[3], z[2], z[3]);
}

// What `choices` of ops.h is for one example: t of `levels` and whether it is mirrored.
FASTDDPM_HD void choose(const Philox& stream, int64_t levels, int64_t& t, uint8_t& flip) {
  uint32_t words[4];
  philox4x32(stream, 0, words);
  t = int64_t(uint64_t(words[0]) * uint64_t(levels) >> 32);
  flip = uint8_t(words[1] & 1);
}

}  // namespace
}  // namespace fastddpm
