// The gradient of convolution.
//
// With h what the forward convolution read, its border with it, and g the gradient of y, zeros
// between its pixels where the stride is 2:
//
//     dweight[o][i] = sum of g[o] h[i], h shifted by a tap;  dh = conv(g, weight turned around)
//
// Then dh goes back through the repetition of pixels, dropout, SiLU and the norm. A few images at a
// time: how many depends on the shape alone, so that sums over the samples do, too.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "convolution.h"

namespace fastddpm {
namespace cpu {
namespace {

constexpr int64_t WORKING_SET = 32 * 1024 * 1024;  // bytes of images that are at work, about

// Floats that hold so many bfloat16.
int64_t halves(int64_t count) { return (count + 1) / 2; }

// A border around a kernel of 1 has no part in the gradients of x and weight.
Convolution without_border(Convolution forward) {
  if (forward.kernel == 1) forward.before = forward.after = 0;
  return forward;
}

class Backward {
 public:
  Backward(const ConvolutionBackward& op, int threads)
      : op(op),
        forward(without_border(op.forward)),
        threads(threads),
        kernels(kernels_in_use()),
        source(forward.source),
        offset(op.forward.before - forward.before),
        g{1, op.forward.shape.c, reached(source.h), reached(source.w)},
        algorithm(
            kernels.best_weight_gradient(source.c, g.c, g.h, g.w, forward.kernel,
                                         forward.rounded ? kernels.product_rate_bf16() : 0.0)),
        input_way(way_of_input(geometry_of(forward), algorithm == Algorithm::bf16)),
        input(kernels, forward, input_way, true),
        whole_grad(whole()),
        passes_through(!forward.groups && !forward.silu && !forward.dropout.threshold &&
                       forward.upsample == 1) {
    if (op.dx.data) add_parts();
    if (op.dweight) describe_weight_gradient();
    images = images_at_once();
    zeros.resize(size_t(source.c));
    if (op.dbias || op.dshift) sums.resize(size_t(source.n * g.c));
    if (op.dnorm_weight || op.dnorm_bias) {
      dnorm.resize(size_t(4 * source.c));
      norm_sums.resize(size_t(2 * source.c));
    }
  }

  void run() {
    const Buffer memory = allocate(floats(images), false);
    const Buffer products = allocate(op.dweight ? gradient_floats : LINE, false);
    if (op.dweight) begin_weight_gradient(products.get());
    for (int64_t n = 0; n < source.n; n += images)
      run_group(n, std::min(images, source.n - n), memory.get(), products.get());
    if (op.dweight) finish_weight_gradient(products.get());
    write_sums();
  }

 private:
  // dh of the channels of one source, or of both.
  struct Part {
    int64_t channels;
    std::unique_ptr<PackedWeight> weight;
    const Tensor* dx;  // where it goes, or null: to the next step
  };

  const ConvolutionBackward& op;
  const Convolution forward;
  const int threads;
  const Kernels& kernels;
  const Shape source;
  const int64_t offset;       // rows and columns of g that the border's outputs are
  const Shape g;              // of an image
  const Algorithm algorithm;  // of the weight's gradient
  const Way input_way;
  const Input input;
  const float* const whole_grad;  // where grad is g as it is, or null
  const bool passes_through;      // dh is dx
  int64_t images = 1;             // at once
  std::vector<Part> parts;
  WeightGradient gradient{};
  WeightGradientBf16 gradient_bf16{};
  int64_t gradient_floats = 0;
  std::vector<float> zeros, dnorm;
  std::vector<double> sums, norm_sums;  // (N, O); (2, C)

  // Rows or columns of g: all that h has, but for what a kernel reaches past its own pixel.
  int64_t reached(int64_t size) const {
    return size * forward.upsample + forward.before + forward.after - (forward.kernel - 1);
  }

  bool has_all_of_grad() const {
    return op.forward.before == forward.before && op.forward.after == forward.after;
  }

  const float* whole() const {
    const Shape& y = op.forward.shape;
    const bool same = forward.stride == 1 && !offset && g.h == y.h && g.w == y.w;
    return same ? in_place(op.grad, y) : nullptr;
  }

