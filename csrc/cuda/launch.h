// What every CUDA op shares on the host: the launch, the device's limits, the choice of a storage
// type at compile time.
//
// The kernels need no vendor header but cuda_runtime.h, no torch and no inline PTX. Starting a
// kernel and dynamic shared memory go through two macros, which the tests define for the CPU.
#pragma once
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "../ops.h"

namespace fastddpm {
namespace {

template <class T>
struct As {
  using type = T;
};

// The one place that starts a kernel. Not <<<>>>: cudaLaunchKernel says itself whether the launch
// was taken, where cudaGetLastError may tell of somebody else's call.
#ifndef FASTDDPM_START
#define FASTDDPM_START ::fastddpm::start
#define FASTDDPM_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
template <class... Parameters>
cudaError_t start(const char*, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                  int64_t shared_bytes, void* stream, typename As<Parameters>::type... arguments) {
  void* pointers[] = {static_cast<void*>(&arguments)...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers,
                          size_t(shared_bytes), static_cast<cudaStream_t>(stream));
}
#endif

constexpr int THREADS = 256;

// Throws what went wrong. CUDA also keeps an error for whoever asks next: it is taken away, so that
// the next valid call is not blamed for it.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline int current_device() {
  int ordinal = 0;
  check(cudaGetDevice(&ordinal), "cudaGetDevice");
  return ordinal;
}

// The most shared memory that a block of the current device can have.
inline int64_t shared_limit() {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, current_device()),
        "cudaDeviceGetAttribute");
  return bytes;
}

// Beyond 48 KB of dynamic shared memory a kernel has to ask for it: once on each device, for all
// there is (no kernel here has static shared memory beside it). If every launch asked for its own,
// the one of another thread could take it back before the launch.
inline void allow_shared(const void* kernel, const char* name) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::pair<const void*, int> key(kernel, current_device());
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count(key)) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             int(shared_limit())),
        name);
  allowed.insert(key);
}

// Launching is asynchronous: only a launch that is refused is reported here.
template <class Kernel, class... Arguments>
void launch(const char* name, Kernel* kernel, dim3 grid, dim3 block, int64_t shared_bytes,
            void* stream, const Arguments&... arguments) {
  if (shared_bytes > (48 << 10)) allow_shared(reinterpret_cast<const void*>(kernel), name);
  check(FASTDDPM_START(name, kernel, grid, block, shared_bytes, stream, arguments...), name);
}

// A kernel with commas in its name goes in parentheses.
#define FASTDDPM_LAUNCH(kernel, ...) ::fastddpm::launch(#kernel, kernel, __VA_ARGS__)

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
