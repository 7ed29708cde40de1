// How a thread reads and writes tensors: vectors of up to 16 bytes of a storage type that is known
// at compile time, and element by element in any layout and type. Offsets are int64.
//
// A tile is what one thread of an elementwise op handles at once: 8 places with CHANNELS values
// each, contiguous in memory. CHANNELS = 1: the elements of a contiguous (C, H, W) sample.
// CHANNELS = C: the pixels of an NHWC sample. Either way a tile holds whole Philox blocks.
#pragma once
#include <type_traits>

#include "../philox.h"
#include "launch.h"

namespace fastddpm {
namespace {

constexpr int PLACES = 8;

// a / b and a % b, in 32 bits where they fit: 64-bit division is slow.
__device__ inline int64_t divide(int64_t a, int64_t b, int64_t& remainder) {
  if (((a | b) >> 32) == 0) {
    const uint32_t q = uint32_t(a) / uint32_t(b);
    remainder = int64_t(uint32_t(a) - q * uint32_t(b));
    return int64_t(q);
  }
  const int64_t q = a / b;
  remainder = a - q * b;
  return q;
}

// ---- vectors -----------------------------------------------------------------------------------

// The widest word that BYTES is a multiple of.
template <int BYTES>
using Word = std::conditional_t<
    BYTES % 16 == 0, uint4,
    std::conditional_t<BYTES % 8 == 0, uint2,
                       std::conditional_t<BYTES % 4 == 0, uint32_t,
                                          std::conditional_t<BYTES % 2 == 0, uint16_t, uint8_t>>>>;

template <class T, int V, class W>
__device__ __forceinline__ void unpack(const W* words, float (&values)[V]) {
  T stored[V];
  __builtin_memcpy(stored, words, sizeof stored);
#pragma unroll
  for (int k = 0; k < V; ++k) values[k] = to_float(stored[k]);
}

template <class T>
constexpr int WIDTH = 16 / sizeof(T);  // elements of a vector of 16 bytes

// V elements at `from`, aligned to their widest word.
template <class T, int V>
__device__ __forceinline__ void load_vector(const T* from, float (&values)[V]) {
  using W = Word<V * sizeof(T)>;
  constexpr int WORDS = V * sizeof(T) / sizeof(W);
  W words[WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; ++i) words[i] = reinterpret_cast<const W*>(from)[i];
  unpack<T>(words, values);
}

// The same of global memory that the kernel does not write: such loads may pass stores, so that
// those of several rounds of a loop are on their way at once.
template <class T, int V>
__device__ __forceinline__ void load_constant(const T* from, float (&values)[V]) {
  using W = Word<V * sizeof(T)>;
  constexpr int WORDS = V * sizeof(T) / sizeof(W);
  W words[WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; ++i) words[i] = __ldg(reinterpret_cast<const W*>(from) + i);
  unpack<T>(words, values);
}

template <class T, int V>
__device__ __forceinline__ void store_vector(T* to, const float (&values)[V]) {
  using W = Word<V * sizeof(T)>;
  constexpr int WORDS = V * sizeof(T) / sizeof(W);
  T stored[V];
#pragma unroll
  for (int k = 0; k < V; ++k) stored[k] = from_float<T>(values[k]);
  W words[WORDS];
  __builtin_memcpy(words, stored, sizeof stored);
#pragma unroll
  for (int i = 0; i < WORDS; ++i) reinterpret_cast<W*>(to)[i] = words[i];
}

// ---- tiles -------------------------------------------------------------------------------------

inline bool aligned(const Tensor& x, int64_t samples, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(x.data) % bytes == 0 &&
         (samples == 1 || x.stride[0] * size_of(x.dtype) % bytes == 0);
}

// Whether the samples of x are rows of tiles, each tile aligned to its widest word. An x that is
// not given is.
inline bool in_tiles(const Shape& s, const Tensor& x, int channels) {
  if (!x.data) return true;
  const auto steps = [](int64_t size, int64_t stride, int64_t step) {
    return size == 1 || stride == step;
  };
  const bool order = channels == 1 ? steps(s.w, x.stride[3], 1) && steps(s.h, x.stride[2], s.w) &&
                                         steps(s.c, x.stride[1], s.h * s.w)
                                   : s.c == channels && x.stride[1] == 1 &&
                                         steps(s.w, x.stride[3], channels) &&
                                         steps(s.h, x.stride[2], s.w * channels);
  return order && s.c * s.h * s.w / channels % PLACES == 0 &&
         aligned(x, s.n, x.dtype == DType::u8 ? 8 : 16);
}

// The CHANNELS (1 or 3) in which all of the tensors are rows of tiles; 0 if there are none.
template <class... Tensors>
int tile_channels(const Shape& shape, const Tensors&... tensors) {
  if ((in_tiles(shape, tensors, 1) && ...)) return 1;
  if ((in_tiles(shape, tensors, 3) && ...)) return 3;
  return 0;
}

template <class T>
__device__ __forceinline__ T* sample(const Tensor& x, int64_t n) {
  return static_cast<T*>(x.data) + n * x.stride[0];
}

// The normals of a tile, in the order of memory.
template <int CHANNELS>
__device__ __forceinline__ void draw_tile(const Philox& stream, int64_t numel, int64_t tile,
                                          float (&z)[PLACES * CHANNELS]) {
  const int64_t blocks = numel / CHANNELS / 4;  // of a channel
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
    for (int half = 0; half < PLACES / 4; ++half) {
      float four[4];
      normal4(stream, uint32_t(c * blocks + PLACES / 4 * tile + half), four);
#pragma unroll
      for (int j = 0; j < 4; ++j) z[(4 * half + j) * CHANNELS + c] = four[j];
    }
}

// ---- layouts of vectors ------------------------------------------------------------------------
// NHWC, where pixels follow each other at one step, and NCHW, where places of a plane do.

// From a pixel to the next, where pixels_in() holds.
__host__ __device__ inline int64_t pixel_step(const Shape& s, const Tensor& x) {
  return s.w == 1 ? x.stride[2] : x.stride[3];
}

inline bool pixels_in(const Shape& s, const Tensor& x) {
  return x.stride[1] == 1 && (s.h == 1 || s.w == 1 || x.stride[2] == s.w * x.stride[3]);
}

inline bool pixels_aligned(const Shape& s, const Tensor& x) {
  return aligned(x, s.n, 16) && (s.h * s.w == 1 || pixel_step(s, x) * size_of(x.dtype) % 16 == 0);
}

inline bool planes_in(const Shape& s, const Tensor& x) {
  return (s.w == 1 || x.stride[3] == 1) && (s.h == 1 || x.stride[2] == s.w) &&
         aligned(x, s.n, 16) && (s.c == 1 || x.stride[1] * size_of(x.dtype) % 16 == 0);
}

// ---- single elements ---------------------------------------------------------------------------

__device__ inline float load(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::bf16:
      return to_float(static_cast<const BF16*>(data)[at]);
    case DType::f16:
      return to_float(static_cast<const F16*>(data)[at]);
    case DType::u8:
      return to_float(static_cast<const uint8_t*>(data)[at]);
    default:
      return static_cast<const float*>(data)[at];
  }
}

__device__ inline void store(void* data, DType dtype, int64_t at, float x) {
  switch (dtype) {
    case DType::bf16:
      static_cast<BF16*>(data)[at] = from_float<BF16>(x);
      return;
    case DType::f16:
      static_cast<F16*>(data)[at] = from_float<F16>(x);
      return;
    case DType::u8:
      return;  // no op writes bytes
    default:
      static_cast<float*>(data)[at] = x;
  }
}

// What storing leaves of x.
__device__ inline float rounded(DType dtype, float x) {
  if (dtype == DType::bf16) return to_float(from_float<BF16>(x));
  if (dtype == DType::f16) return to_float(from_float<F16>(x));
  return x;
}

__device__ inline float element(const Matrix& m, int64_t n, int64_t c, float missing) {
  return m.data ? load(m.data, m.dtype, n * m.stride_n + c * m.stride_c) : missing;
}

__host__ __device__ inline int64_t numel(const Shape& shape) { return shape.c * shape.h * shape.w; }

// Where an element of a sample is; steps on in (C, H, W) order, the order of the random stream.
struct Cursor {
  int64_t n, c, h, w;

