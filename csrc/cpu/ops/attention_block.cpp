// attention_block: GroupNorm, q k v, softmax(q k^T / sqrt(d)) v, projection and residual.
//
// A few images at a time go through four phases: normalise; q, k, v; attention by tiles of queries,
// each of which sees all keys, so that no more than a tile's rows of scores exist; projection and
// residual. Operands are float32 whatever the storage. The tiles depend on the shape alone, and
// products sum in a fixed order, so the bits do not depend on the threads or on the batch.
#include "../isa.h"
#include "../layers/attention.h"
#include "../layers/gemm.h"
#include "../parallel.h"
#include "../view.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t WORKING_SET =
    16 * 1024 * 1024;  // bytes of q, k, v that are kept at a time, about

class Block {
 public:
  Block(const AttentionBlock& op, int threads)
      : op(op),
        threads(threads),
        channels(op.shape.c),
        pixels(op.shape.h * op.shape.w),
        depth(channels / op.heads),
        tiles((pixels + ROWS - 1) / ROWS),
        key_size(packed_size(depth, pixels)),
        value_size(packed_size(pixels, depth)),
        images(images_at_once()),
        normed(images * pixels * channels, false),
        qkv(images * pixels * 3 * channels, false),
        keys(images * op.heads * key_size, false),
        values(images * op.heads * value_size, false),
        qkv_weight(packed_size(channels, 3 * channels), false),
        proj_weight(packed_size(channels, channels), false),
        qkv_bias(round_up(3 * channels, PANEL)),
        proj_bias(round_up(channels, PANEL)),
        scratch(threads * scratch_size(), false) {
    pack_matrix(op.qkv_weight, 3 * channels, channels, qkv_weight.data);
    pack_matrix(op.proj_weight, channels, channels, proj_weight.data);
    pack_row(op.qkv_bias, 3 * channels, qkv_bias.data);
    pack_row(op.proj_bias, channels, proj_bias.data);
  }

  void run() {
    for (int64_t n = 0; n < op.shape.n; n += images)
      run_images(n, op.shape.n - n < images ? op.shape.n - n : images);
  }

 private:
  const AttentionBlock& op;
  const int threads;
  const int64_t channels, pixels, depth, tiles, key_size, value_size, images;
  Scratch<float> normed;        // (images, pixels, C)
  Scratch<float> qkv;           // (images, pixels, 3C); q is overwritten by the mixed values
  Scratch<float> keys, values;  // (images, heads), packed: k^T and v
  Scratch<float> qkv_weight, proj_weight, qkv_bias, proj_bias;
  Scratch<float> scratch;  // per thread: a tile's scores, or its result and its x

  int64_t images_at_once() const {
    const int64_t bytes = pixels * 6 * channels * int64_t(sizeof(float));
    return equal_groups(op.shape.n, WORKING_SET / bytes);
  }

  int64_t scratch_size() const {
    const int64_t scores = ROWS * round_up(pixels, PANEL), images = 2 * ROWS * channels;
    return scores > images ? scores : images;
  }

  int64_t rows_of(int64_t tile) const {
    return pixels - tile * ROWS < ROWS ? pixels - tile * ROWS : ROWS;
  }

  void run_images(int64_t first, int64_t count) {
    normalise(first, count);
    const int64_t elements = count * pixels * channels, work = elements * channels / 16;
    parallel_for(count * tiles, work, threads, [&](int64_t job, int) {
      const int64_t row = job / tiles * pixels + job % tiles * ROWS;
      multiply(normed.data + row * channels, channels, qkv_weight.data, rows_of(job % tiles),
               channels, 3 * channels, qkv_bias.data, qkv.data + row * 3 * channels, 3 * channels);
    });
    parallel_for(count * op.heads, elements, threads, [&](int64_t job, int) {
      const int64_t ld = 3 * channels;
      const float* k = qkv.data + job / op.heads * pixels * ld + channels + job % op.heads * depth;
      pack(k, depth, pixels, 1, ld, keys.data + job * key_size);
      pack(k + channels, pixels, depth, ld, 1, values.data + job * value_size);
    });
    parallel_for(count * op.heads * tiles, work, threads, [&](int64_t job, int thread) {
      attend(job / tiles, job % tiles, scratch.data + thread * scratch_size());
    });
    parallel_for(count * tiles, work, threads, [&](int64_t job, int thread) {
      project(first, job / tiles, job % tiles, scratch.data + thread * scratch_size());
    });
  }

  void normalise(int64_t first, int64_t count) {
    const Tensor y{
        normed.data, DType::f32, {pixels * channels, 1, op.shape.w * channels, channels}};
    GroupNormSilu norm{};
    norm.shape = {count, channels, op.shape.h, op.shape.w};
    norm.groups = op.groups, norm.eps = op.eps;
    norm.x = samples_from(op.x, first), norm.y = y;
    norm.weight = op.norm_weight, norm.bias = op.norm_bias;
    group_norm_silu(norm, threads);
  }

  // head: counted through all images that are at work.
  void attend(int64_t head, int64_t tile, float* scores) {
    float* q = qkv.data + (head / op.heads * pixels + tile * ROWS) * 3 * channels +
               head % op.heads * depth;
    attend_rows(q, 3 * channels, keys.data + head * key_size, values.data + head * value_size,
                rows_of(tile), pixels, depth, scores, q, 3 * channels);
  }

  void project(int64_t first, int64_t image, int64_t tile, float* result) {
    const int64_t rows = rows_of(tile), row = image * pixels + tile * ROWS;
    const int64_t from = tile * ROWS * channels, count = rows * channels;
    float* x = result + ROWS * channels;
    multiply(qkv.data + row * 3 * channels, 3 * channels, proj_weight.data, rows, channels,
             channels, proj_bias.data, result, channels);
    load(view(op.x, op.shape, first + image, Order::hwc), from, count, x);
    for (int64_t i = 0; i < count; ++i) result[i] += x[i];
    store(view(op.y, op.shape, first + image, Order::hwc), from, count, result);
  }
};

}  // namespace

void attention_block(const AttentionBlock& op, int threads) {
  if (op.shape.n * op.shape.h * op.shape.w > 0) Block(op, threads).run();
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
