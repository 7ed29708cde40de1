// attention_block and its gradient where products take bfloat16: the convolutions and the attention
// of a plan, a group of images at a time. Groups depend on the shape alone, so the bits do not
// depend on the threads.
#include <vector>

#include "../layers/kernels.h"
#include "../sizes.h"
#include "../view.h"

namespace fastddpm {
namespace cpu {
namespace {

constexpr int64_t WORKING_SET = 32 * 1024 * 1024;  // bytes of images that are at work, about
constexpr int64_t BLOCK = 32;                      // channels: whole ones in a product's operand
constexpr int64_t OVERREAD = 15;                   // pixels behind an operand's end

BF16* rounded(const Buffer& buffer) { return reinterpret_cast<BF16*>(buffer.get()); }

// y (pixels, c_out) = x w^T + bias (+ residual): a 1x1 convolution.
class Linear {
 public:
  Linear(const Kernels& kernels, const Matrix& w, const Matrix& bias, int64_t c_in, int64_t c_out,
         int threads)
      : kernels(kernels),
        c_in(c_in),
        c_out(c_out),
        threads(threads),
        weight(allocate(kernels.packed_weight_size_bf16(c_in, c_out, 1, false) / 2, false)),
        bias(size_t(c_out), 0.0f) {
    const Weight as{w.data, w.dtype, c_out, c_in, 1, {w.stride_n, w.stride_c, 1, 1}};
    kernels.pack_weight_bf16(as, false, rounded(weight), threads);
    if (bias.data) {
      const Tensor row{bias.data, bias.dtype, {0, bias.stride_c, 0, 0}};
      load(view(row, {1, c_out, 1, 1}, 0, Order::chw), 0, c_out, this->bias.data());
    }
  }

  void operator()(const BF16* x, int64_t pixels, const float* residual, float* y) const {
    const int64_t pixel = round_up(c_in, BLOCK);
    kernels.convolve_bf16({1, c_in, c_out, 1, 1, false, 1, pixels, pixel, pixels * pixel, 1, pixels,
                           x, rounded(weight), bias.data(), residual, y, 0},
                          threads);
  }

 private:
  const Kernels& kernels;
  const int64_t c_in, c_out;
  const int threads;
  const Buffer weight;
  std::vector<float> bias;
};

// What the op and its gradient share.
class Block {
 public:
  Block(const AttentionBlock& op, int64_t pixel_bytes, int threads)
      : op(op),
        threads(threads),
        kernels(kernels_in_use()),
        channels(op.shape.c),
        pixels(op.shape.h * op.shape.w),
        width(round_up(channels, BLOCK)),
        images(images_at_once(pixel_bytes)),
        to_qkv(kernels, op.qkv_weight, op.qkv_bias, channels, 3 * channels, threads),
        normed(operand(channels)),
        qkv(allocate(images * pixels * 3 * channels, false)) {}

 protected:
  const AttentionBlock& op;
  const int threads;
  const Kernels& kernels;
  const int64_t channels, pixels, width, images;  // width: of a pixel that is an operand
  const Linear to_qkv;
  const Buffer normed, qkv;  // of the images at work, by pixels

  // Of the images at work; zeros behind a pixel's values, where there is room.
  Buffer operand(int64_t channels) const {
    const int64_t pixel = round_up(channels, BLOCK);
    return allocate((images * pixels + OVERREAD) * pixel / 2, pixel > channels);
  }

  int64_t images_at_once(int64_t pixel_bytes) const {
    const int64_t fit = WORKING_SET / (pixels * channels * pixel_bytes);
    const int64_t groups = fit > 1 ? ceil_div(op.shape.n, fit) : op.shape.n;
    return ceil_div(op.shape.n, groups);
  }

  Shape shape_of(int64_t count) const { return {count, channels, op.shape.h, op.shape.w}; }

  GroupNormSilu norm(int64_t first, int64_t count) const {
    GroupNormSilu norm{};
    norm.shape = shape_of(count), norm.groups = op.groups, norm.eps = op.eps;
    norm.x = samples_from(op.x, first), norm.weight = op.norm_weight, norm.bias = op.norm_bias;
    return norm;
  }

