// The gradient of attention_block.
//
// With q, k, v of the normalised input, P = softmax(S), S = q k^T / sqrt(d), and dM = grad proj:
//
//     dv = P^T dM,  dP = dM v^T,  dS = P (dP - sum_j P dP),  dq = dS k,  dk = dS^T q
//
// A head's queries are taken a tile at a time, so that no more than a tile's rows of P and dP
// exist. Operands are float32 whatever the storage; sums over pixels and images have a fixed order.
#include "../isa.h"
#include "../layers/attention.h"
#include "../parallel.h"
#include "../sizes.h"
#include "../view.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t WORKING_SET = 32 * 1024 * 1024;  // bytes of images that are at work, about
constexpr int64_t RUN = 128;                       // pixels in a partial sum of a weight's gradient
constexpr int64_t COLUMNS_AT_ONCE = 64;            // of a sum over pixels

class Backward {
 public:
  Backward(const AttentionBlockBackward& op, int threads)
      : op(op),
        shape(op.forward.shape),
        threads(threads),
        channels(shape.c),
        pixels(shape.h * shape.w),
        heads(op.forward.heads),
        depth(channels / heads),
        tiles((pixels + ROWS - 1) / ROWS),
        images(images_at_once()),
        normed(images * pixels * channels, false),
        qkv(3 * images * pixels * channels, false),
        grad(images * pixels * channels, false),
        dmixed(images * pixels * channels, false),
        mixed(images * pixels * channels, false),
        dqkv(3 * images * pixels * channels, false),
        panels(packed_size(images * pixels, channels), false),
        dnormed(shape.n * pixels * channels, false),
        qkv_weight(packed_size(channels, 3 * channels), false),
        qkv_transposed(packed_size(3 * channels, channels), false),
        proj_transposed(packed_size(channels, channels), false),
        qkv_bias(round_up(3 * channels, PANEL)),
        scratch(threads * head_scratch(), false) {
    const AttentionBlock& forward = op.forward;
    pack_matrix(forward.qkv_weight, 3 * channels, channels, qkv_weight.data);
    pack_matrix(transposed(forward.qkv_weight), channels, 3 * channels, qkv_transposed.data);
    pack_matrix(transposed(forward.proj_weight), channels, channels, proj_transposed.data);
    pack_row(forward.qkv_bias, 3 * channels, qkv_bias.data);
    clear(op.dqkv_weight, 3 * channels * channels);
    clear(op.dproj_weight, channels * channels);
    clear(op.dqkv_bias, 3 * channels);
    clear(op.dproj_bias, channels);
  }

  void run() {
    for (int64_t n = 0; n < shape.n; n += images) run_images(n, least(images, shape.n - n));
    norm_backward();
  }

 private:
  const AttentionBlockBackward& op;
  const Shape& shape;
  const int threads;
  const int64_t channels, pixels, heads, depth, tiles, images;
  Scratch<float> normed, qkv, grad, dmixed, mixed, dqkv;  // of the images at work, by pixels
  Scratch<float> panels;                                  // one of these, packed
  Scratch<float> dnormed;                                 // of all images
  Scratch<float> qkv_weight, qkv_transposed, proj_transposed, qkv_bias;
  Scratch<float> scratch;  // per thread: what a head needs

  static Matrix transposed(const Matrix& m) { return {m.data, m.dtype, m.stride_c, m.stride_n}; }

  static void clear(float* x, int64_t count) {
    if (x) __builtin_memset(x, 0, size_t(count) * sizeof(float));
  }

  int64_t images_at_once() const {
    return equal_groups(shape.n, WORKING_SET / (pixels * 11 * channels * int64_t(sizeof(float))));
  }

  int64_t keys_size() const { return packed_size(depth, pixels); }    // k^T or v^T
  int64_t values_size() const { return packed_size(pixels, depth); }  // k or v
  int64_t tile_size() const { return packed_size(ROWS, depth); }      // a tile's q or dM
  int64_t scores_size() const { return ROWS * round_up(pixels, PANEL); }

  int64_t head_scratch() const {
    return 2 * (keys_size() + values_size() + tile_size() + scores_size() + pixels * depth);
  }

