// The native ops: what each computes, on which shapes, in which units. No torch, no Python.
//
// A tensor is a pointer with a storage type and strides in elements; its shape belongs to the op.
// Images are (N, C, H, W) in any memory layout. Arithmetic is float32 whatever the storage. `t` is
// 0-based and indexes the [T, COLUMNS] float32 table of Schedule.table().
//
// cpu:: functions check what they can (they throw std::invalid_argument), use up to `threads`
// threads, and give the same bits for every thread count and batch size. cuda:: functions take
// pointers of one device, only queue work on `stream`, and throw std::runtime_error if that fails;
// a t outside the table takes its nearest row.
#pragma once
#include <cstdint>

#include "math.h"

namespace fastddpm {

struct Shape {
  int64_t n, c, h, w;
};

struct Tensor {  // (N, C, H, W); not given: data is null
  void* data;
  DType dtype;
  int64_t stride[4];
};

struct Matrix {  // (N, C), or (C,) with stride_n = 0, or a weight's (rows, columns); or null
  void* data;
  DType dtype;
  int64_t stride_n, stride_c;
};

struct PerSample {  // one int64 for each of the N samples; stride 0 repeats one value
  const int64_t* data;
  int64_t stride;
};

struct Table {  // float32, contiguous
  const float* data;
  int64_t steps;
};

struct Random {  // the stream of sample n is (seed, step[n], sample_index[n]); see philox.h
  uint64_t seed;
  PerSample step, sample_index;
  const int64_t* device_seed;  // CUDA: where the seed is read instead, when a kernel runs; or null
};

// Standard normals of the RNG contract: out is (n, numel), contiguous, f32, bf16 or f16.
// z_0 = sqrt(-2 log u_0) cos(2 pi u_1), z_1 = sqrt(-2 log u_0) sin(2 pi u_1), u = fl32(fl32(word)
// 2^-32 + 2^-33).
struct Randn {
  int64_t n, numel;
  void* out;
  DType dtype;
  Random random;
};

// Algorithm 1's choices for example n, of block 0 of the stream (seed, step, sample_index[n]):
// t = floor(word_0 levels / 2^32) and flip, the lowest bit of word_1.
struct Choices {
  int64_t n, levels;  // levels in 1 .. MAX_LEVELS - 1
  uint64_t seed;
  uint32_t step;
  PerSample sample_index;
  int64_t* t;     // (N,) contiguous
  uint8_t* flip;  // (N,) contiguous, 0 or 1
};

constexpr int64_t MAX_LEVELS = int64_t(1) << 31;

// x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps   (DDPM Eq. 4).
// x0: u8 0 .. 255, scaled to [-1, 1] first, or float; mirrored along W where flip[n] is not 0.
// eps: read, or, if generate_eps, drawn from `random`, rounded to the storage type of x_t and
// written, where it is given.
struct Noise {
  Shape shape;
  Tensor x0, eps, xt;
  bool generate_eps;
  Random random;
  PerSample t;
  const uint8_t* flip;  // (N,) or null
  Table table;
};

// x_{t-1} = mean + sigma_t z through the x0 prediction (Eq. 15, clip, Eq. 7; Algorithm 2).
// z: read if given, else drawn in float32 from `random`; neither read nor drawn where sigma_t = 0.
// log_variance replaces sigma_t where that is not 0; learned_range: it is no log sigma^2 but where
// that lies from log sigma_t^2 (-1) to the table's LOG_VARIANCE (1). out may be xt itself.
struct PosteriorStep {
  Shape shape;
  Tensor xt, model_output, z, log_variance, out;
  Random random;
  PerSample t;
  Prediction prediction;
  bool clip, learned_range;
  Table table;
};

// An element is kept where its word is at least `threshold`, and then multiplied by keep_scale,
// else by 0; a threshold of 0: all are kept as they are. Elements count channels last: pixel * C +
// channel.
struct Dropout {
  float keep_scale;    // 1 / (1 - p)
  uint32_t threshold;  // floor(p 2^32)
  Random random;
};

// y = dropout(silu((1 + scale) (weight (h - mean) / sqrt(var + eps) + bias) + shift)) of
// h = cat(u, x2) over the channels, u = x + residual + before; statistics per sample and group;
// silu is the identity if `silu` is false. Statistics are centred: a mean of 1000 with a spread of
// 0.1 is fine. With a residual, u is rounded to its storage type and written, and h has what was
// written.
struct GroupNormSilu {
  Shape shape;  // of y: c = c1 + the channels of x2
  int64_t groups;
  float eps;
  bool silu;
  Tensor x, y;
  Matrix weight, bias;  // (C,)
  Matrix scale, shift;  // (N, C)
  float *mean, *rstd;   // (N, groups) contiguous, or null
  float* workspace;     // CUDA: group_norm_workspace() floats; the CPU needs none
  int64_t c1;           // channels of x, residual and u
  Tensor x2;            // (N, C - c1, H, W) or null
  Tensor residual, u;   // (N, c1, H, W), both or neither
  Matrix before;        // (N, c1), or (c1,), or null
  Dropout dropout;
};

// CUDA: a sample's group of channels that is too large for a block's shared memory is cut into at
// most this many chunks, whose sums meet in the workspace.
constexpr int64_t GROUP_NORM_CHUNKS = 32;

inline int64_t group_norm_workspace(const Shape& shape, int64_t groups, bool backward) {
  const int64_t statistics = 3 * groups * GROUP_NORM_CHUNKS;
  const int64_t sums = shape.c * (3 * GROUP_NORM_CHUNKS + 2);
  return shape.n * (statistics + (backward ? sums : 0));
}

// The gradient of group_norm_silu; statistics and dropout's mask are computed again. Sums have a
// fixed order. Where there was a residual, x is the u that was written, and `before` is null.
struct GroupNormSiluBackward {
  GroupNormSilu forward;   // y, mean, rstd, residual and u are not used
  Tensor grad;             // like y
  Tensor dx;               // like x: with grad_u added, so the gradient of a residual as well
  float *dweight, *dbias;  // (C,) or null
  float *dscale, *dshift;  // (N, C) contiguous, or null
  Tensor grad_u;           // like x, or null
  Tensor dx2;              // like x2, or null
  float* dbefore;          // (N, c1) contiguous, or null: sums of dx
};

// u = x + residual + before, rounded once.
struct ResidualSum {
  Shape shape;
  Tensor x, residual, u;  // residual: or null
  Matrix before;          // (N, C), or (C,), or null
};

namespace cpu {
class PackedWeights;
}

// y = conv(up(dropout(silu(GroupNorm(cat(x, x2)))))) + bias + shift + residual: a kernel
// of 1 or 3, a stride of 1 or 2, a border of `before` and `after` rows and columns of zeros, up
// repeating each pixel to a square of `upsample` by `upsample`.
struct Convolution {
  Shape source, shape;  // of x and x2 side by side; of y
  int64_t c1;           // channels of x
  int64_t kernel, stride, before, after, upsample;
  bool rounded;  // operands may be rounded to bfloat16
  Tensor x, x2, y, residual;
  Tensor weight;       // (O, C, kernel, kernel)
  Matrix bias, shift;  // (O,); (N, O) or (O,)
  int64_t groups;      // 0: no norm
  float eps;
  bool silu;
  Matrix norm_weight, norm_bias;  // (C,)
  Dropout dropout;
  cpu::PackedWeights* packed;  // what is kept of weight from call to call; or null
};

// The gradient of convolution; what it read is computed again, dropout's mask is drawn again. Sums
// over the samples have an order that shapes and their number fix.
struct ConvolutionBackward {
  Convolution forward;               // y, residual, bias, shift and packed are not used
  Tensor grad;                       // like y
  Tensor dx, dx2;                    // like x and x2; or both null
  float *dnorm_weight, *dnorm_bias;  // (C,), or null, and then dx is null too or there is no norm
  float* dweight;                    // (O, C, kernel, kernel), or null
  int64_t dweight_stride[4];
  float *dbias, *dshift;  // (O,) and (N, O), or null
};

// y = x + proj(softmax(q k^T / sqrt(d)) v), with q, k, v = split(qkv(GroupNorm(x))) over the pixels
// of each sample; qkv_weight's rows are q, then k, then v, each head by head, d = C / heads.
struct AttentionBlock {
  Shape shape;
  int64_t groups, heads;
  float eps;
  Tensor x, y;
  Matrix norm_weight, norm_bias;  // (C,)
  Matrix qkv_weight, qkv_bias;    // (3C, C), (3C,)
  Matrix proj_weight, proj_bias;  // (C, C), (C,)
};

// The gradient of attention_block; scores are computed again, a tile of queries at a time.
struct AttentionBlockBackward {
  AttentionBlock forward;            // y is not used
  Tensor grad, dx;                   // like x
  float *dnorm_weight, *dnorm_bias;  // (C,) or null
  float *dqkv_weight, *dqkv_bias;    // (3C, C) and (3C,), the latter or null
  float *dproj_weight, *dproj_bias;  // (C, C) and (C,), the latter or null
};

// log of the mass that N(mean, exp(log_scale)^2) puts on the pixel's bin [x - 1/255, x + 1/255], in
// nats, where x is in [-1, 1] with 256 levels and the outer bins are unbounded   (DDPM Eq. 13).
// Float64 inside.
struct DiscretizedLogLikelihood {
  Shape shape;
  Tensor x, mean, log_scale, out;
};

// out[n] = the mean of (prediction - target)^2 over the elements of sample n. Squares are summed in
// float64, in an order of the sample's shape alone.
struct SquaredError {
  Shape shape;
  Tensor prediction, target;
  float* out;         // (N,) contiguous
  double* workspace;  // CUDA: N squared_error_chunks() numbers, or null for one chunk a sample
};

// CUDA: how many sums of a sample of so many elements meet in the workspace.
constexpr int64_t SQUARED_ERROR_CHUNK = 1 << 14;

inline int64_t squared_error_chunks(int64_t elements) {
  return (elements + SQUARED_ERROR_CHUNK - 1) / SQUARED_ERROR_CHUNK;
}

// dprediction = 2 grad[n] (prediction - target) / the elements of a sample.
struct SquaredErrorBackward {
  Shape shape;
  Matrix grad;  // (N,)
  Tensor prediction, target, dprediction;
};

// The term of Eq. 5 of each sample in bits/dim, KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) or at
// t = 0 -log p(x_0 | x_1) (Eq. 13), and the mean squared error of its x0 prediction.
// x0: u8 0 .. 255, or float in [-1, 1]. xt: read if given, else drawn as noise draws it in float32.
// log_variance: the model's, as in posterior_step; else the table's LOG_VARIANCE is log sigma_t^2.
// Float64 inside, summed in an order of the sample's shape alone, whatever the layouts.
struct VlbTerm {
  Shape shape;
  Tensor x0, xt, model_output, log_variance;
  Random random;
  PerSample t;
  Prediction prediction;
  bool clip, learned_range;
  Table table;
  const float* log_ratio;  // (T,) contiguous: LOG_VARIANCE less log beta-tilde_t, of t = 1 at t = 0
  float *term, *mse;       // (N,) contiguous
  double* workspace;       // CUDA: 2 N vlb_term_chunks() numbers, or null for one chunk
};

// CUDA: how many sums of a sample of so many elements meet in the workspace.
constexpr int64_t VLB_TERM_CHUNK = 1 << 12;

inline int64_t vlb_term_chunks(int64_t elements) {
  return (elements + VLB_TERM_CHUNK - 1) / VLB_TERM_CHUNK;
}

// The elements of a dense tensor in the order of its memory.
struct Flat {
  void* data;
  DType dtype;
  int64_t size;
};

// What Adam keeps of one parameter, `size` elements of each in the same order; float32 but for the
// gradient and the copy.
struct AdamTensors {
  int64_t size;
  float *param, *exp_avg, *exp_avg_sq;
  float* average;  // or null
  float* step;     // one number: how many steps it has taken
  const void* grad;
  void* copy;  // of the parameter, rounded; or null
  DType grad_type, copy_type;
};

// Adam for a list of tensors, and the moving average of their parameters:
//   g <- grad / grad_scale, times clip / (norm + 1e-6) where norm is above clip
//   step <- step + 1, exp_avg and exp_avg_sq as in math.h, param, average <- average + share (param
//   - average), copy <- param
// A step that is refused, or whose norm is not finite, leaves everything as it is. No tensor that
// is written shares memory with another.
struct Adam {
  const AdamTensors* tensors;  // in the host's memory
  int64_t count;
  const float *lr, *share;      // one number each
  const float *norm, *refused;  // the same, or null
  double beta1, beta2, eps;
  float clip, grad_scale;  // clip: infinity for none
  float* workspace;        // CUDA: adam_workspace() floats
};

inline int64_t adam_workspace(int64_t count) { return 2 * (count + 1); }

// out = the norm of all elements in one: squares are summed in float64, in an order of the sizes
// alone.
struct GradNorm {
  const Flat* grads;  // in the host's memory
  int64_t count;
  float* out;         // one number
  double* workspace;  // CUDA: a number for each GRAD_NORM_CHUNK of each tensor
};

constexpr int64_t GRAD_NORM_CHUNK = 1 << 14;

namespace cpu {
void randn(const Randn& op, int threads);
void choices(const Choices& op, int threads);
void noise(const Noise& op, int threads);
void posterior_step(const PosteriorStep& op, int threads);
void group_norm_silu(const GroupNormSilu& op, int threads);
void group_norm_silu_backward(const GroupNormSiluBackward& op, int threads);
void residual_sum(const ResidualSum& op, int threads);
void attention_block(const AttentionBlock& op, int threads);
void attention_block_backward(const AttentionBlockBackward& op, int threads);
void discretized_log_likelihood(const DiscretizedLogLikelihood& op, int threads);
void convolution(const Convolution& op, int threads);
void convolution_backward(const ConvolutionBackward& op, int threads);
void vlb_term(const VlbTerm& op, int threads);
void squared_error(const SquaredError& op, int threads);
void squared_error_backward(const SquaredErrorBackward& op, int threads);
void adam(const Adam& op, int threads);
void grad_norm(const GradNorm& op, int threads);
}  // namespace cpu

namespace cuda {
void randn(const Randn& op, void* stream);
void choices(const Choices& op, void* stream);
void noise(const Noise& op, void* stream);
void posterior_step(const PosteriorStep& op, void* stream);
void group_norm_silu(const GroupNormSilu& op, void* stream);
void group_norm_silu_backward(const GroupNormSiluBackward& op, void* stream);
void residual_sum(const ResidualSum& op, void* stream);
void discretized_log_likelihood(const DiscretizedLogLikelihood& op, void* stream);
void vlb_term(const VlbTerm& op, void* stream);
void squared_error(const SquaredError& op, void* stream);
void squared_error_backward(const SquaredErrorBackward& op, void* stream);
void adam(const Adam& op, void* stream);
void grad_norm(const GradNorm& op, void* stream);
}  // namespace cuda

}  // namespace fastddpm
