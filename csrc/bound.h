// A term of the variational bound for one element (DDPM Eq. 5 and 13), written once for the CPU
// kernels and the CUDA kernels. float64: late terms are a millionth of what their sums cancel.
#pragma once
#include "math.h"

namespace fastddpm {
namespace {

// What all elements of a sample have in common at its step.
struct BoundStep {
  double scale, shift;          // x0 = scale value + shift: bytes to [-1, 1], floats as they are
  bool reads_xt;                // or the x0 prediction is the model's output itself
  double from_xt, from_output;  // x0 prediction = from_xt x_t + from_output output
  double clip, mean_clip;       // what it is clipped to in the mse, and in p's mean
  double mean_x0, mean_xt;      // p's mean = mean_x0 (x0 prediction) + mean_xt x_t
  double true_log_variance;     // of q(x_{t-1} | x_t, x_0)
  double precision;             // e^-true_log_variance
  double offset, slope;         // true_log_variance - log sigma^2 of p = offset + slope word
  bool decoder;                 // t = 0: the term is -log p(x_0 | x_1)

  FASTDDPM_HD double x0(float value) const { return madd(scale, double(value), shift); }

  FASTDDPM_HD double predicted(float xt, float output) const {
    const double both = madd(from_xt, double(xt), from_output * double(output));
    return reads_xt ? both : double(output);
  }

  // The square of what is left of x0 when a prediction of it was taken off, clipped for the mse.
  FASTDDPM_HD double square(double x0, double prediction) const {
    const double d = x0 - clipped(prediction, clip);
    return d * d;
  }

  // KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of an element in nats; word: what the model says
  // of its variance, 0 if it says nothing. Both means have the same part of x_t.
  FASTDDPM_HD double kl(double x0, double prediction, float word) const {
    const double apart = madd(slope, double(word), offset);
    const double mean = mean_x0 * (x0 - clipped(prediction, mean_clip));
    const double ratio = exponential(apart);
    // e^apart - 1 - apart, by its series where that cancels.
    double series = madd(apart, 1.0 / 120.0, 1.0 / 24.0);
    series = madd(madd(series, apart, 1.0 / 6.0), apart, 0.5) * apart * apart;
    const bool close = apart < 0.01 && apart > -0.01;
    const double excess = close ? series : (ratio - 1.0) - apart;
    return 0.5 * (excess + mean * mean * precision * ratio);
  }

  // -log of the mass of p in the pixel's bin, in nats.
  FASTDDPM_HD double nll(double x0, double prediction, float xt, float word) const {
    const double mean = madd(mean_x0, clipped(prediction, mean_clip), mean_xt * double(xt));
    return -log_bin_mass(x0, mean, 0.5 * (true_log_variance - madd(slope, double(word), offset)));
  }

  FASTDDPM_HD static double clipped(double x, double bound) {  // comparisons that keep a NaN
    x = x > bound ? bound : x;
    return x < -bound ? -bound : x;
  }
};

// row: the table's of the sample's t;  log_ratio: its LOG_VARIANCE less log beta-tilde;  learned,
// learned_range: whether the model says log sigma^2, or where it lies from log beta-tilde (-1) to
// LOG_VARIANCE (1).
FASTDDPM_HD BoundStep bound_step(const float* row, float log_ratio, bool decoder, bool bytes,
                                 Prediction prediction, bool clip, bool learned,
                                 bool learned_range) {
  const double infinity = bit_cast<double>(uint64_t(0x7ff0000000000000u));
  const bool is_mean = prediction == Prediction::mean;
  const double mean_x0 = row[MEAN_X0], mean_xt = row[MEAN_XT];
  double from_xt = 0.0, from_output = 1.0;
  if (prediction == Prediction::eps)
    from_xt = row[INV_SQRT_AB], from_output = -double(row[SQRT_INV_AB_M1]);
  else if (prediction == Prediction::v)
    from_xt = row[SQRT_AB], from_output = -double(row[SQRT_1M_AB]);
  else if (is_mean)
    from_xt = -mean_xt / mean_x0, from_output = 1.0 / mean_x0;
  const double ratio = log_ratio, true_log_variance = double(row[LOG_VARIANCE]) - ratio;
  return {bytes ? 1.0 / 127.5 : 1.0,
          bytes ? -1.0 : 0.0,
          prediction != Prediction::x0,
          from_xt,
          from_output,
          clip ? 1.0 : infinity,
          clip && !is_mean ? 1.0 : infinity,
          mean_x0,
          mean_xt,
          true_log_variance,
          exponential(-true_log_variance),
          !learned        ? -ratio
          : learned_range ? -0.5 * ratio
                          : true_log_variance,
          !learned        ? 0.0
          : learned_range ? -0.5 * ratio
                          : -1.0,
          decoder};
}

// What a sum of nats over so many elements is in bits/dim.
FASTDDPM_HD double bits_per_dim(double nats, int64_t elements) {
  return nats / (0.6931471805599453 * double(elements));
}

}  // namespace
}  // namespace fastddpm
