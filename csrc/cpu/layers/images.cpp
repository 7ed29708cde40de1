// Images of an op as a layer's activations. No products.
#include "images.h"

#include "../isa.h"
#include "../ops/dropout.h"
#include "../parallel.h"
#include "../sizes.h"
#include "../view.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t SQUARE = 16;    // channels and pixels that are turned around at once
constexpr int64_t RUN = 64;       // pixels in a partial sum
constexpr int64_t COLUMNS = 256;  // channels of a job of sums

int64_t elements(const Shape& shape) { return shape.n * numel(shape); }

template <class T>
T* row_of(const Tensor& x, int64_t n, int64_t y) {
  return static_cast<T*>(x.data) + n * x.stride[0] + y * x.stride[2];
}

// Calls body(T) with the storage type of a tensor.
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(BF16{});
    case DType::f16:
      return body(F16{});
    case DType::u8:
      return;  // no image of a convolution
  }
}

// Calls body(c, channels, x, pixels) for squares of a row that runs along w, (C, W), as one that
// runs along c.
template <class Body>
void for_squares(const Shape& shape, const Body& body) {
  for (int64_t c = 0; c < shape.c; c += SQUARE)
    for (int64_t x = 0; x < shape.w; x += SQUARE)
      body(c, least(SQUARE, shape.c - c), x, least(SQUARE, shape.w - x));
}

template <class T>
void load_row(const Tensor& x, const Shape& shape, int64_t n, int64_t y, float* out) {
  const T* row = row_of<const T>(x, n, y);
  if (x.stride[1] == 1 || shape.c == 1) {
    for (int64_t i = 0; i < shape.w; ++i)
      load_run(row + i * x.stride[3], 1, shape.c, out + i * shape.c);
    return;
  }
  for_squares(shape, [&](int64_t c, int64_t channels, int64_t first, int64_t pixels) {
    float square[SQUARE][SQUARE];
    for (int64_t i = 0; i < channels; ++i)
      load_run(row + (c + i) * x.stride[1] + first * x.stride[3], x.stride[3], pixels, square[i]);
    for (int64_t j = 0; j < pixels; ++j)
      for (int64_t i = 0; i < channels; ++i) out[(first + j) * shape.c + c + i] = square[i][j];
  });
}

template <class T>
void store_row(const float* in, int64_t pixel, const Shape& shape, int64_t n, int64_t y,
               const Tensor& x) {
  T* row = row_of<T>(x, n, y);
  if (x.stride[1] == 1 || shape.c == 1) {
    for (int64_t i = 0; i < shape.w; ++i)
      store_run(row + i * x.stride[3], 1, shape.c, in + i * pixel);
    return;
  }
  for_squares(shape, [&](int64_t c, int64_t channels, int64_t first, int64_t pixels) {
    float square[SQUARE][SQUARE];
    for (int64_t j = 0; j < pixels; ++j)
      for (int64_t i = 0; i < channels; ++i) square[i][j] = in[(first + j) * pixel + c + i];
    for (int64_t i = 0; i < channels; ++i)
      store_run(row + (c + i) * x.stride[1] + first * x.stride[3], x.stride[3], pixels, square[i]);
  });
}

void fill_zero(float* x, int64_t count) { __builtin_memset(x, 0, size_t(count) * sizeof(float)); }

void add_to(const float* __restrict x, int64_t count, float* __restrict sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += x[i];
}

}  // namespace

void load_images(const Tensor& x, const Shape& shape, float* out, int threads) {
  const int64_t line = shape.w * shape.c;
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(shape.n * shape.h, elements(shape), threads, [&](int64_t job, int) {
      load_row<T>(x, shape, job / shape.h, job % shape.h, out + job * line);
    });
  });
}

void store_images(const float* x, int64_t pixel, const Shape& shape, const Tensor& out,
                  int threads) {
  const int64_t line = shape.w * pixel;
  with_type(out.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(shape.n * shape.h, elements(shape), threads, [&](int64_t job, int) {
      store_row<T>(x + job * line, pixel, shape, job / shape.h, job % shape.h, out);
    });
  });
}

void spread_images(const SpreadImages& op, int threads) {
  const Shape& shape = op.shape;
  const int64_t line = op.columns * shape.c, count = shape.n * op.rows * line;
  with_type(op.x.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(shape.n * op.rows, count, threads, [&](int64_t job, int) {
      float* out = op.out + job * line;
      fill_zero(out, line);
      const int64_t i = job % op.rows + op.offset;
      if (i % op.step || i / op.step >= shape.h) return;
      const T* row = row_of<const T>(op.x, job / op.rows, i / op.step);
      for (int64_t x = 0; x < shape.w; ++x) {
        const int64_t j = x * op.step - op.offset;
        if (j >= 0 && j < op.columns)
          load_run(row + x * op.x.stride[3], op.x.stride[1], shape.c, out + j * shape.c);
      }
    });
  });
}

void sum_squares_of_pixels(const float* x, const Shape& shape, float* out, int threads) {
  const int64_t line = 2 * shape.w * shape.c;
  parallel_for(shape.n * shape.h, 4 * elements(shape), threads, [&](int64_t job, int) {
    const float *upper = x + 2 * job * line, *lower = upper + line;
    float* sum = out + job * shape.w * shape.c;
    for (int64_t i = 0; i < shape.w; ++i, sum += shape.c) {
      const float *a = upper + 2 * i * shape.c, *b = lower + 2 * i * shape.c;
      for (int64_t c = 0; c < shape.c; ++c)
        sum[c] = (a[c] + a[shape.c + c]) + (b[c] + b[shape.c + c]);
    }
  });
}

void sum_pixels(const float* x, int64_t images, int64_t pixels, int64_t channels, double* sums,
                int threads) {
  const int64_t blocks = ceil_div(channels, COLUMNS);
  parallel_for(images * blocks, images * pixels * channels, threads, [&](int64_t job, int) {
    const int64_t c = job % blocks * COLUMNS, count = least(COLUMNS, channels - c);
    const float* from = x + job / blocks * pixels * channels + c;
    double total[COLUMNS] = {};
    for (int64_t first = 0; first < pixels; first += RUN) {
      float sum[COLUMNS] = {};
      for (int64_t i = first; i < least(pixels, first + RUN); ++i)
        add_to(from + i * channels, count, sum);
      for (int64_t i = 0; i < count; ++i) total[i] += double(sum[i]);
    }
    __builtin_memcpy(sums + job / blocks * channels + c, total, size_t(count) * sizeof(double));
  });
}

void activation_gradient(const ActivationGradient& op, int threads) {
  const int64_t all = op.channels[0] + op.channels[1];
  parallel_for(op.images * op.pixels, op.images * op.pixels * all, threads, [&](int64_t job, int) {
    float* grad = op.grad + job * all;
    if (op.dropout.threshold) {
      const Philox random = stream(op.dropout.random, job / op.pixels);
      uint32_t mask[CHUNK];
      for (int64_t first = 0; first < all; first += CHUNK) {
        const int64_t count = least(CHUNK, all - first);
        draw_mask(random, op.dropout.threshold, job % op.pixels * all + first, 1, count, mask);
        for (int64_t i = 0; i < count; ++i)
          grad[first + i] = drop(grad[first + i], op.dropout.keep_scale, mask[i]);
      }
    }
    if (!op.silu) return;
    for (int64_t s = 0; s < SOURCES; grad += op.channels[s], ++s) {
      const float* x = op.source[s] + job * op.channels[s];
      for (int64_t c = 0; c < op.channels[s]; ++c) grad[c] *= silu_gradient(x[c]);
    }
  });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
