// Runs native plans under a sanitizer, with memory that is full of NaN when it is handed out: a
// read of what nothing wrote shows in the result, which has to be that of the plain sum in float32.
// The arguments are algorithms. Prints what is wrong; exit code 1 if anything is.
//
// It takes the place of csrc/cpu/parallel.cpp and isa.cpp, whose allocator and threads it needs for
// itself, and knows one instruction set: that of its compiler flags.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <random>
#include <thread>

#include "../csrc/cpu/isa.h"
#include "../csrc/cpu/parallel.h"
#include "../csrc/cpu/plan/plan.h"

namespace fastddpm {
namespace cpu {

const char* isa() { return "plain"; }

void parallel_run(int64_t jobs, int threads, void (*body)(void*, int64_t, int), void* context) {
  std::vector<std::thread> team;
  for (int thread = 0; thread < threads; ++thread)
    team.emplace_back([=] {
      for (int64_t job = thread; job < jobs; job += threads) body(context, job, thread);
    });
  for (std::thread& member : team) member.join();
}

void* scratch_alloc(int64_t bytes, bool zeroed) {
  void* data = nullptr;
  if (posix_memalign(&data, 64, size_t(bytes ? bytes : 1))) throw std::bad_alloc();
  return std::memset(data, zeroed ? 0 : 0xff, size_t(bytes));
}

void scratch_free(void* data) { std::free(data); }

}  // namespace cpu
}  // namespace fastddpm

using namespace fastddpm;
using cpu::Plan;

namespace {

std::mt19937 generator(0);
int failures = 0;

std::vector<float> normals(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> x;
  for (int64_t i = 0; i < count; ++i) x.push_back(normal(generator));
  return x;
}

struct Case {
  int64_t channels[2], c_out, kernel, height, width, groups, stride, before, after, repeat;
  bool residual;
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
  if (c.groups) layer.norm = {c.groups, 1e-6f, normals(c_in), normals(c_in), true};
  return plan.convolution(layer);
}

Tensor contiguous(std::vector<float>& x, const Shape& s) {
  return {x.data(), DType::f32, {s.c * s.h * s.w, s.h * s.w, s.w, 1}};
}

struct Result {
  std::vector<float> y, x;  // the network's, and where it is like its input that of a step
};

// For n images on so many threads; x, time and the results are as large as they must be.
Result forward(Plan& plan, std::vector<float> x, int64_t n, int threads, std::vector<float> time) {
  const Shape in = plan.input_shape(n), out = plan.output_shape(n);
  x.resize(size_t(n * in.c * in.h * in.w));
  x.shrink_to_fit();
  Result result{std::vector<float>(size_t(n * out.c * out.h * out.w), NAN), {}};
  const Tensor xt = contiguous(x, in), output = contiguous(result.y, out);
  if (x.size() != result.y.size()) {
    plan.forward(xt, n, time.data(), output, threads, 0);
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
  plan.forward(xt, n, time.data(), output, threads, 0, &step);
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
  if (good) return;
  ++failures;
  std::printf("%s %ldx%ld, %ld+%ld -> %ld channels: wrong\n", algorithm.c_str(), long(c.height),
              long(c.width), long(c.channels[0]), long(c.channels[1]), long(c.c_out));
}

}  // namespace

int main(int count, char** algorithms) {
  const Case cases[] = {
      {{1, 0}, 1, 3, 1, 1, 0, 1, 1, 1, 1, false},    {{3, 0}, 12, 3, 5, 7, 3, 1, 1, 1, 1, false},
      {{16, 0}, 16, 3, 8, 8, 4, 1, 1, 1, 1, true},   {{5, 7}, 18, 3, 4, 9, 2, 1, 1, 1, 1, true},
      {{33, 8}, 40, 3, 6, 6, 1, 1, 1, 1, 1, true},   {{6, 0}, 9, 3, 3, 4, 0, 1, 1, 1, 2, false},
      {{6, 0}, 20, 3, 6, 8, 0, 2, 0, 1, 1, false},   {{6, 0}, 20, 3, 6, 8, 0, 2, 1, 1, 1, false},
      {{17, 4}, 24, 1, 7, 7, 0, 1, 0, 0, 1, true},   {{24, 0}, 72, 1, 7, 7, 3, 1, 0, 0, 1, false},
      {{64, 0}, 64, 3, 13, 2, 32, 1, 1, 1, 1, true}, {{40, 0}, 72, 3, 2, 32, 8, 1, 1, 1, 1, true},
      {{9, 0}, 40, 3, 3, 16, 0, 1, 1, 1, 2, false},  {{9, 0}, 20, 3, 4, 32, 0, 2, 0, 1, 1, false},
  };
  for (int i = 1; i < count; ++i)
    for (const Case& c : cases) check(c, algorithms[i]);
  std::printf("%d of the plans are wrong\n", failures);
  return failures ? 1 : 0;
}
