// The instructions of a native plan: what its kernels get, with every address already looked up.
// No kernels, and nothing about how a network becomes instructions.
//
// An activation is (images, H, W, C), float32, contiguous. Every kernel gives the same bits for
// every image count and thread count: an element's sums have an order that its layer's shape fixes.
#pragma once
#include <cstdint>

#include "../../ops.h"

namespace fastddpm {

constexpr int64_t SOURCES = 2;  // activations that a layer reads as one, channels side by side

// Per image and channel, over the pixels: the mean, and the sum of squares around it.
struct ChannelStatistics {
  int64_t images, pixels, channels;
  const float* x;
  float *mean, *squares;  // (images, channels)
};

// GroupNorm's statistics of a layer's sources as one affine map per channel: v = (x - centre) scale
// + shift, of (1 + gain) GroupNorm(x) + addend where those are given. A source's statistics are
// ChannelStatistics: a group may lie across two sources.
struct GroupCoefficients {
  int64_t images, pixels, groups;
  int64_t channels[SOURCES];
  const float *mean[SOURCES], *squares[SOURCES];
  float eps;
  const float *weight, *bias;     // (C,), all sources'
  float *centre, *scale, *shift;  // (images, C)
  const float *gain, *addend;     // (images or 1, C), or both null
  int64_t modulation;             // floats from one image's gain and addend to the next; 0: one
};

// What a convolution reads: its sources side by side, normalised, silu applied, each square of 2x2
// pixels made its mean if `halve`, or each pixel repeated to a square of `repeat` by `repeat`, with
// a border of zeros.
struct PrepareInput {
  int64_t images, height, width;  // of the sources
  int64_t channels[SOURCES];
  const float* source[SOURCES];
  const float *centre, *scale, *shift;  // null: as they are
  bool silu;
  Dropout dropout;                // of what is not repeated yet; its streams: of these images
  int64_t repeat, before, after;  // border rows and columns, before and after
  int64_t pixel;                  // values from pixel to pixel in out, the channels' count or more
  int64_t image;                  // values from image to image, rows * columns * pixel or more
  float* out;                     // (images, rows, columns, pixel), or null:
  BF16* out_bf16;                 // the same, rounded
  bool halve;                     // height and width are even then, repeat 1, and nothing dropped
};

enum class Algorithm : int32_t {
  direct = 0,      // the sums as they are written
  bf16 = 1,        // the same of bfloat16 operands
  winograd_2 = 2,  // F(2x2, 3x3): 4 products an output instead of 9
  winograd_4 = 4,  // F(4x4, 3x3): 2.25 products an output
};

// (c_out, c_in, kernel, kernel), float32, bfloat16 or float16, with any strides, in values.
struct Weight {
  const void* data;
  DType dtype;
  int64_t c_out, c_in, kernel;
  int64_t stride[4];
};

// W'[i][o][a][b] = W[o][i][k - 1 - a][k - 1 - b]: the same memory, read as the weight that takes a
// gradient from y back to x.
inline Weight transposed(const Weight& w) {
  const int64_t last = (w.kernel - 1) * (w.stride[2] + w.stride[3]);
  const int64_t size = w.dtype == DType::f32 ? 4 : 2;
  const char* first = static_cast<const char*>(w.data) + last * size;
  return {first,   w.dtype,  w.c_in,
          w.c_out, w.kernel, {w.stride[1], w.stride[0], -w.stride[2], -w.stride[3]}};
}

// y = conv(x) + bias (+ residual), x with its border. A 1x1 convolution can read a second source,
// whose channels follow x's: (images, height, width, c_in_2).
struct Convolve {
  Algorithm algorithm;
  int64_t images, c_in, c_in_2, c_out, kernel, stride;
  int64_t rows, columns, pixel;  // of x: rows and columns with the border, floats a pixel
  int64_t height, width;         // of y
  const float *x, *x_2, *weight, *bias, *residual;  // weight: packed; bias: (c_out,)
  float* y;                                         // like residual
  int64_t bias_image;  // floats from one image's bias to the next; 0: one for all
};

// A convolution of bfloat16 operands with float32 sums. repeated: x is read as if each of its
// pixels were a square of 2x2; then kernel is 3, stride 1, and x has a border of 1.
struct ConvolveBf16 {
  int64_t images, c_in, c_out, kernel, stride;
  bool repeated;
  int64_t rows, columns, pixel, image;  // of x, with the border; pixel: a multiple of 32
  int64_t height, width;                // of y
  const BF16 *x, *weight;               // x: can be read 15 stride pixels past its end
  const float *bias, *residual;
  float* y;
  int64_t bias_image;  // as Convolve's
};

// dweight[o][i] = the sum over all pixels of grad[o] x[i], x shifted by a tap of the filter: the
// gradient of y = conv(x) of stride 1 by its weight. algorithm: winograd_m is F(3x3, m x m), whose
// results are the filters.
struct WeightGradient {
  Algorithm algorithm;
  int64_t images, c_in, c_out, kernel;
  int64_t rows, columns, pixel;  // of x, as Convolve: at least height + kernel - 1 rows
  int64_t height, width;         // of grad
  const float *x, *grad;         // grad: (images, height, width, c_out)
  float* dweight;                // (c_out, c_in, kernel, kernel)
  int64_t stride[4];             // its, in floats
};

// The same of bfloat16 operands with float32 sums, as they are written.
struct WeightGradientBf16 {
  int64_t images, c_in, c_out, kernel;
  int64_t rows, columns, pixel, image;  // of x, as ConvolveBf16
  int64_t height, width;                // of grad
  const BF16 *x, *grad;                 // grad: (images, height, width, c_out)
  float* dweight;                       // (c_out, c_in, kernel, kernel)
  int64_t stride[4];                    // its, in floats
};

// softmax(q k^T / sqrt(d)) v per image and head; qkv: (images, pixels, 3C), y: (images, pixels, C).
struct Attention {
  int64_t images, pixels, channels, heads;
  const float* qkv;
  float* y;
};

#define FASTDDPM_DECLARE_PLAN_OPS(isa, base)                                                   \
  namespace isa {                                                                              \
  void convolve_bf16(const ConvolveBf16&, int threads);                                        \
  void attention_bf16(const Attention&, float* workspace, int threads);                        \
  int64_t attention_workspace_bf16(const Attention&, int threads);                             \
  int64_t packed_weight_size_bf16(int64_t c_in, int64_t c_out, int64_t kernel, bool repeated); \
  double product_rate_bf16();                                                                  \
  void pack_weight_bf16(const Weight&, bool repeated, BF16* packed, int threads);              \
  void channel_statistics(const ChannelStatistics&, int threads);                              \
  void group_coefficients(const GroupCoefficients&, int threads);                              \
  void prepare_input(const PrepareInput&, int threads);                                        \
  void convolve(const Convolve&, float* workspace, int threads);                               \
  void attention(const Attention&, float* workspace, int threads);                             \
  int64_t convolve_workspace(const Convolve&, int threads);                                    \
  int64_t attention_workspace(const Attention&, int threads);                                  \
  Algorithm best_algorithm(int64_t c_in, int64_t c_out, int64_t height, int64_t width,         \
                           double rate_bf16);                                                  \
  int64_t packed_weight_size(Algorithm, int64_t c_in, int64_t c_out, int64_t kernel);          \
  void pack_weight(Algorithm, const Weight&, float* packed, int threads);                      \
  Algorithm best_weight_gradient(int64_t c_in, int64_t c_out, int64_t height, int64_t width,   \
                                 int64_t kernel, double rate_bf16);                            \
  int64_t weight_gradient_workspace(const WeightGradient&, int threads);                       \
  void weight_gradient_begin(const WeightGradient&, float* workspace, int threads);            \
  void weight_gradient_add(const WeightGradient&, float* workspace, int threads);              \
  void weight_gradient_finish(const WeightGradient&, float* workspace, int threads);           \
  int64_t weight_gradient_bf16_workspace(const WeightGradientBf16&, int threads);              \
  void weight_gradient_bf16_begin(const WeightGradientBf16&, float* workspace, int threads);   \
  void weight_gradient_bf16_add(const WeightGradientBf16&, float* workspace, int threads);     \
  void weight_gradient_bf16_finish(const WeightGradientBf16&, float* workspace, int threads);  \
  int64_t vector_width();                                                                      \
  }

}  // namespace fastddpm
