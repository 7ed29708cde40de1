// Elements of one sample in a chosen order, whatever its storage type and strides, as runs of
// float32.
//
// The elementwise ops walk a sample in chunks: load every operand into a small float buffer,
// compute there, store. The buffers stay in the first-level cache, every loop is contiguous, and
// layouts and types meet in one place.
#pragma once
#include "../ops.h"
#include "parallel.h"
#include "simd.h"

namespace fastddpm {
namespace {

constexpr int64_t CHUNK = 1024;             // elements; a multiple of the 4 of a Philox block
constexpr int64_t LONG_CHUNK = 16 * CHUNK;  // where nothing is buffered

enum class Order { chw, hwc };  // which index runs fastest: w or c

struct View {
  char* data;
  DType dtype;
  int64_t size[3], stride[3];  // outermost first; strides in elements
};

inline DType dtype_of(float) { return DType::f32; }
inline DType dtype_of(BF16) { return DType::bf16; }
inline DType dtype_of(uint8_t) { return DType::u8; }

inline int64_t element_size(DType dtype) {
  return dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2;
}

inline int64_t numel(const Shape& shape) { return shape.c * shape.h * shape.w; }

// Samples `first` and on of what may be null.
inline Tensor samples_from(Tensor x, int64_t first) {
  if (x.data) x.data = static_cast<char*>(x.data) + first * x.stride[0] * element_size(x.dtype);
  return x;
}

inline PerSample samples_from(PerSample x, int64_t first) {
  if (x.data) x.data += first * x.stride;
  return x;
}

inline Dropout samples_from(Dropout dropout, int64_t first) {
  dropout.random.step = samples_from(dropout.random.step, first);
  dropout.random.sample_index = samples_from(dropout.random.sample_index, first);
  return dropout;
}

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

constexpr int64_t NARROW = 16;  // elements that are rounded at once

// from_float of NARROW elements. By intrinsics: with AVX2 compilers spend half of the time on NaN.
inline void narrow(const float* in, BF16* out) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256 a = _mm256_loadu_ps(in), b = _mm256_loadu_ps(in + 8);
  if (!_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q))) {
    const auto round = [](__m256i u) {
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
      const __m256i up = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
      return _mm256_srli_epi32(up, 16);
    };
    const __m256i packed =
        _mm256_packus_epi32(round(_mm256_castps_si256(a)), round(_mm256_castps_si256(b)));
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                               _mm256_permute4x64_epi64(packed, 0xd8));
  }
#endif
  for (int64_t i = 0; i < NARROW; ++i) out[i] = from_float<BF16>(in[i]);
}

inline void narrow(const float* in, int64_t count, BF16* out) {
  const int64_t whole = count / NARROW * NARROW;
  for (int64_t i = 0; i < whole; i += NARROW) narrow(in + i, out + i);
  for (int64_t i = whole; i < count; ++i) out[i] = from_float<BF16>(in[i]);
}

inline void narrow(const float* in, int64_t count, F16* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<F16>(in[i]);
}

// out[i] = value(i), which may read out[i] but no other element of out.
template <class Value>
inline void fill(float* out, int64_t count, const Value& value) {
#if !defined(__clang__)  // which asks at run time whether out overlaps what it reads
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < count; ++i) out[i] = value(i);
}

template <class Value>
inline void fill(BF16* out, int64_t count, const Value& value) {
  constexpr int64_t BLOCK = 4 * NARROW;
  const int64_t whole = count / BLOCK * BLOCK;
  float block[BLOCK];
  for (int64_t first = 0; first < whole; first += BLOCK) {
    for (int64_t i = 0; i < BLOCK; ++i) block[i] = value(first + i);
    for (int64_t i = 0; i < BLOCK; i += NARROW) narrow(block + i, out + first + i);
  }
  for (int64_t i = whole; i < count; ++i) out[i] = from_float<BF16>(value(i));
}

inline void store_run(float* target, int64_t stride, int64_t count, const float* in) {
  if (stride == 1)
    __builtin_memcpy(target, in, size_t(count) * sizeof(float));
  else
    for (int64_t i = 0; i < count; ++i) target[i * stride] = in[i];
}

template <class T>
inline void store_run(T* target, int64_t stride, int64_t count, const float* in) {
  if (stride == 1)
    narrow(in, count, target);
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

// Whether each sample is one run of contiguous T in this order: element `first` of sample n is then
// run<T>(tensor, n, first).
template <class T>
inline bool is_run_of(const Tensor& tensor, const Shape& shape, Order order) {
  const View v = view(tensor, shape, 0, order);
  return v.dtype == dtype_of(T{}) && v.size[0] == 1 && v.size[1] == 1 && v.stride[2] == 1;
}

template <class T>
inline T* run(const Tensor& tensor, int64_t n, int64_t first) {
  return static_cast<T*>(tensor.data) + n * tensor.stride[0] + first;
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

// Calls body(n, first, count) for every chunk of `length` elements of samples of `size` elements
// each; work: of all, as parallel_for counts it.
template <class Body>
inline void for_chunks(int64_t samples, int64_t size, int64_t length, int64_t work, int threads,
                       const Body& body) {
  const int64_t chunks = (size + length - 1) / length;
  parallel_for(samples * chunks, work, threads, [&](int64_t job, int) {
    const int64_t first = job % chunks * length;
    body(job / chunks, first, size - first < length ? size - first : length);
  });
}

}  // namespace
}  // namespace fastddpm