  void add_parts() {
    const int64_t border = forward.kernel - 1;
    const auto add = [&](int64_t channel, int64_t channels, const Tensor* dx) {
      const Geometry is{g.h,
                        g.w,
                        g.c,
                        channels,
                        forward.kernel,
                        1,
                        border - forward.before,
                        border - forward.after,
                        1};
      Weight weight = transposed(weight_of(forward));
      weight.data = static_cast<const char*>(weight.data) +
                    channel * weight.stride[0] * element_size(weight.dtype);
      weight.c_out = channels;
      parts.push_back({channels,
                       std::make_unique<PackedWeight>(kernels, way_of(kernels, is, forward.rounded),
                                                      weight, threads),
                       dx});
    };
    if (!passes_through) return add(0, source.c, nullptr);
    add(0, forward.c1, &op.dx);
    if (op.dx2.data) add(forward.c1, source.c - forward.c1, &op.dx2);
  }

  // ---- the weight's gradient ----

  bool rounded() const { return algorithm == Algorithm::bf16; }

  void describe_weight_gradient() {
    const auto describe = [&](auto& op) {
      op.c_in = source.c, op.c_out = g.c, op.kernel = forward.kernel;
      op.rows = g.h + forward.kernel - 1, op.columns = g.w + forward.kernel - 1;
      op.pixel = input_way.pixel;
      op.height = g.h, op.width = g.w;
      op.dweight = this->op.dweight;
      std::copy_n(this->op.dweight_stride, 4, op.stride);
    };
    describe(gradient);
    describe(gradient_bf16);
    gradient.algorithm = algorithm;
    gradient_bf16.image = input_way.image, gradient_bf16.grad_pixel = g.c;
    gradient_floats =
        LINE + lines(rounded() ? kernels.weight_gradient_bf16_workspace(gradient_bf16, threads)
                               : kernels.weight_gradient_workspace(gradient, threads));
  }

  void begin_weight_gradient(float* products) const {
    if (rounded())
      kernels.weight_gradient_bf16_begin(gradient_bf16, products, threads);
    else
      kernels.weight_gradient_begin(gradient, products, threads);
  }

  void add_weight_gradient(int64_t first, int64_t count, const float* grad, Memory memory,
                           float* products) {
    const float* x = input.prepare(first, count, memory, threads).x;
    if (!rounded()) {
      gradient.images = count, gradient.x = x, gradient.grad = grad;
      return kernels.weight_gradient_add(gradient, products, threads);
    }
    PrepareInput rounding{};
    rounding.images = count, rounding.height = g.h, rounding.width = g.w;
    rounding.channels[0] = rounding.pixel = g.c, rounding.source[0] = grad;
    rounding.repeat = 1, rounding.image = numel(g);
    rounding.out_bf16 = reinterpret_cast<BF16*>(memory.take(halves(count * numel(g))));
    kernels.prepare_input(rounding, threads);
    gradient_bf16.images = count, gradient_bf16.x = reinterpret_cast<const BF16*>(x);
    gradient_bf16.grad = rounding.out_bf16;
    kernels.weight_gradient_bf16_add(gradient_bf16, products, threads);
  }

  void finish_weight_gradient(float* products) const {
    if (rounded())
      kernels.weight_gradient_bf16_finish(gradient_bf16, products, threads);
    else
      kernels.weight_gradient_finish(gradient, products, threads);
  }

  // ---- memory ----

  int64_t pixels_of_dh(int64_t images) const {
    return images * source.h * source.w * forward.upsample * forward.upsample;
  }

  int64_t part_floats(const Part& part, int64_t images) const {
    const Way& way = part.weight->way;
    return lines(way.reads_sources() ? 0 : images * way.prepared_floats()) +
           lines(workspace(kernels, way, images, 0, threads)) +
           lines(pixels_of_dh(images) * part.channels) + 3 * LINE;
  }

  int64_t floats(int64_t images) const {
    int64_t most = op.dweight ? input.floats(images) : 0, all = 0;
    if (op.dweight && rounded()) most += lines(halves(images * numel(g)));
    for (const Part& part : parts) most = std::max(most, part_floats(part, images));
    if (op.dx.data && !passes_through) most += lines(images * numel(source)) + input.floats(images);
    if (!whole_grad) all += lines(images * numel(g));
    if (!has_all_of_grad()) most = std::max(most, images * numel(op.forward.shape));
    return all + lines(most) + LINE;
  }

