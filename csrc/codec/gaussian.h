// Masses of a Gaussian on a grid, in integers alone: the same bits on every machine.
//
// A grid has the points k delta. The mass of bin k is that of ((k - 1/2) delta, (k + 1/2) delta),
//
//   F(j) = floor((top - bins) Phi(((first + j - 1/2) delta - mean) / sigma)) + j,   F(bins) = top,
//
// of a window of bins, each of which has a mass of at least 1. Phi is a table of 2^-32 at every
// 2^-10, straight between; the mean is rounded to delta / 2^16, delta / sigma to 2^-32.
#pragma once
#include <cstdint>

#include "rans.h"

namespace fastddpm {
namespace codec {

constexpr int Z_BITS = 26;      // of an argument of Phi after the point
constexpr int TABLE_BITS = 10;  // of those, of the table
constexpr int POINT_BITS = 16;  // of a place on the grid after the point
constexpr int WEIGHT_BITS = 32;
constexpr int SIGMAS = 10;  // where Phi ends: it is 0 or 1 beyond
constexpr int TABLE_END = SIGMAS << TABLE_BITS;
constexpr int64_t LARGEST = int64_t(1) << 24;         // index on a grid: exact in float32
constexpr int64_t LEAST_WEIGHT = int64_t(1) << 14;    // sigma is at most 2^18 delta,
constexpr int64_t LARGEST_WEIGHT = int64_t(1) << 42;  // at least delta / 2^10
constexpr int GUESS_BITS = 12;

struct Tables {
  uint32_t tail[TABLE_END + 1];      // 2^32 (1 - Phi(i / 2^10))
  double quantile[1 << GUESS_BITS];  // about Phi^-1 of a bin's centre: where a search begins
};

const Tables& tables();

// 2^32 Phi(z / 2^26); does not fall as z rises.
inline uint64_t phi(int64_t z) {
  const uint64_t distance = z < 0 ? uint64_t(-z) : uint64_t(z),
                 i = distance >> (Z_BITS - TABLE_BITS);
  uint64_t tail = 0;
  if (i < TABLE_END) {
    const uint32_t* at = tables().tail + i;
    const uint64_t rest = distance & ((1 << (Z_BITS - TABLE_BITS)) - 1);
    tail = at[0] - ((uint64_t(at[0] - at[1]) * rest) >> (Z_BITS - TABLE_BITS));
  }
  return z < 0 ? tail : (uint64_t(1) << 32) - tail;
}

struct Window {
  int64_t first;   // index of the lowest bin
  int64_t bins;    // their number
  int64_t mean;    // in delta / 2^16
  int64_t weight;  // 2^32 delta / sigma
  uint32_t top;    // TOTAL, or less by the mass that is kept for what lies outside

  uint32_t below(int64_t j) const {  // F(j), j in 0 .. bins
    if (j <= 0) return 0;
    if (j >= bins) return top;
    const int64_t place = (first + j) * (1 << POINT_BITS) - (1 << (POINT_BITS - 1)) - mean;
    // 2^27 places at most, times 2^42
    const __int128 z = __int128(place) * weight >> (POINT_BITS + WEIGHT_BITS - Z_BITS);
    constexpr int64_t end = int64_t(SIGMAS) << Z_BITS;
    const int64_t bounded = z < -end ? -end : z > end ? end : int64_t(z);
    return uint32_t((top - uint64_t(bins)) * phi(bounded) >> 32) + uint32_t(j);
  }

  Interval at(int64_t j) const {  // of bin first + j, j in 0 .. bins - 1
    const uint32_t start = below(j);
    return {start, below(j + 1) - start};
  }

  // The bin j that holds the slot, which is below `top`, and its interval.
  int64_t find(uint32_t slot, Interval& interval) const;
};

// 2^32 delta / sigma for delta = 2^exponent times `unit`, within its limits; -1 if the logarithm of
// sigma^2 is not finite. Of IEEE operations alone, which round alike everywhere.
int64_t weight_of(double log_variance, int exponent, double unit = 1.0);

// The bins within 7.5 sigma of the mean on a grid of delta = 2^exponent, and a mass that is left
// for other ones; or, not `outside`, within 6 and none. False if one of the bins would lie beyond
// what float32 holds exactly.
bool window_of(float mean, int64_t weight, int exponent, bool outside, Window& window);

// The 256 levels of a pixel around a mean in [-1, 1]   (DDPM Eq. 13): the ends take what lies
// beyond. False for a mean that is not finite.
bool levels_of(float mean, int64_t weight, Window& window);

}  // namespace codec
}  // namespace fastddpm
