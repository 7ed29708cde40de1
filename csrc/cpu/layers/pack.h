// Part of a convolution's weight, of any type and strides, as planes of float32: what every form of
// packed weights is made from.
#pragma once
#include "layers.h"
#include "transpose.h"

namespace fastddpm {
namespace {

constexpr int64_t TAPS = 9;  // of a filter, at most

struct Part {  // filters o .. o + columns, channels i .. i + rows
  int64_t o, columns, i, rows;
};

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