  void project(int64_t first, int64_t count) const {
    GroupNormSilu norm = this->norm(first, count);
    norm.y = {rounded(normed), DType::bf16, {pixels * width, 1, op.shape.w * width, width}};
    group_norm_silu(norm, threads);
    to_qkv(rounded(normed), count * pixels, nullptr, qkv.get());
  }

  // x (images, pixels, C) as an operand.
  void round(const float* x, int64_t count, BF16* out) const {
    PrepareInput rounding{};
    rounding.images = count, rounding.height = op.shape.h, rounding.width = op.shape.w;
    rounding.channels[0] = channels, rounding.source[0] = x, rounding.repeat = 1;
    rounding.pixel = width, rounding.image = pixels * width, rounding.out_bf16 = out;
    kernels.prepare_input(rounding, threads);
  }
};

class Forward : Block {
 public:
  Forward(const AttentionBlock& op, int threads)
      : Block(op, 32, threads),
        to_y(kernels, op.proj_weight, op.proj_bias, channels, channels, threads),
        mixed(allocate(images * pixels * channels, false)),
        mixed_rounded(operand(channels)),
        x(allocate(images * pixels * channels, false)) {}

  void run() {
    const Attention most = attention(images);
    const Buffer workspace = allocate(kernels.attention_workspace_bf16(most, threads), false);
    for (int64_t first = 0; first < op.shape.n; first += images) {
      const int64_t count = least(images, op.shape.n - first);
      project(first, count);
      kernels.attention_bf16(attention(count), workspace.get(), threads);
      round(mixed.get(), count, rounded(mixed_rounded));
      kernels.load_images(samples_from(op.x, first), shape_of(count), x.get(), threads);
      float* const y = mixed.get();
      to_y(rounded(mixed_rounded), count * pixels, x.get(), y);
      kernels.store_images(y, channels, shape_of(count), samples_from(op.y, first), threads);
    }
  }

 private:
  const Linear to_y;
  const Buffer mixed, mixed_rounded, x;

  Attention attention(int64_t count) const {
    return {count, pixels, channels, op.heads, qkv.get(), mixed.get()};
  }
};

class Backward : Block {
 public:
  Backward(const AttentionBlockBackward& op, int threads)
      : Block(op.forward, 36, threads),
        backward(op),
        to_mixed(kernels, transposed(op.forward.proj_weight), {}, channels, channels, threads),
        to_normed(kernels, transposed(op.forward.qkv_weight), {}, 3 * channels, channels, threads),
        grad(allocate(images * pixels * channels, false)),
        dmixed(allocate(images * pixels * channels, false)),
        dnormed(allocate(op.forward.shape.n * pixels * channels, false)),
        grad_rounded(operand(channels)),
        mixed(operand(channels)),
        dqkv(operand(3 * channels)),
        sums(size_t(op.forward.shape.n * 4 * channels)) {}

  void run() {
    const int64_t n = op.shape.n;
    const AttentionGradient most = attention(0, images);
    WeightGradientBf16 qkv_gradient =
        weight_gradient(3 * channels, rounded(normed), rounded(dqkv), backward.dqkv_weight);
    WeightGradientBf16 proj_gradient =
        weight_gradient(channels, rounded(mixed), rounded(grad_rounded), backward.dproj_weight);
    const Buffer workspace =
        allocate(kernels.attention_gradient_workspace_bf16(most, threads), false);
    const Buffer qkv_sums = begin(qkv_gradient), proj_sums = begin(proj_gradient);
    for (int64_t first = 0; first < n; first += images) {
      const int64_t count = least(images, n - first);
      project(first, count);
      kernels.load_images(samples_from(backward.grad, first), shape_of(count), grad.get(), threads);
      kernels.sum_pixels(grad.get(), count, pixels, channels,
                         sums.data() + (3 * n + first) * channels, threads);
      round(grad.get(), count, rounded(grad_rounded));
      to_mixed(rounded(grad_rounded), count * pixels, nullptr, dmixed.get());
      kernels.attention_gradient_bf16(attention(first, count), workspace.get(), threads);
      to_normed(rounded(dqkv), count * pixels, nullptr, dnormed.get() + first * pixels * channels);
      add(qkv_gradient, count, qkv_sums);
      add(proj_gradient, count, proj_sums);
    }
    kernels.weight_gradient_bf16_finish(qkv_gradient, qkv_sums.get(), threads);
    kernels.weight_gradient_bf16_finish(proj_gradient, proj_sums.get(), threads);
    add_samples(sums.data(), 3 * channels, backward.dqkv_bias);
    add_samples(sums.data() + 3 * n * channels, channels, backward.dproj_bias);
    norm_backward();
  }

