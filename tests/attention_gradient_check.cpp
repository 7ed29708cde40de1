// Runs the gradient of attention of bfloat16 operands under a sanitizer, with memory that is full
// of NaN when it is handed out, against the sums in float64. Prints what is wrong; exit code 1 if
// anything is.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "check.h"

using namespace fastddpm;

namespace {

struct Case {
  int64_t images, pixels, channels, heads, extra;  // extra: values of a pixel beyond its channels
};

struct Result {
  std::vector<float> mixed, dqkv;  // (images, pixels, C) and (images, pixels, 3C)
  std::vector<double> sums;
};

std::vector<float> rounded(int64_t count) {
  std::vector<float> x = normals(count);
  for (float& value : x) value = to_float(from_float<BF16>(value));
  return x;
}

// The values of each pixel; what lies behind them must be as it was.
std::vector<float> without_gaps(const std::vector<BF16>& x, int64_t pixel, int64_t channels) {
  std::vector<float> values;
  for (size_t i = 0; i < x.size(); ++i)
    if (int64_t(i) % pixel < channels)
      values.push_back(to_float(x[i]));
    else if (x[i].bits != 0x1234)
      ++failures, std::printf("a value behind a pixel was written\n");
  return values;
}

Result gradient(const Case& c, const float* qkv, const float* dmixed, int threads) {
  const int64_t pixels = c.images * c.pixels;
  AttentionGradient op{};
  op.images = c.images, op.pixels = c.pixels, op.channels = c.channels, op.heads = c.heads;
  op.qkv = qkv, op.dmixed = dmixed;
  op.mixed_pixel = c.channels + c.extra, op.dqkv_pixel = 3 * c.channels + c.extra;
  std::vector<BF16> mixed(size_t(pixels * op.mixed_pixel), BF16{0x1234});
  std::vector<BF16> dqkv(size_t(pixels * op.dqkv_pixel), BF16{0x1234});
  Result result;
  result.sums.assign(size_t(c.images * 3 * c.channels), NAN);
  op.mixed = mixed.data(), op.dqkv = dqkv.data(), op.sums = result.sums.data();
  const int64_t size = plain::attention_gradient_workspace_bf16(op, threads);
  float* workspace = static_cast<float*>(cpu::scratch_alloc(size * 4, false));
  plain::attention_gradient_bf16(op, workspace, threads);
  cpu::scratch_free(workspace);
  result.mixed = without_gaps(mixed, op.mixed_pixel, c.channels);
  result.dqkv = without_gaps(dqkv, op.dqkv_pixel, 3 * c.channels);
  return result;
}

Result truth_of(const Case& c, const float* qkv, const float* dmixed) {
  const int64_t L = c.pixels, C = c.channels, depth = C / c.heads;
  Result truth;
  truth.mixed.assign(size_t(c.images * L * C), 0.0f);
  truth.dqkv.assign(size_t(c.images * L * 3 * C), 0.0f);
  std::vector<double> dqkv(truth.dqkv.size()), mixed(truth.mixed.size());
  std::vector<double> p(static_cast<size_t>(L)), ds(static_cast<size_t>(L));
  for (int64_t n = 0; n < c.images; ++n)
    for (int64_t h = 0; h < c.heads; ++h) {
      const auto at = [&](int64_t part, int64_t i, int64_t j) {
        return ((n * L + i) * 3 + part) * C + h * depth + j;
      };
      const auto out = [&](int64_t i, int64_t j) { return (n * L + i) * C + h * depth + j; };
      for (int64_t i = 0; i < L; ++i) {
        double sum = 0.0, mean = 0.0;
        for (int64_t k = 0; k < L; ++k) {
          double s = 0.0;
          for (int64_t j = 0; j < depth; ++j) s += double(qkv[at(0, i, j)]) * qkv[at(1, k, j)];
          sum += p[k] = std::exp(s / std::sqrt(double(depth)));
        }
        for (int64_t k = 0; k < L; ++k) {
          p[k] /= sum, ds[k] = 0.0;
          for (int64_t j = 0; j < depth; ++j) {
            ds[k] += double(dmixed[out(i, j)]) * qkv[at(2, k, j)];
            mixed[out(i, j)] += p[k] * qkv[at(2, k, j)];
            dqkv[at(2, k, j)] += p[k] * dmixed[out(i, j)];
          }
          mean += p[k] * ds[k];
        }
        for (int64_t k = 0; k < L; ++k)
          for (int64_t j = 0; j < depth; ++j) {
            const double g = p[k] * (ds[k] - mean) / std::sqrt(double(depth));
            dqkv[at(0, i, j)] += g * qkv[at(1, k, j)];
            dqkv[at(1, k, j)] += g * qkv[at(0, i, j)];
          }
      }
    }
  for (size_t i = 0; i < dqkv.size(); ++i) truth.dqkv[i] = float(dqkv[i]);
  for (size_t i = 0; i < mixed.size(); ++i) truth.mixed[i] = float(mixed[i]);
  return truth;
}

double distance(const std::vector<float>& x, const std::vector<float>& truth) {
  double error = 0.0, size = 0.0;
  for (size_t i = 0; i < truth.size(); ++i) {
    error += (double(x[i]) - truth[i]) * (double(x[i]) - truth[i]);
    size += double(truth[i]) * truth[i];
  }
  return std::sqrt(error / (size > 0.0 ? size : 1.0));
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

void check(const Case& c) {
  const std::vector<float> qkv = rounded(c.images * c.pixels * 3 * c.channels);
  const std::vector<float> dmixed = rounded(c.images * c.pixels * c.channels);
  const Result one = gradient(c, qkv.data(), dmixed.data(), 1);
  const Result truth = truth_of(c, qkv.data(), dmixed.data());
  // P and dS are rounded, and the results.
  bool good = distance(one.mixed, truth.mixed) < 5e-3 && distance(one.dqkv, truth.dqkv) < 8e-3;
  for (int64_t n = 0; n < c.images; ++n)
    for (int64_t j = 0; j < 3 * c.channels; ++j) {
      double sum = 0.0, size = 1e-30;
      for (int64_t i = 0; i < c.pixels; ++i) {
        const double value = one.dqkv[(n * c.pixels + i) * 3 * c.channels + j];
        sum += value, size += std::fabs(value);
      }
      good &= std::fabs(one.sums[n * 3 * c.channels + j] - sum) <= 1e-6 * size;
    }
  for (int threads : {2, 7}) {
    const Result other = gradient(c, qkv.data(), dmixed.data(), threads);
    good &=
        same(one.mixed, other.mixed) && same(one.dqkv, other.dqkv) && same(one.sums, other.sums);
  }
  failures += !good;
  if (!good)
    std::printf("%ld images of %ld pixels, %ld channels, %ld heads: off by %.2g and %.2g\n",
                long(c.images), long(c.pixels), long(c.channels), long(c.heads),
                distance(one.mixed, truth.mixed), distance(one.dqkv, truth.dqkv));
}

}  // namespace

int main() {
  // One pixel; odd sizes; heads narrower and wider than a block; more queries than a group holds.
  for (const Case& c : {Case{2, 1, 6, 3, 0}, Case{2, 7, 6, 1, 2}, Case{1, 70, 40, 1, 24},
                        Case{2, 33, 66, 2, 0}, Case{1, 300, 36, 2, 28}})
    check(c);
  std::printf("%d of the gradients are wrong\n", failures);
  return failures ? 1 : 0;
}
