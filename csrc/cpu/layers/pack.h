// Part of a convolution's weight, of any type and strides, as planes of float32: what every form of
// packed weights is made from.
#pragma once
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "layers.h"

namespace fastddpm {
namespace {

constexpr int64_t TAPS = 9;  // of a filter, at most
constexpr int64_t FOUR = 4;

struct Part {  // filters o .. o + columns, channels i .. i + rows
  int64_t o, columns, i, rows;
};

#if defined(__SSE__)
inline __m128 load_four(const float* x) { return _mm_loadu_ps(x); }

template <class T>
inline __m128 load_four(const T* x) {
  return _mm_setr_ps(to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3]));
}

// to[i to_stride + j] = from[j from_stride + i], i, j < 4.
template <class T>
inline void transpose(const T* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m128 a = load_four(from), b = load_four(from + from_stride);
  __m128 c = load_four(from + 2 * from_stride), d = load_four(from + 3 * from_stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + to_stride, b);
  _mm_storeu_ps(to + 2 * to_stride, c);
  _mm_storeu_ps(to + 3 * to_stride, d);
}
#else
template <class T>
inline void transpose(const T* from, int64_t from_stride, float* to, int64_t to_stride) {
  for (int64_t i = 0; i < FOUR; ++i)
    for (int64_t j = 0; j < FOUR; ++j) to[i * to_stride + j] = to_float(from[j * from_stride + i]);
}
#endif

// to[i to_stride + j] = from[j from_stride + i from_step], i < rows, j < columns.
template <class T>
inline void copy_transposed(const T* from, int64_t from_stride, int64_t from_step, int64_t rows,
                            int64_t columns, float* to, int64_t to_stride) {
  int64_t j = 0;
  if (from_stride == 1) {
    for (int64_t i = 0; i < rows; ++i)
      for (j = 0; j < columns; ++j) to[i * to_stride + j] = to_float(from[j + i * from_step]);
    return;
  }
  if (from_step == 1)
    for (; j + FOUR <= columns; j += FOUR) {
      int64_t i = 0;
      for (; i + FOUR <= rows; i += FOUR)
        transpose(from + j * from_stride + i, from_stride, to + i * to_stride + j, to_stride);
      for (; i < rows; ++i)
        for (int64_t l = j; l < j + FOUR; ++l)
          to[i * to_stride + l] = to_float(from[l * from_stride + i]);
    }
  for (; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i)
      to[i * to_stride + j] = to_float(from[j * from_stride + i * from_step]);
}

// out[tap plane + row pitch + column]. What lies side by side, taps, channels or filters, is read
// so.
template <class T>
inline void gather_as(const T* w, const Weight& weight, const Part& part, float* out, int64_t pitch,
                      int64_t plane) {
  const int64_t *stride = weight.stride, kernel = weight.kernel, taps = kernel * kernel;
  w += part.o * stride[0] + part.i * stride[1];
  const bool forward = stride[3] == 1 && stride[2] == kernel;
  const bool backward = stride[3] == -1 && stride[2] == -kernel;
  if (taps > 1 && (forward || backward)) {
    if (backward) w -= taps - 1, out += (taps - 1) * plane, plane = -plane;
    for (int64_t o = 0; o < part.columns; o += FOUR) {
      const int64_t columns = part.columns - o < FOUR ? part.columns - o : FOUR;
      for (int64_t i = 0; i < part.rows; ++i)
        copy_transposed(w + o * stride[0] + i * stride[1], stride[0], 1, taps, columns,
                        out + i * pitch + o, plane);
    }
    return;
  }
  for (int64_t t = 0; t < taps; ++t)
    copy_transposed(w + t / kernel * stride[2] + t % kernel * stride[3], stride[0], stride[1],
                    part.rows, part.columns, out + t * plane, pitch);
}

// The same, with zeros in columns up to `pitch`.
inline void gather(const Weight& weight, const Part& part, float* out, int64_t pitch,
                   int64_t plane) {
  if (part.columns < pitch)
    for (int64_t t = 0; t < weight.kernel * weight.kernel; ++t)
      __builtin_memset(out + t * plane, 0, size_t(part.rows * pitch) * sizeof(float));
  if (weight.dtype == DType::bf16)
    gather_as(static_cast<const BF16*>(weight.data), weight, part, out, pitch, plane);
  else if (weight.dtype == DType::f16)
    gather_as(static_cast<const F16*>(weight.data), weight, part, out, pitch, plane);
  else
    gather_as(static_cast<const float*>(weight.data), weight, part, out, pitch, plane);
}

}  // namespace
}  // namespace fastddpm
