// Images of an op as a layer's activations, (images, H, W, C) float32, contiguous: in and out of
// any storage, and what a convolution's gradient does to them beside its products.
//
// Every kernel gives the same bits for every image count and thread count.
#pragma once
#include "layers.h"

namespace fastddpm {

// out (images, rows, columns, C): pixel (i, j) is that of x at ((i + offset) / step, (j + offset) /
// step) where there is such a one, else 0: what a convolution of stride `step` read, as one of
// stride 1.
struct SpreadImages {
  Tensor x;
  Shape shape;  // of x
  int64_t step, offset, rows, columns;
  float* out;
};

// What a gradient becomes on its way back through silu and dropout, in place.
struct ActivationGradient {
  int64_t images, pixels;
  int64_t channels[SOURCES];
  const float* source[SOURCES];  // side by side, (images, pixels, channels) each
  bool silu;
  Dropout dropout;  // its streams: of these images
  float* grad;      // (images, pixels, all channels)
};

constexpr int64_t DIGEST = 64;  // words of a digest

struct Bytes {  // of memory
  const void* data;
  int64_t count;
};

#define FASTDDPM_DECLARE_IMAGE_OPS(isa, base)                                                     \
  namespace isa {                                                                                 \
  void load_images(const Tensor& x, const Shape&, float* out, int threads);                       \
  /* pixel: floats from one pixel of x to the next */                                             \
  void store_images(const float* x, int64_t pixel, const Shape&, const Tensor& out, int threads); \
  void spread_images(const SpreadImages&, int threads);                                           \
  /* out (images, height, width, C): sums over squares of 2x2 of x */                             \
  void sum_squares_of_pixels(const float* x, const Shape& out_shape, float* out, int threads);    \
  /* sums (images, C): over the pixels */                                                         \
  void sum_pixels(const float* x, int64_t images, int64_t pixels, int64_t channels, double* sums, \
                  int threads);                                                                   \
  void activation_gradient(const ActivationGradient&, int threads);                               \
  /* lanes: DIGEST words, other ones where a word of the spans' memory is another one */          \
  void digest(const Bytes* spans, int64_t count, uint32_t* lanes, int threads);                   \
  }

}  // namespace fastddpm
