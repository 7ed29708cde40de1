// Runs native plans under a sanitizer, with memory that is full of NaN when it is handed out: a
// read of what nothing wrote shows in the result, which has to be that of the plain sum in float32.
// The arguments are algorithms. Prints what is wrong; exit code 1 if anything is.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>

#include "../csrc/cpu/plan/plan.h"
#include "check.h"

using namespace fastddpm;
using cpu::Plan;

namespace {

struct Case {
  int64_t channels[2], c_out, kernel, height, width, groups, stride, before, after, repeat;
  bool residual, halve = false, modulated = false;
};

int64_t convolution(Plan& plan, const std::vector<int64_t>& sources, const Case& c, int64_t c_in,
                    int64_t residual, const std::string& algorithm) {
  const int64_t terms = c_in * c.kernel * c.kernel;
  std::vector<float> weight = normals(c.c_out * terms);
  for (float& w : weight) w /= std::sqrt(float(terms));
  cpu::ConvolutionLayer layer;
  layer.name = "layer", layer.sources = sources, layer.weight = weight.data();
  layer.c_out = c.c_out, layer.kernel = c.kernel, layer.bias = normals(c.c_out);
  layer.time_offset = 0, layer.residual = residual, layer.stride = c.stride;
  layer.before = c.before, layer.after = c.after, layer.repeat = c.repeat;
  layer.algorithm = algorithm;
  layer.halve = c.halve, layer.modulation_offset = c.modulated ? c.c_out : -1;
  if (c.groups) layer.norm = {c.groups, 1e-6f, normals(c_in), normals(c_in), true};
  return plan.convolution(layer);
}

Tensor contiguous(std::vector<float>& x, const Shape& s) {
  return {x.data(), DType::f32, {s.c * s.h * s.w, s.h * s.w, s.w, 1}};
}

struct Result {
  std::vector<float> y, x;  // the network's, and where it is like its input that of a step
};

// For n images on so many threads; x, time and the results are as large as they must be. row: of
// the time, from an image's to the next one's.
Result forward(Plan& plan, std::vector<float> x, int64_t n, int threads, std::vector<float> time,
               int64_t row = 0) {
  const Shape in = plan.input_shape(n), out = plan.output_shape(n);
  x.resize(size_t(n * in.c * in.h * in.w));
  x.shrink_to_fit();
  Result result{std::vector<float>(size_t(n * out.c * out.h * out.w), NAN), {}};
  const Tensor xt = contiguous(x, in), output = contiguous(result.y, out);
  if (x.size() != result.y.size()) {
    plan.forward(xt, n, {time.data(), row}, output, threads, 0);
    return result;
  }
  const float table[COLUMNS] = {0.7f, 0.7f, 1.4f, 1.0f, 0.4f, 0.6f, 0.1f, -4.6f};
  const int64_t t = 0, numbers[] = {5, 6, 7};
  result.x.assign(x.size(), NAN);
  PosteriorStep step{in,
                     xt,
                     output,
                     {},
                     {},
                     contiguous(result.x, in),
                     {3, {numbers, 1}, {numbers, 1}},
                     {&t, 0},
                     Prediction::eps,
                     true,
                     {table, 1}};
  plan.forward(xt, n, {time.data(), row}, output, threads, 0, &step);
  std::vector<float> alone(x.size(), NAN);
  step.out = contiguous(alone, in);
  plain::posterior_step(step, 1);
  if (alone != result.x) ++failures, std::printf("a step within a plan differs\n");
  return result;
}

// The plan of a case with weights that are the same for every algorithm.
void build(Plan& plan, const Case& c, const std::string& algorithm) {
  const bool bf16 = algorithm == "bf16";
  const std::string plain = bf16 ? "bf16" : "direct";
  const int64_t c_in = c.channels[0] + c.channels[1];
  generator.seed(1);
  std::vector<int64_t> sources{0};
  Case copy{{c.channels[0], 0}, c.channels[1], 1, c.height, c.width, 0, 1, 0, 0, 1, false};
  if (c.channels[1]) sources.push_back(convolution(plan, {0}, copy, c.channels[0], -1, plain));
  int64_t residual = -1;
  if (c.residual) {
    copy.c_out = c.c_out;
    residual = convolution(plan, {0}, copy, c.channels[0], -1, plain);
  }
  int64_t y = convolution(plan, sources, c, c_in, residual, algorithm);
  if (c.modulated) y = plan.resample("resample", y, c.halve);
  if (c.c_out % 6 == 0) y = plan.attention("attention", y, 2);
  plan.finish(y);
}

double distance(const std::vector<float>& x, const std::vector<float>& truth) {
  double error = 0.0, size = 0.0;
  for (size_t i = 0; i < truth.size(); ++i) {
    error += (x[i] - truth[i]) * (x[i] - truth[i]);
    size += truth[i] * truth[i];
  }
  return std::sqrt(error / size);
}

void check(const Case& c, const std::string& algorithm) {
  constexpr int64_t N = 3;
  const bool bf16 = algorithm == "bf16";
  Plan plan(c.height, c.width, c.channels[0], bf16), simple(c.height, c.width, c.channels[0]);
  build(plan, c, algorithm);
  build(simple, c, "direct");
  const std::vector<float> x = normals(N * c.channels[0] * c.height * c.width);
  const std::vector<float> time = normals(plan.time_size());
  const Result expected = forward(plan, x, N, 1, time), two = forward(plan, x, N, 2, time);
  const Result one = forward(plan, x, 1, 3, time);
  bool good = distance(expected.y, forward(simple, x, N, 1, time).y) < (bf16 ? 2e-2 : 1e-5);
  good &= two.y == expected.y && two.x == expected.x;
  good &= std::equal(one.y.begin(), one.y.end(), expected.y.begin());
  good &= std::equal(one.x.begin(), one.x.end(), expected.x.begin());
  const int64_t row = plan.time_size(), size = int64_t(x.size()) / N;
  const std::vector<float> rows = normals(N * row);
  const Result own = forward(plan, x, N, 2, rows, row);
  for (int64_t i = 0; i < N; ++i) {
    const Result alone = forward(plan, {x.begin() + i * size, x.begin() + (i + 1) * size}, 1, 1,
                                 {rows.begin() + i * row, rows.begin() + (i + 1) * row});
    good &= std::equal(alone.y.begin(), alone.y.end(), own.y.begin() + i * alone.y.size());
  }
  if (good) return;
  ++failures;
  std::printf("%s %ldx%ld, %ld+%ld -> %ld channels: wrong\n", algorithm.c_str(), long(c.height),
              long(c.width), long(c.channels[0]), long(c.channels[1]), long(c.c_out));
}

// What packing makes of a weight.
std::vector<float> packed(const std::string& algorithm, const Weight& w) {
  const int64_t m = algorithm == "winograd_2" ? 2 : algorithm == "winograd_4" ? 4 : 0;
  std::vector<float> result;
  if (algorithm != "bf16") {
    result.assign(size_t(plain::packed_weight_size(Algorithm(m), w.c_in, w.c_out, w.kernel)), NAN);
    plain::pack_weight(Algorithm(m), w, result.data(), 2);
    return result;
  }
  for (bool repeated : {false, true}) {
    if (repeated && w.kernel != 3) continue;
    const int64_t size = plain::packed_weight_size_bf16(w.c_in, w.c_out, w.kernel, repeated);
    std::vector<BF16> values(size_t(size), BF16{0x7fff});
    plain::pack_weight_bf16(w, repeated, values.data(), 2);
    for (BF16 value : values) result.push_back(to_float(value));
  }
  return result;
}

// A weight in any memory, of any type, as it is or transposed, gives what its contiguous float32
// copy gives: in memory of just its size, as channels lie, and as a slice of a larger one.
void check_packing(const std::string& algorithm) {
  const int64_t sizes[][3] = {{1, 1, 3}, {37, 6, 3}, {6, 37, 1}, {66, 33, 3}, {33, 66, 1}};
  for (const auto& [c_out, c_in, k] : sizes) {
    if (k == 1 && algorithm[0] == 'w') continue;
    const int64_t taps = k * k;
    const int64_t strides[][4] = {{c_in * taps, taps, k, 1},
                                  {c_in * taps, 1, k * c_in, c_in},
                                  {(c_in + 2) * taps, taps, k, 1},
                                  {2, taps * 2 * c_out + 3, 2 * c_out * k, 2 * c_out}};
    for (const auto& stride : strides)
      for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        std::vector<float> as_it_is, flipped(size_t(c_out * c_in * taps));
        int64_t size = 1;
        for (int64_t i = 0; i < 4; ++i) size += stride[i] * (std::array{c_out, c_in, k, k}[i] - 1);
        std::vector<float> floats(size_t(size), NAN);
        std::vector<BF16> bf16(size_t(size), BF16{0x7fff});
        std::vector<F16> f16(size_t(size), F16{0x7fff});
        for (int64_t o = 0; o < c_out; ++o)
          for (int64_t i = 0; i < c_in; ++i)
            for (int64_t t = 0; t < taps; ++t) {
              const float value = float(generator() % 255) / 64 - 2;  // every type holds it
              const int64_t at =
                  o * stride[0] + i * stride[1] + t / k * stride[2] + t % k * stride[3];
              floats[at] = value, bf16[at] = from_float<BF16>(value);
              f16[at] = from_float<F16>(value);
              as_it_is.push_back(value);
              flipped[(i * c_out + o) * taps + taps - 1 - t] = value;
            }
        const void* const data[] = {floats.data(), bf16.data(), f16.data()};
        Weight w{data[int(dtype)], dtype, c_out, c_in, k, {}};
        std::copy(stride, stride + 4, w.stride);
        const Weight copy{as_it_is.data(), DType::f32, c_out, c_in, k, {c_in * taps, taps, k, 1}};
        const Weight back{flipped.data(), DType::f32, c_in, c_out, k, {c_out * taps, taps, k, 1}};
        if (packed(algorithm, w) == packed(algorithm, copy) &&
            packed(algorithm, transposed(w)) == packed(algorithm, back))
          continue;
        ++failures;
        std::printf("%s %ldx%ld of %ldx%ld is packed wrongly\n", algorithm.c_str(), long(c_out),
                    long(c_in), long(k), long(k));
      }
  }
}

}  // namespace