  int64_t images_at_once() const {
    // By shapes alone, which neither the threads nor a layout of memory change.
    const int64_t values = 2 * numel(g) + input_way.image + 2 * pixels_of_dh(1) * source.c;
    const int64_t bytes = values * int64_t(sizeof(float));
    const int64_t fit = std::max<int64_t>(1, WORKING_SET / bytes);
    const int64_t groups = (source.n + fit - 1) / fit;
    return (source.n + groups - 1) / groups;
  }

  // ---- a group of images ----

  void run_group(int64_t first, int64_t count, float* begin, float* products) {
    Memory memory(begin);
    const float* grad = gradient_of_y(first, count, memory);
    add_sums(first, count, grad, memory);
    if (op.dweight) add_weight_gradient(first, count, grad, memory, products);
    for (const Part& part : parts) {
      Memory own = memory;
      float* dh = run_part(part, first, count, grad, own);
      if (!part.dx) go_back(first, count, dh, own);
    }
  }

  const float* gradient_of_y(int64_t first, int64_t count, Memory& memory) const {
    if (whole_grad) return whole_grad + first * numel(g);
    const Shape& y = op.forward.shape;
    float* grad = memory.take(count * numel(g));
    kernels.spread_images({samples_from(op.grad, first),
                           {count, y.c, y.h, y.w},
                           forward.stride,
                           offset,
                           g.h,
                           g.w,
                           grad},
                          threads);
    return grad;
  }

  void add_sums(int64_t first, int64_t count, const float* grad, Memory memory) {
    if (sums.empty()) return;
    double* out = sums.data() + first * g.c;
    if (has_all_of_grad()) return kernels.sum_pixels(grad, count, g.h * g.w, g.c, out, threads);
    const Shape y{count, g.c, op.forward.shape.h, op.forward.shape.w};
    float* all = memory.take(count * numel(y));
    kernels.load_images(samples_from(op.grad, first), y, all, threads);
    kernels.sum_pixels(all, count, y.h * y.w, y.c, out, threads);
  }

  // dh of a part, in dx where that can hold it.
  float* run_part(const Part& part, int64_t first, int64_t count, const float* grad,
                  Memory& memory) const {
    const Way& way = part.weight->way;
    const Shape shape{count, part.channels, source.h * forward.upsample,
                      source.w * forward.upsample};
    Operands operands{};
    operands.x = grad;
    if (!way.reads_sources()) {
      PrepareInput input = preparation(way, count);
      float* prepared = memory.take(count * way.prepared_floats());
      input.channels[0] = g.c, input.source[0] = grad;
      prepare(kernels, way, input, prepared, threads);
      operands.x = prepared;
    }
    const Shape all{source.n, shape.c, shape.h, shape.w};
    float* const dx = part.dx ? in_place(*part.dx, all) : nullptr;
    operands.y = dx ? dx + first * numel(shape) : memory.take(count * numel(shape));
    operands.weight = part.weight->memory.get(), operands.bias = zeros.data();
    convolve(kernels, way, count, operands, memory.take(workspace(kernels, way, count, 0, threads)),
             threads);
    if (part.dx && !dx)
      kernels.store_images(operands.y, shape.c, shape, samples_from(*part.dx, first), threads);
    return operands.y;
  }

  // dh through the repetition of pixels, dropout, SiLU and the norm to dx and dx2.
  void go_back(int64_t first, int64_t count, float* dh, Memory& memory) {
    const Shape shape{count, source.c, source.h, source.w};
    if (forward.upsample > 1) {
      float* sum = memory.take(count * numel(shape));
      kernels.sum_squares_of_pixels(dh, shape, sum, threads);
      dh = sum;
    }
    if (forward.groups) return norm_backward(first, count, dh);
    if (forward.silu || forward.dropout.threshold) {
      ActivationGradient activation{};
      activation.images = count, activation.pixels = source.h * source.w;
      input.sources(first, count, memory, threads, activation.source);
      std::copy_n(input.channels, SOURCES, activation.channels);
      activation.silu = forward.silu, activation.dropout = samples_from(forward.dropout, first);
      activation.grad = dh;
      kernels.activation_gradient(activation, threads);
    }
    const Tensor* const outputs[SOURCES] = {&op.dx, &op.dx2};
    for (int64_t s = 0, c = 0; s < SOURCES; c += input.channels[s++])
      if (input.channels[s])
        kernels.store_images(dh + c, source.c, {count, input.channels[s], source.h, source.w},
                             samples_from(*outputs[s], first), threads);
  }

