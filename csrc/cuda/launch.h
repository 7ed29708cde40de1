// What every CUDA op shares on the host: the launch, the device's limits, the choice of a storage
// type at compile time.
//
// The kernels need no vendor header but cuda_runtime.h, no torch and no inline PTX. Launches and
// dynamic shared memory go through two macros, which the tests define for the CPU.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../ops.h"

// The one place with <<<>>>. Launching is asynchronous: only a launch that the driver refuses is
// reported here. A kernel with commas in its name goes in parentheses.
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

// The most shared memory that a block of the current device can have.
inline int64_t shared_limit() {
  int ordinal = 0, bytes = 0;
  check(cudaGetDevice(&ordinal), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal),
        "cudaDeviceGetAttribute");
  return bytes;
}

// A grid of THREADS threads a block over (sample, job of a sample); kernels loop over what is
// beyond it.
inline dim3 job_grid(int64_t samples, int64_t jobs) {
  const int64_t blocks = (samples * jobs + THREADS - 1) / THREADS;
  return dim3(unsigned(blocks < 0x7fffffff ? blocks : 0x7fffffff));
}

inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2; }

inline bool is_empty(const Shape& s) { return s.n == 0 || s.c * s.h * s.w == 0; }

// body(T()) for the float storage type T of `dtype`.
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::bf16:
      return body(BF16());
    case DType::f16:
      return body(F16());
    default:
      return body(float());
  }
}

}  // namespace
}  // namespace fastddpm