int main(int count, char** algorithms) {
  const Case cases[] = {
      {{1, 0}, 1, 3, 1, 1, 0, 1, 1, 1, 1, false},
      {{3, 0}, 12, 3, 5, 7, 3, 1, 1, 1, 1, false},
      {{16, 0}, 16, 3, 8, 8, 4, 1, 1, 1, 1, true},
      {{5, 7}, 18, 3, 4, 9, 2, 1, 1, 1, 1, true},
      {{33, 8}, 40, 3, 6, 6, 1, 1, 1, 1, 1, true},
      {{6, 0}, 9, 3, 3, 4, 0, 1, 1, 1, 2, false},
      {{6, 0}, 20, 3, 6, 8, 0, 2, 0, 1, 1, false},
      {{6, 0}, 20, 3, 6, 8, 0, 2, 1, 1, 1, false},
      {{17, 4}, 24, 1, 7, 7, 0, 1, 0, 0, 1, true},
      {{24, 0}, 72, 1, 7, 7, 3, 1, 0, 0, 1, false},
      {{64, 0}, 64, 3, 13, 2, 32, 1, 1, 1, 1, true},
      {{40, 0}, 72, 3, 2, 32, 8, 1, 1, 1, 1, true},
      {{9, 0}, 40, 3, 3, 16, 0, 1, 1, 1, 2, false},
      {{9, 0}, 20, 3, 4, 32, 0, 2, 0, 1, 1, false},
      {{6, 0}, 18, 3, 4, 6, 2, 1, 1, 1, 1, false, true, true},
      {{5, 7}, 20, 3, 6, 2, 3, 1, 1, 1, 1, false, true, true},
      {{40, 0}, 33, 3, 3, 4, 8, 1, 1, 1, 2, false, false, true},
  };
  for (int i = 1; i < count; ++i) {
    check_packing(algorithms[i]);
    for (const Case& c : cases) check(c, algorithms[i]);
  }
  std::printf("%d of the plans are wrong\n", failures);
  return failures ? 1 : 0;
}
