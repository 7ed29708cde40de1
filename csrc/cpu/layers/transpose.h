// Copies of matrices that turn rows into columns, to float32. No arithmetic.
#pragma once
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <cstdint>

#include "../../types.h"

namespace fastddpm {
namespace {

constexpr int64_t FOUR = 4;

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

}  // namespace
}  // namespace fastddpm
