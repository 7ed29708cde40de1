// Runs the gradients of convolutions' weights under a sanitizer, with memory that is full of NaN
// when it is handed out, against the sums in float64. The arguments are algorithms. Prints what is
// wrong; exit code 1 if anything is.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"

using namespace fastddpm;

namespace {

// extra: rows, columns and values of a pixel that x has beyond what is needed.
struct Case {
  int64_t images, c_in, c_out, height, width, kernel, extra;
};

WeightGradient shape_of(const Case& c, Algorithm algorithm) {
  const int64_t border = c.kernel - 1 + c.extra;
  WeightGradient op{};
  op.algorithm = algorithm, op.images = c.images, op.kernel = c.kernel;
  op.c_in = c.c_in, op.c_out = c.c_out, op.pixel = c.c_in + c.extra;
  op.rows = c.height + border, op.columns = c.width + border;
  op.height = c.height, op.width = c.width;
  return op;
}

// x, its border zero; what lies behind a pixel's channels is nobody's.
std::vector<float> input_of(const WeightGradient& op) {
  std::vector<float> x = normals(op.images * op.rows * op.columns * op.pixel);
  const int64_t before = op.kernel / 2;
  for (int64_t i = 0; i < int64_t(x.size()); ++i) {
    const int64_t channel = i % op.pixel, column = i / op.pixel % op.columns - before;
    const int64_t row = i / op.pixel / op.columns % op.rows - before;
    if (row < 0 || row >= op.height || column < 0 || column >= op.width) x[i] = 0.0f;
    if (channel >= op.c_in) x[i] = NAN;
  }
  return x;
}

std::vector<double> truth_of(const WeightGradient& op, const float* x, const float* grad) {
  std::vector<double> sums(op.c_out * op.c_in * op.kernel * op.kernel, 0.0);
  for (int64_t pixel = 0; pixel < op.images * op.height * op.width; ++pixel) {
    const int64_t row = pixel / op.width % op.height, column = pixel % op.width;
    const int64_t image = pixel / op.width / op.height;
    for (int64_t o = 0, at = 0; o < op.c_out; ++o)
      for (int64_t i = 0; i < op.c_in; ++i)
        for (int64_t a = 0; a < op.kernel; ++a)
          for (int64_t b = 0; b < op.kernel; ++b, ++at)
            sums[at] += double(grad[pixel * op.c_out + o]) *
                        x[((image * op.rows + row + a) * op.columns + column + b) * op.pixel + i];
  }
  return sums;
}

enum Order { contiguous, channels_last, with_gaps };

void set_strides(WeightGradient& op, Order order) {
  const int64_t taps = op.kernel * op.kernel, gap = order == with_gaps ? 2 : 1;
  const bool last = order == channels_last;
  op.stride[0] = gap * op.c_in * taps, op.stride[1] = gap * (last ? 1 : taps);
  op.stride[2] = gap * op.kernel * (last ? op.c_in : 1), op.stride[3] = gap * (last ? op.c_in : 1);
}

struct Kernels {
  int64_t (*workspace)(const WeightGradient&, int);
  void (*begin)(const WeightGradient&, float*, int), (*add)(const WeightGradient&, float*, int),
      (*finish)(const WeightGradient&, float*, int);
};

// The bfloat16 kernels behind the interface of the others.
WeightGradientBf16 rounded(const WeightGradient& op, std::vector<BF16>& x,
                           std::vector<BF16>& grad) {
  for (int64_t i = 0; op.x && i < op.images * op.rows * op.columns * op.pixel; ++i)
    x.push_back(from_float<BF16>(op.x[i]));
  for (int64_t i = 0; op.grad && i < op.images * op.height * op.width * op.c_out; ++i)
    grad.push_back(from_float<BF16>(op.grad[i]));
  WeightGradientBf16 is{};
  is.images = op.images, is.c_in = op.c_in, is.c_out = op.c_out, is.kernel = op.kernel;
  is.rows = op.rows, is.columns = op.columns, is.pixel = op.pixel;
  is.image = op.rows * op.columns * op.pixel, is.height = op.height, is.width = op.width;
  is.grad_pixel = op.c_out;
  is.x = x.data(), is.grad = grad.data(), is.dweight = op.dweight;
  std::copy_n(op.stride, 4, is.stride);
  return is;
}

template <auto function>
auto with_bf16(const WeightGradient& op, float* workspace, int threads) {
  std::vector<BF16> x, grad;
  return function(rounded(op, x, grad), workspace, threads);
}

int64_t workspace_bf16(const WeightGradient& op, int threads) {
  std::vector<BF16> x, grad;
  return plain::weight_gradient_bf16_workspace(rounded(op, x, grad), threads);
}

const Kernels float32{plain::weight_gradient_workspace, plain::weight_gradient_begin,
                      plain::weight_gradient_add, plain::weight_gradient_finish};
const Kernels bf16{workspace_bf16, with_bf16<plain::weight_gradient_bf16_begin>,
                   with_bf16<plain::weight_gradient_bf16_add>,
                   with_bf16<plain::weight_gradient_bf16_finish>};

// In calls of so many images; in the order of (c_out, c_in, row, column), however it is stored.
std::vector<float> gradient(WeightGradient op, const std::vector<float>& x,
                            const std::vector<float>& grad, int threads, int64_t at_once,
                            Order order = contiguous) {
  const Kernels& kernels = op.algorithm == Algorithm::bf16 ? bf16 : float32;
  const int64_t count = op.c_out * op.c_in * op.kernel * op.kernel;
  std::vector<float> stored(size_t(order == with_gaps ? 2 * count - 1 : count), NAN), dweight;
  const int64_t images = op.images;
  op.images = std::min(at_once, images), op.dweight = stored.data();
  set_strides(op, order);
  std::vector<float> workspace(size_t(kernels.workspace(op, threads)), NAN);
  kernels.begin(op, workspace.data(), threads);
  for (int64_t first = 0; first < images; first += at_once) {
    op.images = std::min(at_once, images - first);
    op.x = x.data() + first * op.rows * op.columns * op.pixel;
    op.grad = grad.data() + first * op.height * op.width * op.c_out;
    kernels.add(op, workspace.data(), threads);
  }
  kernels.finish(op, workspace.data(), threads);
  for (int64_t o = 0; o < op.c_out; ++o)
    for (int64_t i = 0; i < op.c_in; ++i)
      for (int64_t tap = 0; tap < op.kernel * op.kernel; ++tap) {
        const int64_t at = o * op.stride[0] + i * op.stride[1] + tap / op.kernel * op.stride[2] +
                           tap % op.kernel * op.stride[3];
        dweight.push_back(stored[at]);
        stored[at] = NAN;
      }
  for (float value : stored)
    if (!std::isnan(value)) ++failures, std::printf("a value between the weights was written\n");
  return dweight;
}

double distance(const std::vector<float>& x, const std::vector<double>& truth) {
  double error = 0.0, size = 0.0;
  for (size_t i = 0; i < truth.size(); ++i) {
    error += (x[i] - truth[i]) * (x[i] - truth[i]);
    size += truth[i] * truth[i];
  }
  return size > 0.0 ? std::sqrt(error / size) : std::sqrt(error);
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void check(const Case& c, const std::string& name, Algorithm algorithm) {
  const WeightGradient op = shape_of(c, algorithm);
  std::vector<float> x = input_of(op);
  std::vector<float> grad = normals(op.images * op.height * op.width * op.c_out);
  if (algorithm == Algorithm::bf16)  // values that bfloat16 holds
    for (std::vector<float>* values : {&x, &grad})
      for (float& value : *values) value = to_float(from_float<BF16>(value));
  const std::vector<float> whole = gradient(op, x, grad, 1, op.images + 1);
  const std::vector<double> truth = truth_of(op, x.data(), grad.data());
  const double error = distance(whole, truth);
  const double allowed = algorithm == Algorithm::winograd_4 ? 1e-5 : 2e-6;
  const bool direct = algorithm == Algorithm::direct || algorithm == Algorithm::bf16;
  bool good = error < allowed;
  for (int threads : {2, 7}) good &= same(whole, gradient(op, x, grad, threads, op.images + 1));
  for (Order order : {channels_last, with_gaps})
    good &= same(whole, gradient(op, x, grad, 2, op.images + 1, order));
  for (int64_t at_once : {1, 3}) {  // a call begins a run of pixels of the direct sum
    const std::vector<float> parts = gradient(op, x, grad, 1, at_once);
    good &= same(parts, gradient(op, x, grad, 2, at_once));
    good &= direct ? distance(parts, truth) < allowed : same(parts, whole);
  }
  if (good) return;
  ++failures;
  std::printf("%s: %ld images of %ldx%ld, %ld -> %ld channels, kernel %ld: wrong, error %.2g\n",
              name.c_str(), long(c.images), long(c.height), long(c.width), long(c.c_in),
              long(c.c_out), long(c.kernel), error);
}

// Large images are Winograd's unless products of bfloat16 are much faster, single pixels are not.
void check_choice() {
  const auto choice = plain::best_weight_gradient;
  bool good = choice(256, 256, 32, 32, 3, 0.0) == Algorithm::winograd_4;
  good &= choice(3, 128, 32, 32, 3, 0.0) == Algorithm::winograd_4;
  good &= choice(256, 256, 2, 2, 3, 0.0) == Algorithm::winograd_2;
  good &= choice(256, 256, 1, 1, 3, 0.0) == Algorithm::direct;
  good &= choice(256, 256, 32, 32, 1, 0.0) == Algorithm::direct;
  good &= choice(256, 256, 32, 32, 1, 1.9) == Algorithm::bf16;
  good &= choice(256, 256, 32, 32, 3, 1.9) == Algorithm::winograd_4;
  good &= choice(256, 256, 32, 32, 3, 16.0) == Algorithm::bf16;
  if (!good) ++failures, std::printf("an algorithm is chosen that is not the fastest\n");
}

}  // namespace

int main(int count, char** names) {
  const Case cases[] = {
      {3, 1, 1, 1, 1, 3, 0},      {2, 3, 12, 5, 7, 3, 0},  {5, 16, 16, 8, 8, 3, 0},
      {3, 12, 18, 4, 9, 3, 5},    {4, 33, 40, 6, 6, 3, 2}, {3, 40, 5, 3, 4, 3, 0},
      {2, 5, 40, 7, 7, 3, 1},     {9, 32, 17, 2, 2, 3, 0}, {20, 17, 33, 1, 2, 3, 0},
      {9, 20, 16, 16, 13, 3, 0},  {0, 4, 4, 4, 4, 3, 0},   {38, 2, 3, 16, 16, 3, 0},
      {26, 64, 20, 16, 16, 3, 0}, {3, 1, 1, 1, 1, 1, 0},   {5, 41, 24, 7, 7, 1, 0},
      {4, 3, 72, 5, 6, 1, 3},     {7, 24, 2, 8, 3, 1, 0},  {0, 4, 4, 4, 4, 1, 0},
      {38, 3, 2, 16, 16, 1, 0},
  };
  check_choice();
  for (int i = 1; i < count; ++i) {
    const std::string name = names[i];
    const Algorithm algorithm = name == "winograd_2"   ? Algorithm::winograd_2
                                : name == "winograd_4" ? Algorithm::winograd_4
                                : name == "bf16"       ? Algorithm::bf16
                                                       : Algorithm::direct;
    const bool direct = algorithm == Algorithm::direct || algorithm == Algorithm::bf16;
    for (const Case& c : cases) {
      const bool many = c.kernel == 3 && c.images * c.height * c.width > 2000;  // blocks of tiles
      if (direct ? !many : c.kernel == 3) check(c, name, algorithm);
    }
  }
  std::printf("%d of the gradients are wrong\n", failures);
  return failures ? 1 : 0;
}
