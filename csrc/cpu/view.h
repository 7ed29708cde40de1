// Elements of one sample in a chosen order, whatever its storage type and strides, as runs of
// float32.
//
// The elementwise ops walk a sample in chunks: load every operand into a small float buffer,
// compute there, store. The buffers stay in the first-level cache, every loop is contiguous, and
// layouts and types meet in one place.
#pragma once
#include "../ops.h"

namespace fastddpm {
namespace {

constexpr int64_t CHUNK = 1024;  // elements; a multiple of the 4 of a Philox block

enum class Order { chw, hwc };  // which index runs fastest: w or c

struct View {
  char* data;
  DType dtype;
  int64_t size[3], stride[3];  // outermost first; strides in elements
};

inline int64_t element_size(DType dtype) {
  return dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2;
}

inline int64_t numel(const Shape& shape) { return shape.c * shape.h * shape.w; }

// Sample n of a tensor, its dimensions merged where they are contiguous: mostly into a single run.
inline View view(const Tensor& tensor, const Shape& shape, int64_t n, Order order,
                 bool flip = false) {
  const int64_t* s = tensor.stride;
  const int64_t base = n * s[0] + (flip ? (shape.w - 1) * s[3] : 0), sw = flip ? -s[3] : s[3];
  const bool chw = order == Order::chw;
  const int64_t size[3] = {chw ? shape.c : shape.h, chw ? shape.h : shape.w,
                           chw ? shape.w : shape.c};
  const int64_t stride[3] = {chw ? s[1] : s[2], chw ? s[2] : sw, chw ? sw : s[1]};

  View v{static_cast<char*>(tensor.data) + base * element_size(tensor.dtype),
         tensor.dtype,
         {1, 1, 1},
         {0, 0, 1}};
  for (int from = 2, to = 3; from >= 0; --from) {
    if (size[from] == 1) continue;
    if (to < 3 && stride[from] == v.stride[to] * v.size[to]) {
      v.size[to] *= size[from];
    } else {
      --to;
      v.size[to] = size[from];
      v.stride[to] = stride[from];
    }
  }
  return v;
}

template <class T>
inline void load_run(const T* source, int64_t stride, int64_t count, float* out) {
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(source[i]);
  else if (stride == -1)
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(source[-i]);
  else
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(source[i * stride]);
}

template <class T>
inline void store_run(T* target, int64_t stride, int64_t count, const float* in) {
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) target[i] = from_float<T>(in[i]);
  else
    for (int64_t i = 0; i < count; ++i) target[i * stride] = from_float<T>(in[i]);
}

// Calls body(pointer, offset in the chunk, length) for every run of elements first .. first +
// count.
template <class T, class Body>
inline void for_runs(const View& v, int64_t first, int64_t count, const Body& body) {
  int64_t k = first % v.size[2], j = first / v.size[2] % v.size[1],
          i = first / v.size[2] / v.size[1];
  for (int64_t done = 0; done < count;) {
    const int64_t left = v.size[2] - k, length = left < count - done ? left : count - done;
    body(reinterpret_cast<T*>(v.data) + i * v.stride[0] + j * v.stride[1] + k * v.stride[2], done,
         length);
    done += length;
    k = 0;
    if (++j == v.size[1]) j = 0, ++i;
  }
}

template <class T>
inline void load_as(const View& v, int64_t first, int64_t count, float* out) {
  for_runs<const T>(v, first, count, [&](const T* source, int64_t at, int64_t length) {
    load_run(source, v.stride[2], length, out + at);
  });
}

template <class T>
inline void store_as(const View& v, int64_t first, int64_t count, const float* in) {
  for_runs<T>(v, first, count, [&](T* target, int64_t at, int64_t length) {
    store_run(target, v.stride[2], length, in + at);
  });
}

inline void load(const View& v, int64_t first, int64_t count, float* out) {
  switch (v.dtype) {
    case DType::f32:
      return load_as<float>(v, first, count, out);
    case DType::bf16:
      return load_as<BF16>(v, first, count, out);
    case DType::f16:
      return load_as<F16>(v, first, count, out);
    case DType::u8:
      return load_as<uint8_t>(v, first, count, out);
  }
}

inline void store(const View& v, int64_t first, int64_t count, const float* in) {
  switch (v.dtype) {
    case DType::f32:
      return store_as<float>(v, first, count, in);
    case DType::bf16:
      return store_as<BF16>(v, first, count, in);
    case DType::f16:
      return store_as<F16>(v, first, count, in);
    case DType::u8:
      return;  // no op writes bytes
  }
}

// The elements from `first` on themselves where they are contiguous float32, else null.
inline float* direct(const View& v, int64_t first) {
  if (v.dtype != DType::f32 || v.size[1] != 1 || v.stride[2] != 1) return nullptr;
  return reinterpret_cast<float*>(v.data) + first;
}

// The elements themselves where they are contiguous float32, else a copy in `buffer`.
inline const float* floats(const View& v, int64_t first, int64_t count, float* buffer) {
  if (const float* elements = direct(v, first)) return elements;
  load(v, first, count, buffer);
  return buffer;
}

// What to_float(from_float(x)) of the storage type leaves of x.
inline void round_to(DType dtype, int64_t count, float* x) {
  if (dtype == DType::bf16)
    for (int64_t i = 0; i < count; ++i) x[i] = to_float(from_float<BF16>(x[i]));
  else if (dtype == DType::f16)
    for (int64_t i = 0; i < count; ++i) x[i] = to_float(from_float<F16>(x[i]));
}

// Whether memory runs channel by channel within a pixel (NHWC).
inline bool channels_last(const Tensor& tensor, const Shape& shape) {
  const int64_t pixel = shape.w > 1 ? tensor.stride[3] : tensor.stride[2];
  return shape.c > 1 && tensor.stride[1] == 1 && (shape.h * shape.w == 1 || pixel != 1);
}

// The order in which a tensor's own memory runs. Where normals are drawn, hwc only up to the
// channel count that normals() covers well.
inline Order memory_order(const Tensor& tensor, const Shape& shape, bool drawn = false) {
  return (shape.c <= 64 || !drawn) && channels_last(tensor, shape) ? Order::hwc : Order::chw;
}

// Elements per chunk. In hwc order whole pixels where normals are drawn: they are then a run per
// channel.
inline int64_t chunk_length(Order order, const Shape& shape, bool drawn) {
  return order == Order::hwc && drawn ? CHUNK / shape.c * shape.c : CHUNK;
}

}  // namespace
}  // namespace fastddpm
