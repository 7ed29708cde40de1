// convolution: what is read is normalised, activated and given its border for a few images at a
// time, so that it is still in a cache when it is multiplied.
#include "convolution.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cut.h"

namespace fastddpm {
namespace cpu {
namespace {

constexpr int64_t GROUP_BYTES = 2 * 1024 * 1024;    // of the images that a thread prepares, about
constexpr int64_t SHARED_BYTES = 16 * 1024 * 1024;  // of weights: more do not stay in a cache
constexpr int64_t WORKING_SET = 64 * 1024 * 1024;   // of the images that all threads prepare, about
constexpr int64_t MAX_CHANNELS = int64_t(1) << 24;
constexpr int64_t MAX_FLOATS = int64_t(1) << 40;  // of an image: no product of sizes overflows

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(std::string("convolution: ") + message);
}

bool one_of(int64_t value, int64_t a, int64_t b) { return value == a || value == b; }

class Forward {
 public:
  Forward(const Convolution& op, int threads)
      : op(op),
        threads(threads),
        packed(op.packed ? op.packed->of(op, threads) : packed_weight(op, threads)),
        kernels(*packed->kernels),
        way(way_of(kernels, geometry_of(op), op.rounded)),
        input(kernels, op, way),
        y(in_place(op.y, op.shape)),
        residual(op.residual.data ? in_place(op.residual, op.shape) : nullptr) {
    add_biases();
  }

  void run() {
    const int64_t n = op.shape.n, each = std::max<int64_t>(1, floats(1)) * 4;
    int64_t share = std::max<int64_t>(1, GROUP_BYTES / each);
    share = std::min(share, (n + threads - 1) / threads);
    // Each group streams the weights past, where they are too many for a cache.
    const int64_t bytes = way.weight_floats * 4;
    const bool alone = n >= threads && (bytes <= SHARED_BYTES || bytes <= 2 * share * each);
    if (!alone) share = std::min(n, std::max<int64_t>(1, WORKING_SET / each));
    const int64_t groups = (n + share - 1) / share;
    const auto count = [&](int64_t group) { return std::min(share, n - group * share); };
    if (alone) {
      const int64_t size = floats(share) + workspace(share, 1);
      const Buffer memory = allocate(std::min<int64_t>(threads, groups) * size, false);
      parallel_for(groups, n * numel(op.shape) * way.is.c_in, threads,
                   [&](int64_t group, int thread) {
                     run_group(group * share, count(group), memory.get() + thread * size, 1);
                   });
    } else {
      const Buffer memory = allocate(floats(share) + workspace(share, threads), false);
      for (int64_t group = 0; group < groups; ++group)
        run_group(group * share, count(group), memory.get(), threads);
    }
  }

 private:
  const Convolution& op;
  const int threads;
  const std::shared_ptr<const PackedWeight> packed;
  const Kernels& kernels;
  const Way way;
  const Input input;
  float* const y;           // where it is written as it is, or null
  const float* residual;    // the same
  std::vector<float> bias;  // with the shift: (O,), or (N, O)
  int64_t bias_image = 0;

  void add_biases() {
    const int64_t outputs = op.shape.c;
    if (op.shift.data && op.shift.stride_n && op.shape.n > 1) bias_image = outputs;
    bias.resize(size_t(outputs * (bias_image ? op.shape.n : 1)));
    std::vector<float> shared(static_cast<size_t>(outputs));
    read(op.bias, 0, outputs, 0.0f, shared.data());
    for (int64_t at = 0, n = 0; at < int64_t(bias.size()); at += outputs, ++n) {
      read(op.shift, n, outputs, 0.0f, bias.data() + at);
      for (int64_t c = 0; c < outputs; ++c) bias[size_t(at + c)] += shared[size_t(c)];
    }
  }

  int64_t outputs(int64_t images) const { return lines(images * numel(op.shape)); }

