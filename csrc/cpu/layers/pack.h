// Part of a convolution's weight, of any type and strides, as planes of float32: what every form of
// packed weights is made from.
#pragma once
#include "layers.h"

namespace fastddpm {
namespace {

constexpr int64_t TAPS = 9;  // of a filter, at most

struct Part {  // filters o .. o + columns, channels i .. i + rows
  int64_t o, columns, i, rows;
};

template <class T>
inline void copy_strided(const T* __restrict from, int64_t from_stride, float* __restrict to,
                         int64_t to_stride, int64_t count) {
  if (from_stride == 1 && to_stride == 1)
    for (int64_t j = 0; j < count; ++j) to[j] = to_float(from[j]);
  else
    for (int64_t j = 0; j < count; ++j) to[j * to_stride] = to_float(from[j * from_stride]);
}

// out[tap plane + row pitch + column], read in the order in which the weight lies in memory.
template <class T>
inline void gather_as(const T* w, const Weight& weight, const Part& part, float* __restrict out,
                      int64_t pitch, int64_t plane) {
  struct Side {
    int64_t count, from, to;
  };
  const auto distance = [](int64_t stride) { return stride < 0 ? -stride : stride; };
  const int64_t* const stride = weight.stride;
  w += part.o * stride[0] + part.i * stride[1];
  Side outer{part.columns, stride[0], 1}, inner{part.rows, stride[1], pitch};
  if (distance(outer.from) < distance(inner.from)) {
    const Side o = outer;
    outer = inner, inner = o;
  }
  const int64_t kernel = weight.kernel, taps = kernel * kernel;
  int64_t tap[TAPS];
  for (int64_t t = 0; t < taps; ++t) tap[t] = t / kernel * stride[2] + t % kernel * stride[3];
  const bool filters_together = taps == TAPS && distance(stride[3]) < distance(inner.from);
  for (int64_t x = 0; x < outer.count; ++x) {
    const T* from = w + x * outer.from;
    float* to = out + x * outer.to;
    if (filters_together) {
      for (int64_t y = 0; y < inner.count; ++y, from += inner.from, to += inner.to)
#pragma GCC unroll 9
        for (int64_t t = 0; t < TAPS; ++t) to[t * plane] = to_float(from[tap[t]]);
    } else {
      for (int64_t t = 0; t < taps; ++t)
        copy_strided(from + tap[t], inner.from, to + t * plane, inner.to, inner.count);
    }
  }
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
