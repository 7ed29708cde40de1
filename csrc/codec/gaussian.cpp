#include "gaussian.h"

#include <cmath>

namespace fastddpm {
namespace codec {
namespace {

// Half sigmas of a window on either side. Each bin costs all others 2^-28 of their mass, so what is
// predicted has no more of them than 7.5 sigma, beyond which its escape is cheap enough. What is
// drawn stays within 6 sigma: farther out the mass of a bin is the one part that each has, and too
// much. An image of 28x28 and 1000 steps would draw an outlier there, which costs a few bits.
constexpr int64_t PREDICTED = 15, DRAWN = 12;

// phi and the tail by Taylor steps of 2^-10 in fixed point of 60 bits: of z = i / 2^10 and phi,
// phi^(n+1) = -z phi^(n) - n phi^(n-1). Six terms leave 2^-70 a step.
void fill_tails(uint32_t* tail) {
  constexpr int BITS = 60;
  using Wide = __int128;
  Wide density = 459949134171706403;  // 2^60 / sqrt(2 pi)
  Wide left = Wide(1) << (BITS - 1);  // 2^60 (1 - Phi(0))
  for (int64_t i = 0; i <= TABLE_END; ++i) {
    const Wide rounded = (left + (Wide(1) << (BITS - 33))) >> (BITS - 32);
    tail[i] = rounded > 0 && i < TABLE_END ? uint32_t(rounded) : 0;
    Wide before = 0, derivative = density, next = 0, mass = 0;
    int64_t factorial = 1;
    for (int n = 0; n < 6; ++n) {  // derivative: the n-th of phi; h^n / n! of it, h^(n+1) / (n+1)!
      next += (derivative / factorial) >> (TABLE_BITS * n);
      factorial *= n + 1;
      mass += (derivative / factorial) >> (TABLE_BITS * (n + 1));
      const Wide after = -((derivative * i) >> TABLE_BITS) - n * before;
      before = derivative, derivative = after;
    }
    density = next, left -= mass;
  }
}

// From the table: about the z at which Phi is the middle of each bin.
void fill_quantiles(Tables& tables) {
  constexpr int64_t BINS = int64_t(1) << GUESS_BITS;
  int64_t i = TABLE_END;
  for (int64_t k = 0; k < BINS / 2; ++k) {
    const uint64_t tail = ((uint64_t(2 * k + 1) << 32) / BINS) / 2;
    while (i > 0 && tables.tail[i] < tail) --i;
    const double z = double(i) / (1 << TABLE_BITS);
    tables.quantile[k] = -z, tables.quantile[BINS - 1 - k] = z;
  }
}

}  // namespace

const Tables& tables() {
  static const Tables* instance = [] {
    auto* made = new Tables();  // lives as long as the process
    fill_tails(made->tail);
    fill_quantiles(*made);
    return made;
  }();
  return *instance;
}

int64_t Window::find(uint32_t slot, Interval& interval) const {
  // A guess of z, straight between the table's; it does not change what is found.
  constexpr int SHIFT = MASS_BITS - GUESS_BITS, LAST = (1 << GUESS_BITS) - 1;
  const int64_t way = int64_t(slot) - (1 << (SHIFT - 1));
  const int64_t k = way < 0 ? 0 : way >> SHIFT >= LAST ? LAST - 1 : way >> SHIFT;
  const double* at = tables().quantile + k;
  const double z = at[0] + (at[1] - at[0]) * double(way - (k << SHIFT)) / (1 << SHIFT);
  const double place =
      double(mean) / (1 << POINT_BITS) + z * double(int64_t(1) << WEIGHT_BITS) / double(weight);
  int64_t low = int64_t(std::floor(place + 0.5)) - first;
  low = low < 0 ? 0 : low >= bins ? bins - 1 : low;
  int64_t high = low + 1;
  uint32_t from = below(low), to = 0;
  if (from > slot) {  // gallop down
    for (int64_t step = 1; from > slot; step *= 2) {
      high = low, to = from;
      low = low > step ? low - step : 0;
      from = below(low);
    }
  } else {
    to = below(high);
    for (int64_t step = 1; to <= slot; step *= 2) {
      low = high, from = to;
      high = bins - high > step ? high + step : bins;
      to = below(high);
    }
  }
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const uint32_t edge = below(middle);
    if (edge > slot)
      high = middle, to = edge;
    else
      low = middle, from = edge;
  }
  interval = {from, to - from};
  return low;
}

int64_t weight_of(double log_variance, int exponent, double unit) {
  if (!std::isfinite(log_variance)) return -1;
  // sigma^-1 = 2^u; its fraction by exp's series, whose last term is 0.35^14 / 14! of it
  const double u = log_variance * (-0.5 * 1.4426950408889634);
  const double whole = std::floor(u + 0.5);
  const double x = (u - whole) * 0.6931471805599453;
  double power = 1.0;
  for (int n = 14; n > 0; --n) power = 1.0 + power * x / n;
  const double scale = whole + exponent + WEIGHT_BITS;
  if (scale > 60) return LARGEST_WEIGHT;
  if (scale < -60) return LEAST_WEIGHT;
  const auto weight = int64_t(std::floor(std::ldexp(power * unit, int(scale)) + 0.5));
  return weight < LEAST_WEIGHT ? LEAST_WEIGHT : weight > LARGEST_WEIGHT ? LARGEST_WEIGHT : weight;
}

bool window_of(float mean, int64_t weight, int exponent, bool outside, Window& window) {
  const double place = std::ldexp(double(mean), POINT_BITS - exponent);
  if (!(std::fabs(place) < double(LARGEST << POINT_BITS))) return false;
  const int64_t half = ((outside ? PREDICTED : DRAWN) << WEIGHT_BITS) / (2 * weight) + 2;
  window.mean = int64_t(std::floor(place + 0.5));
  window.first = ((window.mean + (1 << (POINT_BITS - 1))) >> POINT_BITS) - half;
  window.bins = 2 * half + 1;
  window.weight = weight;
  window.top = outside ? TOTAL - 1 : TOTAL;
  return window.first >= -LARGEST && window.first + window.bins - 1 <= LARGEST;
}

bool levels_of(float mean, int64_t weight, Window& window) {
  const double place = (double(mean) + 1.0) * 127.5;
  if (!std::isfinite(place)) return false;
  const double bounded = place < -1024 ? -1024 : place > 1024 ? 1024 : place;
  window.mean = int64_t(std::floor(bounded * (1 << POINT_BITS) + 0.5));
  window.first = 0, window.bins = 256, window.weight = weight, window.top = TOTAL;
  return true;
}

}  // namespace codec
}  // namespace fastddpm