  void run_images(int64_t first, int64_t count) {
    normalise(first, count);
    const int64_t elements = count * pixels * channels, work = elements * channels / 16;
    parallel_for(count * tiles, work, threads,
                 [&](int64_t job, int) { project(first, job / tiles, job % tiles * ROWS); });
    parallel_for(count * heads, work, threads, [&](int64_t job, int thread) {
      head(job / heads, job % heads * depth, scratch.data + thread * head_scratch());
    });
    parallel_for(count * tiles, work, threads, [&](int64_t job, int) {
      const int64_t pixel = job % tiles * ROWS, row = job / tiles * pixels + pixel;
      multiply(dqkv.data + row * 3 * channels, 3 * channels, qkv_transposed.data,
               least(ROWS, pixels - pixel), 3 * channels, channels, nullptr,
               dnormed.data + (first * pixels + row) * channels, channels);
    });
    weight_gradient(dqkv.data, 3 * channels, normed.data, count * pixels, op.dqkv_weight);
    weight_gradient(grad.data, channels, mixed.data, count * pixels, op.dproj_weight);
    bias_gradient(dqkv.data, 3 * channels, count * pixels, op.dqkv_bias);
    bias_gradient(grad.data, channels, count * pixels, op.dproj_bias);
  }

  Tensor by_pixels(float* data) const {
    return {data, DType::f32, {pixels * channels, 1, shape.w * channels, channels}};
  }

  GroupNormSilu norm() const {
    const AttentionBlock& forward = op.forward;
    GroupNormSilu norm{};
    norm.shape = shape, norm.groups = forward.groups, norm.eps = forward.eps;
    norm.x = forward.x, norm.weight = forward.norm_weight, norm.bias = forward.norm_bias;
    return norm;
  }

  void normalise(int64_t first, int64_t count) {
    GroupNormSilu norm = this->norm();
    norm.shape.n = count;
    norm.x = samples_from(op.forward.x, first), norm.y = by_pixels(normed.data);
    group_norm_silu(norm, threads);
  }

  // q, k, v, and dM of a tile of pixels.
  void project(int64_t first, int64_t image, int64_t pixel) {
    const int64_t rows = least(ROWS, pixels - pixel), row = image * pixels + pixel;
    const int64_t at = row * channels;
    multiply(normed.data + at, channels, qkv_weight.data, rows, channels, 3 * channels,
             qkv_bias.data, qkv.data + 3 * at, 3 * channels);
    load(view(op.grad, shape, first + image, Order::hwc), pixel * channels, rows * channels,
         grad.data + at);
    multiply(grad.data + at, channels, proj_transposed.data, rows, channels, channels, nullptr,
             dmixed.data + at, channels);
  }