 private:
  const AttentionBlockBackward& backward;
  const Linear to_mixed, to_normed;
  const Buffer grad, dmixed;               // of the images at work, by pixels
  const Buffer dnormed;                    // of all images
  const Buffer grad_rounded, mixed, dqkv;  // operands
  std::vector<double> sums;                // (N, 3C) of dqkv, (N, C) of grad

  static Matrix transposed(const Matrix& m) { return {m.data, m.dtype, m.stride_c, m.stride_n}; }

  AttentionGradient attention(int64_t first, int64_t count) {
    AttentionGradient op{};
    op.images = count, op.pixels = pixels, op.channels = channels, op.heads = this->op.heads;
    op.qkv = qkv.get(), op.dmixed = dmixed.get();
    op.mixed = rounded(mixed), op.mixed_pixel = width;
    op.dqkv = rounded(dqkv), op.dqkv_pixel = round_up(3 * channels, BLOCK);
    op.sums = sums.data() + first * 3 * channels;
    return op;
  }

  WeightGradientBf16 weight_gradient(int64_t c_out, const BF16* x, const BF16* grad,
                                     float* dweight) const {
    WeightGradientBf16 op{};
    op.images = op.rows = op.height = op.kernel = 1, op.c_in = channels, op.c_out = c_out;
    op.pixel = width, op.grad_pixel = round_up(c_out, BLOCK), op.x = x, op.grad = grad;
    op.dweight = dweight, op.stride[0] = channels, op.stride[1] = 1;
    return op;
  }

  Buffer begin(const WeightGradientBf16& op) const {
    Buffer sums = allocate(kernels.weight_gradient_bf16_workspace(op, threads), false);
    kernels.weight_gradient_bf16_begin(op, sums.get(), threads);
    return sums;
  }

  void add(WeightGradientBf16& op, int64_t count, const Buffer& sums) const {
    op.columns = op.width = count * pixels, op.image = op.columns * op.pixel;
    kernels.weight_gradient_bf16_add(op, sums.get(), threads);
  }

  void add_samples(const double* sums, int64_t count, float* out) const {
    if (!out) return;
    for (int64_t c = 0; c < count; ++c) {
      double sum = 0.0;
      for (int64_t n = 0; n < op.shape.n; ++n) sum += sums[n * count + c];
      out[c] = float(sum);
    }
  }

  // dx = grad + the norm's gradient.
  void norm_backward() const {
    GroupNormSiluBackward norm{};
    norm.forward = this->norm(0, op.shape.n);
    norm.grad = {
        dnormed.get(), DType::f32, {pixels * channels, 1, op.shape.w * channels, channels}};
    norm.dx = backward.dx, norm.grad_u = backward.grad;
    norm.dweight = backward.dnorm_weight, norm.dbias = backward.dnorm_bias;
    group_norm_silu_backward(norm, threads);
  }
};

}  // namespace

void attention_block_bf16(const AttentionBlock& op, int threads) {
  if (op.shape.n * op.shape.h * op.shape.w > 0) Forward(op, threads).run();
}

void attention_block_backward_bf16(const AttentionBlockBackward& op, int threads) {
  const Shape& shape = op.forward.shape;
  if (shape.n * shape.h * shape.w > 0) Backward(op, threads).run();
}

}  // namespace cpu
}  // namespace fastddpm