  int64_t floats(int64_t images) const {
    return input.floats(images) + (y ? 0 : outputs(images)) +
           (op.residual.data && !residual ? outputs(images) : 0);
  }

  int64_t workspace(int64_t images, int threads) const {
    return lines(cpu::workspace(kernels, way, images, input.c_in_2(), threads)) + LINE;
  }

  void run_group(int64_t first, int64_t images, float* begin, int threads) const {
    Memory memory(begin);
    const int64_t offset = first * numel(op.shape);
    const Shape shape{images, op.shape.c, op.shape.h, op.shape.w};
    Operands operands = input.prepare(first, images, memory, threads);
    operands.weight = packed->memory.get();
    operands.bias = bias.data() + first * bias_image, operands.bias_image = bias_image;
    if (residual) {
      operands.residual = residual + offset;
    } else if (op.residual.data) {
      float* loaded = memory.take(images * numel(op.shape));
      kernels.load_images(samples_from(op.residual, first), shape, loaded, threads);
      operands.residual = loaded;
    }
    operands.y = y ? y + offset : memory.take(images * numel(op.shape));
    convolve(kernels, way, images, operands, memory.take(workspace(images, threads)), threads);
    if (!y) kernels.store_images(operands.y, shape.c, shape, samples_from(op.y, first), threads);
  }
};

}  // namespace

Geometry geometry_of(const Convolution& op) {
  return {op.source.h, op.source.w, op.source.c, op.shape.c, op.kernel,
          op.stride,   op.before,   op.after,    op.upsample};
}

Weight weight_of(const Convolution& op) {
  const int64_t* s = op.weight.stride;
  return {op.weight.data, op.weight.dtype, op.shape.c,
          op.source.c,    op.kernel,       {s[0], s[1], s[2], s[3]}};
}

void check(const Convolution& op) {
  const Shape &source = op.source, &shape = op.shape;
  require(one_of(op.kernel, 1, 3), "kernel must be 1 or 3");
  require(one_of(op.stride, 1, 2) && one_of(op.upsample, 1, 2),
          "stride and upsample must be 1 or 2");
  require(one_of(op.before, 0, 1) && one_of(op.after, 0, 1), "padding must be 0 or 1");
  require(source.n >= 0 && source.c >= 1 && source.h >= 1 && source.w >= 1 && shape.c >= 1,
          "x and weight must not be empty");
  require(op.x2.data || source.n == 0 ? op.c1 >= 1 && op.c1 <= source.c : op.c1 == source.c,
          "c1 must be the channels of x");
  for (const Shape& s : {source, shape})
    require(s.c <= MAX_CHANNELS && s.h <= MAX_FLOATS / s.c && s.w <= MAX_FLOATS / (s.c * s.h),
            "an image is too large");
  require(source.c <= MAX_FLOATS / shape.c, "weight is too large");
  const Geometry is = geometry_of(op);
  require(shape.n == source.n && shape.h == is.rows() && shape.w == is.columns(),
          "y has another size than the result");
  require(op.groups >= 0 && (!op.groups || source.c % op.groups == 0),
          "num_groups must divide the channels");
  for (const Tensor* x : {&op.x, &op.x2, &op.y, &op.residual, &op.weight})
    require(!x->data || x->dtype != DType::u8, "tensors must be float32, bfloat16 or float16");
}

std::unique_ptr<PackedWeight> packed_weight(const Convolution& op, int threads) {
  const Kernels& kernels = kernels_in_use();
  return std::make_unique<PackedWeight>(kernels, way_of(kernels, geometry_of(op), op.rounded),
                                        weight_of(op), threads);
}

float* in_place(const Tensor& x, const Shape& shape) {
  const bool run = x.data && is_run_of<float>(x, shape, Order::hwc) &&
                   (shape.n == 1 || x.stride[0] == numel(shape));
  return run ? static_cast<float*>(x.data) : nullptr;
}

// ---- what is read ------------------------------------------------------------------------------

Input::Input(const Kernels& kernels, const Convolution& op, const Way& way, bool joined)
    : channels{op.c1, op.source.c - op.c1}, kernels(kernels), op(op), way(way) {
  const Tensor* sources[SOURCES] = {&op.x, &op.x2};
  for (int64_t s = 0; s < SOURCES; ++s)
    whole[s] = channels[s] ? in_place(*sources[s], source_shape(s, op.source.n)) : nullptr;
  direct = way.reads_sources() && !op.groups && !op.silu && !op.dropout.threshold &&
           !(joined && channels[1]);
  if (!op.groups) return;
  weight.resize(size_t(op.source.c)), bias.resize(size_t(op.source.c));
  read(op.norm_weight, 0, op.source.c, 1.0f, weight.data());
  read(op.norm_bias, 0, op.source.c, 0.0f, bias.data());
}

int64_t Input::floats(int64_t images) const {
  int64_t sum = 0;
  for (int64_t s = 0; s < SOURCES; ++s)
    if (channels[s] && !whole[s]) sum += lines(images * numel(source_shape(s, 1)));
  if (op.groups)
    sum += 2 * lines(images * channels[0]) + 2 * lines(images * channels[1]) +
           3 * lines(images * op.source.c);
  return sum + (direct ? 0 : lines(images * way.prepared_floats()));
}

void Input::sources(int64_t first, int64_t images, Memory& memory, int threads,
                    const float* source[SOURCES]) const {
  const Tensor* tensors[SOURCES] = {&op.x, &op.x2};
  for (int64_t s = 0; s < SOURCES; ++s) {
    const int64_t size = numel(source_shape(s, 1));
    source[s] = whole[s] ? whole[s] + first * size : nullptr;
    if (whole[s] || !channels[s]) continue;
    float* loaded = memory.take(images * size);
    kernels.load_images(samples_from(*tensors[s], first), source_shape(s, images), loaded, threads);
    source[s] = loaded;
  }
}

void Input::normalise(PrepareInput& input, Memory& memory, int threads) const {
  GroupCoefficients norm{};
  norm.images = input.images, norm.pixels = op.source.h * op.source.w, norm.groups = op.groups;
  for (int64_t s = 0; s < SOURCES && channels[s]; ++s) {
    float *mean = memory.take(input.images * channels[s]),
          *squares = memory.take(input.images * channels[s]);
    kernels.channel_statistics(
        {input.images, norm.pixels, channels[s], input.source[s], mean, squares}, threads);
    norm.channels[s] = channels[s], norm.mean[s] = mean, norm.squares[s] = squares;
  }
  norm.eps = op.eps, norm.weight = weight.data(), norm.bias = bias.data();
  norm.centre = memory.take(input.images * op.source.c);
  norm.scale = memory.take(input.images * op.source.c);
  norm.shift = memory.take(input.images * op.source.c);
  kernels.group_coefficients(norm, threads);
  input.centre = norm.centre, input.scale = norm.scale, input.shift = norm.shift;
}

Operands Input::prepare(int64_t first, int64_t images, Memory& memory, int threads) const {
  Operands operands{};
  PrepareInput input = preparation(way, images);
  sources(first, images, memory, threads, input.source);
  operands.x = input.source[0], operands.x_2 = input.source[1], operands.c_in_2 = c_in_2();
  if (direct) return operands;
  for (int64_t s = 0; s < SOURCES; ++s) input.channels[s] = channels[s];
  if (op.groups) normalise(input, memory, threads);
  input.silu = op.silu, input.dropout = samples_from(op.dropout, first);
  float* prepared = memory.take(images * way.prepared_floats());
  cpu::prepare(kernels, way, input, prepared, threads);
  operands.x = prepared, operands.x_2 = nullptr;
  return operands;
}

void convolution(const Convolution& op, int threads) {
  check(op);
  if (op.shape.n > 0) Forward(op, threads).run();
}

}  // namespace cpu
}  // namespace fastddpm