  // mixed, dq, dk and dv of the head whose channels begin at c.
  void head(int64_t image, int64_t c, float* memory) {
    const int64_t ld = 3 * channels, ld_scores = round_up(pixels, PANEL);
    const auto take = [&](int64_t size) { return (memory += size) - size; };
    float *keys = take(keys_size()), *values = take(values_size());
    float *keys_back = take(values_size()), *values_back = take(keys_size());
    float *tile_q = take(tile_size()), *tile_dmixed = take(tile_size());
    float *p = take(scores_size()), *ds = take(scores_size());
    float *dk = take(pixels * depth), *dv = take(pixels * depth);

    const float* q = qkv.data + image * pixels * ld + c;
    const float *k = q + channels, *v = k + channels;
    pack(k, depth, pixels, 1, ld, keys);
    pack(v, pixels, depth, ld, 1, values);
    pack(k, pixels, depth, ld, 1, keys_back);
    pack(v, depth, pixels, 1, ld, values_back);
    clear(dk, pixels * depth);
    clear(dv, pixels * depth);
    const float scale = float(1.0 / sqrt(double(depth)));
    for (int64_t pixel = 0; pixel < pixels; pixel += ROWS) {
      const int64_t rows = least(ROWS, pixels - pixel),
                    at = (image * pixels + pixel) * channels + c;
      const float *tile = q + pixel * ld, *dm = dmixed.data + at;
      multiply(tile, ld, keys, rows, depth, pixels, nullptr, p, ld_scores);
      for (int64_t i = 0; i < rows; ++i) {
        float* row = p + i * ld_scores;
        const float factor = exponentiate(row, pixels, scale);
        for (int64_t j = 0; j < pixels; ++j) row[j] *= factor;
      }
      multiply(p, ld_scores, values, rows, pixels, depth, nullptr, mixed.data + at, channels);
      multiply(dm, channels, values_back, rows, depth, pixels, nullptr, ds, ld_scores);
      for (int64_t i = 0; i < rows; ++i)
        softmax_gradient(p + i * ld_scores, ds + i * ld_scores, pixels, scale);
      multiply(ds, ld_scores, keys_back, rows, pixels, depth, nullptr, dqkv.data + 3 * at - 2 * c,
               ld);
      pack(tile, rows, depth, ld, 1, tile_q);
      pack(dm, rows, depth, channels, 1, tile_dmixed);
      add_transposed(ds, ld_scores, tile_q, pixels, rows, depth, dk, depth);
      add_transposed(p, ld_scores, tile_dmixed, pixels, rows, depth, dv, depth);
    }
    float* out = dqkv.data + image * pixels * ld + channels + c;
    for (int64_t i = 0; i < pixels; ++i)
      for (int64_t j = 0; j < depth; ++j) {
        out[i * ld + j] = dk[i * depth + j];
        out[i * ld + channels + j] = dv[i * depth + j];
      }
  }

  // out (m, C) += a^T b over all rows; a: (rows, m), b: (rows, C).
  void weight_gradient(const float* a, int64_t m, const float* b, int64_t rows, float* out) {
    const int64_t count = round_up(channels, PANEL) / PANEL, blocks = (m + ROWS - 1) / ROWS;
    parallel_for(count, rows * channels, threads, [&](int64_t j, int) {
      pack(b + j * PANEL, rows, least(PANEL, channels - j * PANEL), channels, 1,
           panels.data + j * rows * PANEL);
    });
    parallel_for(blocks, rows * m * channels / 16, threads, [&](int64_t block, int) {
      const int64_t i = block * ROWS, width = least(ROWS, m - i);
      float columns[RUN * ROWS];  // of a, side by side: read once for every panel of b
      for (int64_t first = 0; first < rows; first += RUN) {
        const int64_t length = least(RUN, rows - first);
        for (int64_t l = 0; l < length; ++l)
          __builtin_memcpy(columns + l * width, a + (first + l) * m + i,
                           size_t(width) * sizeof(float));
        for (int64_t j = 0; j < count; ++j) {
          const int64_t some = least(PANEL, channels - j * PANEL);
          add_transposed(columns, width, panels.data + j * rows * PANEL + first * panel_width(some),
                         width, length, some, out + i * channels + j * PANEL, channels);
        }
      }
    });
  }

  void bias_gradient(const float* a, int64_t m, int64_t rows, float* out) {
    if (!out) return;
    const int64_t blocks = (m + COLUMNS_AT_ONCE - 1) / COLUMNS_AT_ONCE;
    parallel_for(blocks, rows * m, threads, [&](int64_t block, int) {
      const int64_t first = block * COLUMNS_AT_ONCE, count = least(COLUMNS_AT_ONCE, m - first);
      float sum[COLUMNS_AT_ONCE] = {};
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < count; ++j) sum[j] += a[i * m + first + j];
      for (int64_t j = 0; j < count; ++j) out[first + j] += sum[j];
    });
  }

  // dx = grad + the norm's gradient.
  void norm_backward() {
    GroupNormSiluBackward backward{};
    backward.forward = norm();
    backward.grad = by_pixels(dnormed.data), backward.dx = op.dx, backward.grad_u = op.grad;
    backward.dweight = op.dnorm_weight, backward.dbias = op.dnorm_bias;
    group_norm_silu_backward(backward, threads);
  }
};

}  // namespace

void attention_block_backward(const AttentionBlockBackward& op, int threads) {
  const Shape& shape = op.forward.shape;
  if (shape.n * shape.h * shape.w > 0) Backward(op, threads).run();
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
