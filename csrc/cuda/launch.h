// What every CUDA op shares: the launch, and element access to strided tensors of any storage type.
//
// The kernels need no vendor header but cuda_runtime.h, no torch and no inline PTX. Offsets are
// int64.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../ops.h"

// The one place with <<<>>>. Launching is asynchronous: only a launch that the driver refuses is
// reported here.
#ifndef FASTDDPM_LAUNCH
#define FASTDDPM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                         \
  do {                                                                                          \
    if ((shared_bytes) > (48 << 10)) /* beyond that a kernel has to ask for it */               \
      fastddpm::check(                                                                          \
          cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),                           \
                               cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), \
          #kernel);                                                                             \
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);      \
    fastddpm::check(cudaGetLastError(), #kernel);                                               \
  } while (false)
#define FASTDDPM_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace fastddpm {
namespace {

constexpr int THREADS = 256;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// A grid over (quads of 4 elements, samples); kernels loop over what is beyond it.
inline dim3 quad_grid(int64_t numel, int64_t samples) {
  const int64_t blocks = ((numel + 3) / 4 + THREADS - 1) / THREADS;
  return dim3(unsigned(blocks < 65535 ? blocks : 65535),
              unsigned(samples < 65535 ? samples : 65535));
}

__device__ inline int64_t numel(const Shape& shape) { return shape.c * shape.h * shape.w; }

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

// Copies the table's row of t; NaN everywhere if t is outside, since a kernel can't raise an error.
__device__ inline void read_row(const Table& table, const PerSample& t, int64_t n,
                                float row[COLUMNS]) {
  const int64_t step = t.data[n * t.stride];
  const bool inside = step >= 0 && step < table.steps;
  for (int i = 0; i < COLUMNS; ++i)
    row[i] = inside ? table.data[step * COLUMNS + i] : bit_cast<float>(0x7fc00000u);
}

}  // namespace
}  // namespace fastddpm

// Loops over every (sample n, quad of 4 elements) that is this thread's.
#define FASTDDPM_FOR_QUADS(n, quad, samples, numel)                                         \
  for (int64_t n = blockIdx.y; n < (samples); n += gridDim.y)                               \
    for (int64_t quad = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; 4 * quad < (numel); \
         quad += int64_t(gridDim.x) * blockDim.x)