  __device__ Cursor(const Shape& shape, int64_t n, int64_t element) : n(n) {
    c = divide(divide(element, shape.w, w), shape.h, h);
  }

  __device__ void next(const Shape& shape) {
    if (++w < shape.w) return;
    w = 0;
    if (++h < shape.h) return;
    h = 0;
    ++c;
  }

  __device__ int64_t offset(const Tensor& x) const {
    return n * x.stride[0] + c * x.stride[1] + h * x.stride[2] + w * x.stride[3];
  }

  __device__ float load(const Tensor& x) const {
    return fastddpm::load(x.data, x.dtype, offset(x));
  }

  __device__ void store(const Tensor& x, float value) const {
    fastddpm::store(x.data, x.dtype, offset(x), value);
  }
};

// ---- the table and the stream ------------------------------------------------------------------

// Copies the table's row of t, the nearest one if t is outside: a kernel can't raise an error.
__device__ inline void read_row(const Table& table, const PerSample& t, int64_t n,
                                float row[COLUMNS]) {
  const int64_t step = t.data[n * t.stride], last = table.steps - 1;
  const int64_t inside = step < 0 ? 0 : step > last ? last : step;
  for (int i = 0; i < COLUMNS; ++i) row[i] = table.data[inside * COLUMNS + i];
}

__device__ inline Philox stream_of(const Random& random, int64_t n) {
  const uint64_t seed = random.device_seed ? uint64_t(*random.device_seed) : random.seed;
  return make_philox(seed, random.step.data[n * random.step.stride],
                     random.sample_index.data[n * random.sample_index.stride]);
}

}  // namespace
}  // namespace fastddpm

// Loops over every (sample n, job) that is this thread's.
#define FASTDDPM_FOR_JOBS(n, job, samples, jobs)                                \
  for (int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, job = 0, \
               n = ::fastddpm::divide(index, jobs, job);                        \
       n < (samples);                                                           \
       index += int64_t(gridDim.x) * blockDim.x, n = ::fastddpm::divide(index, jobs, job))
