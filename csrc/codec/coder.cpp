#include "coder.h"

#include <cmath>

#include "gaussian.h"

namespace fastddpm {
namespace codec {
namespace {

constexpr double LEVEL = 1.0 / 127.5;  // between two levels of a pixel in [-1, 1]
constexpr Interval ESCAPE{TOTAL - 1, 1};

// body(i, weight) for each of them in their order, until one is not done.
template <class Body>
Status each(const Gaussians& of, int exponent, double unit, const Body& body) {
  int64_t weight = of.log_variance ? 0 : weight_of(of.common, exponent, unit);
  for (int64_t k = 0; k < of.count; ++k) {
    const int64_t i = of.backwards ? of.count - 1 - k : k;
    if (of.log_variance) weight = weight_of(of.log_variance[i], exponent, unit);
    if (weight < 0 || !std::isfinite(of.mean[i])) return Status::not_finite;
    const Status status = body(i, weight);
    if (status != Status::done) return status;
  }
  return Status::done;
}

// An index that no window holds, in two halves of 16 bits.
void push_escaped(Rans& rans, int64_t index) {
  const auto bits = uint32_t(index + LARGEST);
  for (uint32_t half : {bits & 0xffff, bits >> 16}) rans.push({half << 12, 1 << 12});
  rans.push(ESCAPE);
}

Status pop_escaped(Rans& rans, int64_t& index) {
  if (!rans.pop(ESCAPE)) return Status::exhausted;
  uint32_t bits = 0;
  for (int half = 0; half < 2; ++half) {
    const uint32_t word = rans.slot() >> 12;
    if (!rans.pop({word << 12, 1 << 12})) return Status::exhausted;
    bits = bits << 16 | word;
  }
  index = int64_t(bits) - LARGEST;
  return index > LARGEST ? Status::outside : Status::done;
}

}  // namespace

Status push(Rans& rans, const Gaussians& of, const float* values) {
  return each(of, of.exponent, 1.0, [&](int64_t i, int64_t weight) {
    Window window;
    if (!window_of(of.mean[i], weight, of.exponent, of.outside, window)) return Status::off_grid;
    const double place = std::ldexp(double(values[i]), -of.exponent);
    if (!(std::fabs(place) <= double(LARGEST)) || place != std::floor(place))
      return Status::off_grid;
    const int64_t index = int64_t(place), j = index - window.first;
    if (j >= 0 && j < window.bins)
      rans.push(window.at(j));
    else if (of.outside)
      push_escaped(rans, index);
    else
      return Status::outside;
    return Status::done;
  });
}

Status pop(Rans& rans, const Gaussians& of, float* values) {
  return each(of, of.exponent, 1.0, [&](int64_t i, int64_t weight) {
    Window window;
    if (!window_of(of.mean[i], weight, of.exponent, of.outside, window)) return Status::off_grid;
    const uint32_t slot = rans.slot();
    int64_t index = 0;
    if (slot < window.top) {
      Interval interval;
      index = window.first + window.find(slot, interval);
      if (!rans.pop(interval)) return Status::exhausted;
    } else {
      const Status status = pop_escaped(rans, index);
      if (status != Status::done) return status;
      // The encoder escapes from no bin of the window.
      if (index >= window.first && index < window.first + window.bins) return Status::outside;
    }
    values[i] = float(std::ldexp(double(index), of.exponent));
    return Status::done;
  });
}

Status push_levels(Rans& rans, const Gaussians& of, const uint8_t* pixels) {
  return each(of, 0, LEVEL, [&](int64_t i, int64_t weight) {
    Window window;
    if (!levels_of(of.mean[i], weight, window)) return Status::not_finite;
    rans.push(window.at(pixels[i]));
    return Status::done;
  });
}

Status pop_levels(Rans& rans, const Gaussians& of, uint8_t* pixels) {
  return each(of, 0, LEVEL, [&](int64_t i, int64_t weight) {
    Window window;
    if (!levels_of(of.mean[i], weight, window)) return Status::not_finite;
    Interval interval;
    const int64_t level = window.find(rans.slot(), interval);
    if (!rans.pop(interval)) return Status::exhausted;
    pixels[i] = uint8_t(level);
    return Status::done;
  });
}

}  // namespace codec
}  // namespace fastddpm