  void norm_backward(int64_t first, int64_t count, float* dh) {
    GroupNormSiluBackward norm{};
    norm.forward.shape = {count, source.c, source.h, source.w};
    norm.forward.groups = forward.groups, norm.forward.eps = forward.eps;
    norm.forward.silu = forward.silu, norm.forward.c1 = forward.c1;
    norm.forward.x = samples_from(forward.x, first);
    norm.forward.x2 = samples_from(forward.x2, first);
    norm.forward.weight = forward.norm_weight, norm.forward.bias = forward.norm_bias;
    norm.forward.dropout = samples_from(forward.dropout, first);
    norm.grad = {dh, DType::f32, {numel(source), 1, source.w * source.c, source.c}};
    norm.dx = samples_from(op.dx, first), norm.dx2 = samples_from(op.dx2, first);
    if (!dnorm.empty()) norm.dweight = dnorm.data(), norm.dbias = dnorm.data() + source.c;
    kernels.group_norm_silu_backward(norm, threads);
    for (size_t i = 0; i < norm_sums.size(); ++i) norm_sums[i] += double(dnorm[i]);
  }

  void write_sums() const {
    for (int64_t c = 0; c < source.c && !norm_sums.empty(); ++c) {
      if (op.dnorm_weight) op.dnorm_weight[c] = float(norm_sums[size_t(c)]);
      if (op.dnorm_bias) op.dnorm_bias[c] = float(norm_sums[size_t(source.c + c)]);
    }
    if (op.dshift) std::copy(sums.begin(), sums.end(), op.dshift);
    for (int64_t c = 0; c < g.c && op.dbias; ++c) {
      double sum = 0.0;
      for (int64_t n = 0; n < source.n; ++n) sum += sums[size_t(n * g.c + c)];
      op.dbias[c] = float(sum);
    }
  }
};

// Sums over no samples.
void clear(const ConvolutionBackward& op) {
  const Convolution& forward = op.forward;
  const int64_t sizes[4] = {forward.shape.c, forward.source.c, forward.kernel, forward.kernel};
  const auto fill = [](float* x, int64_t count) {
    if (x) std::fill_n(x, count, 0.0f);
  };
  fill(op.dnorm_weight, forward.source.c);
  fill(op.dnorm_bias, forward.source.c);
  fill(op.dbias, forward.shape.c);
  for (int64_t i = 0; op.dweight && i < sizes[0] * sizes[1] * sizes[2] * sizes[3]; ++i) {
    int64_t at = 0, rest = i;
    for (int d = 3; d >= 0; rest /= sizes[d--]) at += rest % sizes[d] * op.dweight_stride[d];
    op.dweight[at] = 0.0f;
  }
}

}  // namespace

void convolution_backward(const ConvolutionBackward& op, int threads) {
  check(op.forward);
  const Convolution& forward = op.forward;
  const auto require = [](bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(std::string("convolution_backward: ") + message);
  };
  for (const Tensor* x : {&op.grad, &op.dx, &op.dx2})
    require(!x->data || x->dtype != DType::u8, "tensors must be float32, bfloat16 or float16");
  require(!op.dx.data || !forward.x2.data == !op.dx2.data,
          "x2 and dx2 must both be given, or neither");
  require(op.dx.data || !op.dx2.data, "dx2 needs dx");
  require((!op.dnorm_weight && !op.dnorm_bias) || forward.groups, "there is no norm");
  if (forward.shape.n == 0) return clear(op);
  require((!op.dnorm_weight && !op.dnorm_bias) || op.dx.data, "the norm's gradients need dx");
  Backward(op, threads).run();
}

}  // namespace cpu
}  // namespace fastddpm
