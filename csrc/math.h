// The formulas of every op for one element, written once for the CPU kernels and the CUDA kernels.
//
// exp, log and sin/cos are polynomials that vectorise and give the same bits with every libm.
// `madd` is a fused multiply-add where the target has one: the compiler itself is told not to
// contract, so that an element's value never depends on whether it fell into a vector or into the
// loop's tail.
#pragma once
#include <cmath>

#include "types.h"

namespace fastddpm {

// Columns of the [T, K] table that Schedule.table() makes (fastddpm/schedule.py: COLUMNS).
enum Column : int {
  SQRT_AB,         // sqrt(abar_t)
  SQRT_1M_AB,      // sqrt(1 - abar_t)
  INV_SQRT_AB,     // 1 / sqrt(abar_t)
  SQRT_INV_AB_M1,  // sqrt(1 / abar_t - 1)
  MEAN_X0,         // sqrt(abar_{t-1}) beta_t / (1 - abar_t)
  MEAN_XT,         // sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t)
  SIGMA,           // standard deviation of the sampling noise
  LOG_VARIANCE,    // log sigma_t^2, finite at t = 0
  COLUMNS
};

enum class Prediction : int32_t { eps = 0, x0 = 1, mean = 2, v = 3 };

namespace {

FASTDDPM_HD float madd(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

FASTDDPM_HD double madd(double a, double b, double c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

FASTDDPM_HD float power_of_two(int32_t n) {  // 2^n for -126 <= n <= 127
  return bit_cast<float>(uint32_t(n + 127) << 23);
}

// e^x = p 2^k for |x| < 2^21: p to 2 ulp, k an integer.
FASTDDPM_HD float exponential_parts(float x, int32_t& k) {
  // x = k ln 2 + r: adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const float shifted = madd(x, 1.44269504f, 0x1.8p23f), n = shifted - 0x1.8p23f;
  k = int32_t(bit_cast<uint32_t>(shifted) - 0x4b400000u);
  float r = madd(n, -0.693359375f, x);
  r = madd(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = madd(p, r, 1.3981999507e-3f);
  p = madd(p, r, 8.3334519073e-3f);
  p = madd(p, r, 4.1665795894e-2f);
  p = madd(p, r, 1.6666665459e-1f);
  p = madd(p, r, 5.0000001201e-1f);
  return madd(p, r * r, r) + 1.0f;
}

// e^x to 2 ulp over all of float32, subnormal results, infinity and NaN included.
FASTDDPM_HD float exponential(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;  // comparisons that keep a NaN
  int32_t k;
  const float p = exponential_parts(x, k);
  const int32_t half = k >> 1;  // in two factors: 2^128 and 2^-150 are no floats
  return p * power_of_two(half) * power_of_two(k - half);
}

// e^x to 2 ulp for -87 <= x <= 88; the value at the nearer end outside. A NaN gives any number.
FASTDDPM_HD float exponential_clamped(float x) {
  // As integers floats order by magnitude, so two integer minima clamp; float ones would compile to
  // masks.
  const int32_t below = bit_cast<int32_t>(x) < 0x42b00000 ? bit_cast<int32_t>(x) : 0x42b00000;
  const uint32_t both = uint32_t(below) < 0xc2ae0000u ? uint32_t(below) : 0xc2ae0000u;
  int32_t k;
  const float p = exponential_parts(bit_cast<float>(both), k);
  return p * power_of_two(k);
}

// log(x) to 2 ulp for a normal positive x.
FASTDDPM_HD float logarithm(float x) {
  // x = 2^k m with m in [sqrt(1/2), sqrt(2)), f = m - 1.
  const uint32_t bits = bit_cast<uint32_t>(x);
  const int32_t k = int32_t(bits - 0x3f3504f3u) >> 23;
  const float f = bit_cast<float>(bits - (uint32_t(k) << 23)) - 1.0f, f2 = f * f, n = float(k);
  float p = 7.0376836292e-2f;
  p = madd(p, f, -1.1514610310e-1f);
  p = madd(p, f, 1.1676998740e-1f);
  p = madd(p, f, -1.2420140846e-1f);
  p = madd(p, f, 1.4249322787e-1f);
  p = madd(p, f, -1.6668057665e-1f);
  p = madd(p, f, 2.0000714765e-1f);
  p = madd(p, f, -2.4999993993e-1f);
  p = madd(p, f, 3.3333331174e-1f);
  p = p * f * f2;
  p = madd(n, -2.12194440e-4f, p);
  p = madd(-0.5f, f2, p);
  return madd(n, 0.693359375f, f + p);
}

// (cos(2 pi u), sin(2 pi u)) for u in [0, 1]. The reduction u = q/4 + r, |r| <= 1/8, is exact.
FASTDDPM_HD void cos_sin_2pi(float u, float& cos_out, float& sin_out) {
  const float shifted = madd(u, 4.0f, 0x1.8p23f);
  const uint32_t q = bit_cast<uint32_t>(shifted);
  const float r = madd(shifted - 0x1.8p23f, -0.25f, u), r2 = r * r;
  float s = 42.058693944897654f;
  s = madd(s, r2, -76.70585975306136f);
  s = madd(s, r2, 81.60524927607504f);
  s = madd(s, r2, -41.341702240399755f);
  s = madd(s, r2, 6.283185307179586f);
  s = s * r;
  float c = -26.426256783374397f;
  c = madd(c, r2, 60.24464137187666f);
  c = madd(c, r2, -85.45681720669373f);
  c = madd(c, r2, 64.93939402266829f);
  c = madd(c, r2, -19.739208802178716f);
  c = madd(c, r2, 1.0f);
  const bool swap = q & 1;
  const uint32_t cos_sign = ((q + 1) & 2) << 30, sin_sign = (q & 2) << 30;
  cos_out = bit_cast<float>(bit_cast<uint32_t>(swap ? s : c) ^ cos_sign);
  sin_out = bit_cast<float>(bit_cast<uint32_t>(swap ? c : s) ^ sin_sign);
}

// Two standard normals of two random words (Box-Muller); see `randn` in ops.h.
FASTDDPM_HD float unit_interval(uint32_t word) {  // fl32(fl32(word) 2^-32 + 2^-33) in (0, 1]
  return madd(float(word), 0x1p-32f, 0x1p-33f);
}

FASTDDPM_HD void box_muller(uint32_t w0, uint32_t w1, float& z0, float& z1) {
  const float radius = sqrtf(-2.0f * logarithm(unit_interval(w0)));
  float c, s;
  cos_sin_2pi(unit_interval(w1), c, s);
  z0 = radius * c;
  z1 = radius * s;
}

// Below -88 silu is v e^-88 instead of v e^v: both are 0 next to any float that matters. A GPU
// takes its own exponential, to 2 + 1.2 |v| ulp, and its own quotient, to 2 ulp: it would spend
// more time on these than on memory.
FASTDDPM_HD float over_one_plus_exp(float a, float v) {  // a / (1 + e^v)
#if defined(__CUDA_ARCH__)
  return __fdividef(a, 1.0f + __expf(v < 87.0f ? v : 87.0f));
#else
  return a / (1.0f + exponential_clamped(v));
#endif
}

FASTDDPM_HD float sigmoid(float v) { return over_one_plus_exp(1.0f, -v); }

FASTDDPM_HD float silu(float v) { return over_one_plus_exp(v, -v); }

FASTDDPM_HD float silu_gradient(float v) {  // d silu / dv
  const float s = sigmoid(v);
  return s * madd(v, 1.0f - s, 1.0f);
}

FASTDDPM_HD float to_unit(float pixel) {  // 0 .. 255 -> [-1, 1]
  return pixel / 127.5f - 1.0f;
}

// x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps   (DDPM Eq. 4); row: the table's row of t.
FASTDDPM_HD float q_sample(const float* row, float x0, float eps) {
  return madd(row[SQRT_AB], x0, row[SQRT_1M_AB] * eps);
}

// Mean of p(x_{t-1} | x_t): x0 by Eq. 15, or of v = sqrt(abar) eps - sqrt(1 - abar) x0, clipped to
// [-bound, bound], mean by Eq. 7.
FASTDDPM_HD float posterior_mean(const float* row, float xt, float out, Prediction prediction,
                                 float bound) {
  if (prediction == Prediction::mean) return out;
  float x0 = out;
  if (prediction == Prediction::eps)
    x0 = madd(row[INV_SQRT_AB], xt, -(row[SQRT_INV_AB_M1] * out));
  else if (prediction == Prediction::v)
    x0 = madd(row[SQRT_AB], xt, -(row[SQRT_1M_AB] * out));
  x0 = x0 > bound ? bound : x0;
  x0 = x0 < -bound ? -bound : x0;
  return madd(row[MEAN_X0], x0, row[MEAN_XT] * xt);
}

// How sigma follows from what the model says of it, at a row whose sigma is not 0. The word is log
// sigma^2, or, in a learned range, where it lies from -1, log beta-tilde, to 1, log beta.
struct Deviation {
  float base, slope, offset;

  FASTDDPM_HD float of(float word) const { return base * exponential(madd(slope, word, offset)); }
};

FASTDDPM_HD Deviation deviation(const float* row, bool learned_range) {
  if (!learned_range) return {1.0f, 0.5f, 0.0f};
  const float quarter = 0.5f * madd(0.5f, row[LOG_VARIANCE], -logarithm(row[SIGMA]));
  return {row[SIGMA], quarter, quarter};
}

FASTDDPM_HD float clip_bound(bool clip) { return clip ? 1.0f : bit_cast<float>(0x7f800000u); }

// What a step of Adam is for all elements of a tensor.
struct AdamRates {
  float scale;                // of the gradient
  float rest1, beta2, rest2;  // rest: 1 - beta
  float eps;
  float step_size;  // lr / (1 - beta1^step)
  float root;       // 1 / sqrt(1 - beta2^step)
};

FASTDDPM_HD AdamRates adam_rates(double beta1, double beta2, double eps, float scale, float lr,
                                 float step) {
  return {scale,
          float(1.0 - beta1),
          float(beta2),
          float(1.0 - beta2),
          float(eps),
          float(double(lr) / (1.0 - pow(beta1, double(step)))),
          float(1.0 / sqrt(1.0 - pow(beta2, double(step))))};
}

// m <- beta1 m + (1 - beta1) g, v <- beta2 v + (1 - beta2) g^2, p <- p - lr mhat / (sqrt(vhat) +
// eps).
FASTDDPM_HD void adam(const AdamRates& rates, float g, float& p, float& m, float& v) {
  g *= rates.scale;
  m = madd(rates.rest1, g - m, m);
  v = madd(rates.rest2 * g, g, rates.beta2 * v);
  p = madd(-rates.step_size, m / madd(sqrtf(v), rates.root, rates.eps), p);
}

FASTDDPM_HD float moved_average(float average, float p, float share) {
  return madd(share, p - average, average);
}

// What gradients of grad_scale times the loss are multiplied with, so that their norm is at most
// clip: `norm` is that of the loss's own, and not asked for where it is null.
FASTDDPM_HD float gradient_scale(const float* norm, float clip, float grad_scale) {
  const float over = norm ? (*norm + 1e-6f) / clip : 0.0f;
  return 1.0f / ((over > 1.0f ? over : 1.0f) * grad_scale);
}

// Whether a step counts: it is not refused, and the norm of its gradients is finite.
FASTDDPM_HD bool step_counts(const float* refused, const float* norm) {
  return !(refused && !(*refused == 0.0f)) && !(norm && !(fabsf(*norm) <= 0x1.fffffep127f));
}

// ---- float64, for log_bin_mass -----------------------------------------------------------------

// 2^k: its product with a p near 1 as a sum of exponents, which vectorises without 64-bit products.
FASTDDPM_HD double times_power_of_two(double p, uint64_t k) {
  return bit_cast<double>(bit_cast<uint64_t>(p) + (k << 52));
}

// e^x to 1.2e-12 for |x| <= 700; the value at the nearer end outside, and a NaN stays one.
FASTDDPM_HD double exponential(double x) {
  x = x < -700.0 ? -700.0 : x;
  x = x > 700.0 ? 700.0 : x;
  // As exponential_parts(float), with 1.5 * 2^52.
  const double shifted = madd(x, 1.4426950408889634, 0x1.8p52), n = shifted - 0x1.8p52;
  double r = madd(n, -0x1.62e42feep-1, x);
  r = madd(n, -0x1.a39ef35793c76p-33, r);
  double p = 2.4708611541816662e-5;
  p = madd(p, r, 1.9908938913189042e-4);
  p = madd(p, r, 1.388919641187941e-3);
  p = madd(p, r, 8.3332818074173903e-3);
  p = madd(p, r, 4.1666664409667809e-2);
  p = madd(p, r, 1.6666666784448211e-1);
  p = madd(p, r, 5.0000000004260703e-1);
  return times_power_of_two(madd(p, r * r, r) + 1.0, bit_cast<uint64_t>(shifted));
}

// log(x) to 5e-12 of itself, next to 1 too, for a normal positive x; any number for another.
FASTDDPM_HD double logarithm(double x) {
  // x = 2^k m with m in [sqrt(1/2), sqrt(2)), s = (m - 1) / (m + 1); `biased` is k + 1023, which in
  // the low bits of 2^52 is a float64.
  const uint64_t bits = bit_cast<uint64_t>(x);
  const uint64_t biased = (bits + (0x3ff0000000000000u - 0x3fe6a09e667f3bcdu)) >> 52;
  const double k = bit_cast<double>(0x4330000000000000u | biased) - (0x1p52 + 1023.0);
  const double f = times_power_of_two(x, 1023 - biased) - 1.0, s = f / (2.0 + f), z = s * s;
  double p = 2.3582331082234741e-1;
  p = madd(p, z, 2.8537297564680567e-1);
  p = madd(p, z, 4.0000335400032544e-1);
  p = madd(p, z, 6.6666665644249825e-1);
  return madd(k, 0.6931471805599453, madd(s * z, p, s + s));
}

// e^(a^2 / 2) Phi(-a) = numerator / denominator to 2.7e-11 for every a >= 0. All coefficients are
// positive, so nothing cancels. Minimax over [0, inf).
FASTDDPM_HD void scaled_tail(double a, double& numerator, double& denominator) {
  a = a > 1e10 ? 1e10 : a;  // where the logarithm of the tail is -a^2 / 2 to all digits
  double p = 2.87603158739106513e-4;
  p = madd(p, a, 4.26248726008468172e-3);
  p = madd(p, a, 3.07693168979508816e-2);
  p = madd(p, a, 1.34313393547806466e-1);
  p = madd(p, a, 3.70958307667772296e-1);
  p = madd(p, a, 6.18197367425410723e-1);
  numerator = madd(p, a, 5.00000000013161803e-1);
  double q = 7.20914209549631716e-4;
  q = madd(q, a, 1.06844711065309284e-2);
  q = madd(q, a, 7.78481505603232639e-2);
  q = madd(q, a, 3.4735843697239144e-1);
  q = madd(q, a, 1.00553288498322117);
  q = madd(q, a, 1.8650366130063143);
  q = madd(q, a, 2.03427929843211241);
  denominator = madd(q, a, 1.0);
}

// log of the mass that N(mean, sigma^2) puts on the bin [x - 1/255, x + 1/255]   (DDPM Eq. 13). The
// first bin reaches to -inf and the last to +inf. To 2e-9 of itself, without branches.
FASTDDPM_HD double log_bin_mass(double x, double mean, double log_sigma) {
  const bool first = x < -0.999, last = x > 0.999, outer = first | last;
  double clamped = log_sigma < -300.0 ? -300.0 : log_sigma;
  clamped = clamped > 300.0 ? 300.0 : clamped;
  const double inv_sigma = exponential(-clamped), half = 1.0 / 255.0;

  // In units of sigma from the mean, mirrored so that it lies below: the bin's centre c and width
  // w, its lower edge a, which is the inner one of an outer bin, and its upper edge b.
  const double offset = x - mean, mirrored = first ? -offset : offset;
  const double distance = (outer | (offset > 0.0)) ? mirrored : -mirrored;
  const double c = distance * inv_sigma, w = 2.0 * half * inv_sigma;
  const double a = (distance - half) * inv_sigma, b = outer ? 0.0 : (distance + half) * inv_sigma;
  const bool below = a < 0.0;  // the mean is in the bin

  // With t(v) = e^(v^2 / 2) Phi(-v): above the mean the mass is e^(-a^2 / 2) (t(a) - e^(-wc) t(b)),
  // around it 1 - e^(-a^2 / 2) (t(-a) + e^(-wc) t(b)).
  double a_numerator, a_denominator, b_numerator, b_denominator;
  scaled_tail(below ? -a : a, a_numerator, a_denominator);
  scaled_tail(b, b_numerator, b_denominator);
  const double ratio = outer ? 0.0 : exponential(-(w * c)), square = -0.5 * a * a;
  const double beyond = (below ? ratio : -ratio) * b_numerator;
  const double tail =
      madd(a_numerator, b_denominator, beyond * a_denominator) / (a_denominator * b_denominator);
  const double missing = exponential(square) * tail, rest = 1.0 - missing;
  // What 1 - missing rounded off counts where it is all there is.
  const double mass = logarithm(below ? rest : tail) + (below ? (1.0 - rest) - missing : square);

  // Where the density hardly varies over the bin the difference of tails cancels; its series about
  // c, with an error of 7e-10, does not.
  const double density = -0.5 * c * c - log_sigma + (-5.767054897803154);
  const bool narrow = (w * (1.0 + c) < 0.03125) & !outer;
  return narrow ? madd(madd(c, c, -1.0), w * w * (1.0 / 24.0), density) : mass;
}

}  // namespace
}  // namespace fastddpm
