// Runs convolution and its gradient under a sanitizer, with memory that is full of NaN when it is
// handed out, against the definition in float64: gradients by what a small step changes. Prints
// what is wrong; exit code 1 if anything is.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "check.h"

using namespace fastddpm;

namespace {

struct Case {
  int64_t n, c1, c2, c_out, h, w, kernel, stride, before, after, upsample, groups;
  bool silu, drop, last;  // last: channels last, else (N, C, H, W)
};

using Values = std::map<std::string, std::vector<float>>;

// Memory of exactly the size, so that a step out of it is seen.
Tensor tensor(std::vector<float>& x, int64_t c, int64_t h, int64_t w, bool last) {
  x.shrink_to_fit();
  if (last) return {x.data(), DType::f32, {c * h * w, 1, w * c, c}};
  return {x.data(), DType::f32, {c * h * w, h * w, w, 1}};
}

const int64_t steps[] = {3, 4, 5, 6, 7, 8}, samples[] = {10, 20, 30, 40, 50, 60};

Convolution operation(const Case& c, Values& v, bool rounded) {
  Convolution op{};
  const int64_t channels = c.c1 + c.c2, border = c.before + c.after - c.kernel;
  op.source = {c.n, channels, c.h, c.w};
  op.shape = {c.n, c.c_out, (c.h * c.upsample + border) / c.stride + 1,
              (c.w * c.upsample + border) / c.stride + 1};
  op.c1 = c.c1, op.kernel = c.kernel, op.stride = c.stride;
  op.before = c.before, op.after = c.after, op.upsample = c.upsample, op.rounded = rounded;
  op.x = tensor(v["x"], c.c1, c.h, c.w, c.last);
  if (c.c2) op.x2 = tensor(v["x2"], c.c2, c.h, c.w, !c.last);
  op.weight = tensor(v["weight"], channels, c.kernel, c.kernel, c.last);
  op.bias = {v["bias"].data(), DType::f32, 0, 1};
  op.shift = {v["shift"].data(), DType::f32, c.c_out, 1};
  op.groups = c.groups, op.eps = 1e-3f, op.silu = c.silu;
  if (c.groups) {
    op.norm_weight = {v["norm_weight"].data(), DType::f32, 0, 1};
    op.norm_bias = {v["norm_bias"].data(), DType::f32, 0, 1};
  }
  op.dropout = {1.0f, 0, {}};
  if (c.drop) op.dropout = {2.0f, 1u << 31, {7, {steps, 1}, {samples, 1}, nullptr}};
  return op;
}

double at(const Values& v, const char* name, const Case& c, int64_t channels, int64_t n, int64_t i,
          int64_t y, int64_t x, bool last) {
  const int64_t place =
      last ? ((n * c.h + y) * c.w + x) * channels + i : ((n * channels + i) * c.h + y) * c.w + x;
  return v.at(name)[size_t(place)];
}

// The sum of grad y by the definition.
double definition(const Case& c, const Values& v, const Convolution& op,
                  const std::vector<uint32_t>& kept, const std::vector<float>& grad) {
  const int64_t channels = c.c1 + c.c2, pixels = c.h * c.w;
  double total = 0.0;
  for (int64_t n = 0; n < c.n; ++n) {
    std::vector<double> h(size_t(channels * pixels));
    for (int64_t i = 0; i < channels; ++i)
      for (int64_t p = 0; p < pixels; ++p)
        h[i * pixels + p] = i < c.c1 ? at(v, "x", c, c.c1, n, i, p / c.w, p % c.w, c.last)
                                     : at(v, "x2", c, c.c2, n, i - c.c1, p / c.w, p % c.w, !c.last);
    const int64_t size = c.groups ? channels * pixels / c.groups : 1;
    for (int64_t first = 0; c.groups && first < channels * pixels; first += size) {
      double mean = 0.0, square = 0.0;
      for (int64_t k = 0; k < size; ++k) mean += h[first + k] / double(size);
      for (int64_t k = 0; k < size; ++k)
        square += (h[first + k] - mean) * (h[first + k] - mean) / double(size);
      for (int64_t k = 0; k < size; ++k)
        h[first + k] = (h[first + k] - mean) / std::sqrt(square + double(op.eps));
    }
    for (int64_t i = 0; i < channels; ++i)
      for (int64_t p = 0; p < pixels; ++p) {
        double& value = h[i * pixels + p];
        if (c.groups) value = value * v.at("norm_weight")[i] + v.at("norm_bias")[i];
        if (c.silu) value /= 1.0 + std::exp(-value);
        if (c.drop) value *= kept[(n * pixels + p) * channels + i] ? 2.0 : 0.0;
      }
    const Shape& shape = op.shape;
    for (int64_t o = 0; o < c.c_out; ++o)
      for (int64_t p = 0; p < shape.h * shape.w; ++p) {
        double sum = double(v.at("bias")[o]) + v.at("shift")[n * c.c_out + o];
        for (int64_t k = 0; k < c.kernel * c.kernel; ++k) {
          const int64_t y = p / shape.w * c.stride + k / c.kernel - c.before;
          const int64_t x = p % shape.w * c.stride + k % c.kernel - c.before;
          if (y < 0 || x < 0 || y >= c.h * c.upsample || x >= c.w * c.upsample) continue;
          for (int64_t i = 0; i < channels; ++i) {
            const int64_t taps = c.kernel * c.kernel;
            const int64_t w =
                c.last ? (o * taps + k) * channels + i : (o * channels + i) * taps + k;
            sum += v.at("weight")[w] * h[i * pixels + y / c.upsample * c.w + x / c.upsample];
          }
        }
        total += sum * grad[(n * c.c_out + o) * shape.h * shape.w + p];
      }
  }
  return total;
}

// Which elements the dropout keeps: those of ones that a convolution with the identity lets pass.
std::vector<uint32_t> kept_of(const Case& c) {
  const int64_t channels = c.c1 + c.c2;
  Case one{c.n, channels, 0, channels, c.h, c.w, 1, 1, 0, 0, 1, 0, false, true, true};
  Values v;
  v["x"].assign(size_t(c.n * channels * c.h * c.w), 1.0f);
  v["weight"].assign(size_t(channels * channels), 0.0f);
  for (int64_t i = 0; i < channels; ++i) v["weight"][i * channels + i] = 1.0f;
  v["bias"].assign(channels, 0.0f), v["shift"].assign(c.n * channels, 0.0f);
  Convolution op = operation(one, v, false);
  std::vector<float> y(v["x"].size(), NAN);
  op.y = tensor(y, channels, c.h, c.w, true);
  cpu::convolution(op, 1);
  return {y.begin(), y.end()};
}

void expect(bool right, const Case& c, const std::string& what, double a, double b) {
  if (right) return;
  ++failures;
  std::printf("%lldx%lld->%lld %lldx%lld kernel %lld stride %lld: %s is %g, not %g\n",
              (long long)c.c1, (long long)c.c2, (long long)c.c_out, (long long)c.h, (long long)c.w,
              (long long)c.kernel, (long long)c.stride, what.c_str(), a, b);
}

struct Result {
  std::vector<float> y;
  Values gradients;
};

Result run(const Case& c, Values& v, std::vector<float>& grad, bool rounded, int threads) {
  Result result;
  ConvolutionBackward op{};
  op.forward = operation(c, v, rounded);
  const Shape& shape = op.forward.shape;
  result.y.assign(grad.size(), NAN);
  op.forward.y = tensor(result.y, shape.c, shape.h, shape.w, c.last);
  cpu::convolution(op.forward, threads);
  for (auto& [name, values] : v) result.gradients[name].assign(values.size(), NAN);
  Values& d = result.gradients;
  op.grad = tensor(grad, shape.c, shape.h, shape.w, false);
  op.dx = tensor(d["x"], c.c1, c.h, c.w, c.last);
  if (c.c2) op.dx2 = tensor(d["x2"], c.c2, c.h, c.w, !c.last);
  op.dweight = d["weight"].data();
  std::copy_n(op.forward.weight.stride, 4, op.dweight_stride);
  op.dbias = d["bias"].data(), op.dshift = d["shift"].data();
  if (c.groups) op.dnorm_weight = d["norm_weight"].data(), op.dnorm_bias = d["norm_bias"].data();
  cpu::convolution_backward(op, threads);
  return result;
}

void check(const Case& c, bool rounded) {
  const int64_t channels = c.c1 + c.c2, terms = channels * c.kernel * c.kernel;
  Values v;
  v["x"] = normals(c.n * c.c1 * c.h * c.w);
  if (c.c2) v["x2"] = normals(c.n * c.c2 * c.h * c.w);
  v["weight"] = normals(c.c_out * terms);
  for (float& w : v["weight"]) w /= std::sqrt(float(terms));
  v["bias"] = normals(c.c_out), v["shift"] = normals(c.n * c.c_out);
  if (c.groups) v["norm_weight"] = normals(channels), v["norm_bias"] = normals(channels);
  const Convolution op = operation(c, v, rounded);
  std::vector<float> grad = normals(c.n * c.c_out * op.shape.h * op.shape.w);
  const Result one = run(c, v, grad, rounded, 1), three = run(c, v, grad, rounded, 3);
  const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
    return !std::memcmp(a.data(), b.data(), a.size() * sizeof(float));
  };
  expect(same(one.y, three.y), c, "y with three threads", 1, 0);
  const std::vector<uint32_t> kept = c.drop ? kept_of(c) : std::vector<uint32_t>();
  double sum = 0.0;
  for (int64_t n = 0, at = 0; n < c.n; ++n)
    for (int64_t o = 0; o < c.c_out; ++o)
      for (int64_t p = 0; p < op.shape.h * op.shape.w; ++p, ++at) {
        const int64_t pixels = op.shape.h * op.shape.w;
        sum += double(grad[at]) * one.y[c.last ? (n * pixels + p) * c.c_out + o : at];
      }
  const double true_sum = definition(c, v, op, kept, grad);
  const double scale = std::sqrt(double(grad.size())) * 4;
  const double tolerance = rounded ? 2e-2 : 3e-5;
  expect(std::abs(sum - true_sum) <= tolerance * scale, c, "y", sum, true_sum);
  for (auto& [name, values] : v) {
    const std::vector<float>& d = one.gradients.at(name);
    expect(same(d, three.gradients.at(name)), c, name + "'s gradient with three threads", 1, 0);
    const std::vector<float> direction = normals(int64_t(values.size()));
    constexpr float STEP = 0x1p-9f;
    double slope = 0.0, size = 0.0;
    Values near = v;
    for (int sign : {1, -1}) {
      for (size_t i = 0; i < values.size(); ++i)
        near[name][i] = values[i] + float(sign) * STEP * direction[i];
      slope += sign * definition(c, near, op, kept, grad) / (2.0 * STEP);
    }
    double got = 0.0;
    for (size_t i = 0; i < values.size(); ++i)
      got += double(d[i]) * direction[i], size += double(d[i]) * d[i];
    const double allowed = (rounded ? 3e-2 : 1e-3) * (std::sqrt(size) + 1.0);
    expect(std::abs(got - slope) <= allowed, c, name + "'s gradient", got, slope);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool rounded = argc > 1 && !std::strcmp(argv[1], "bf16");
  const Case cases[] = {
      {2, 5, 3, 7, 5, 4, 3, 1, 1, 1, 1, 4, true, true, true},
      {3, 6, 0, 5, 9, 7, 3, 2, 0, 1, 1, 0, false, false, false},
      {2, 4, 4, 3, 3, 5, 3, 1, 1, 1, 2, 2, true, false, true},
      {2, 4, 0, 3, 4, 3, 3, 1, 1, 0, 2, 0, true, true, false},
      {2, 7, 2, 35, 3, 4, 1, 1, 0, 0, 1, 0, false, false, true},
      {1, 3, 0, 4, 3, 3, 1, 2, 1, 0, 1, 1, false, true, true},
      {2, 33, 0, 40, 8, 8, 3, 1, 1, 1, 1, 3, true, false, true},
      {1, 4, 0, 4, 1, 1, 3, 1, 1, 1, 1, 2, false, false, true},
  };
  for (const Case& c : cases) check(c, rounded);
  std::printf("%d of the results are wrong\n", failures);
  return failures > 0;
}
