// Sums of squares of float32, in float64: no square is rounded there, so that the sum has the same
// bits with every instruction set.
#pragma once
#include <cstdint>

namespace fastddpm {
namespace {

constexpr int64_t LANES = 32;  // side by side, added in pairs at the end

// The sum of value(i)^2 over i in [0, count), in an order of its own. value: float(int64_t).
template <class Value>
inline double sum_of_squares(int64_t count, const Value& value) {
  double lanes[LANES] = {};
  const int64_t whole = count / LANES * LANES;
  for (int64_t first = 0; first < whole; first += LANES)
    for (int64_t k = 0; k < LANES; ++k) {
      const double x = double(value(first + k));
      lanes[k] += x * x;
    }
  for (int64_t i = whole; i < count; ++i) lanes[i - whole] += double(value(i)) * double(value(i));
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  return lanes[0];
}

}  // namespace
}  // namespace fastddpm
