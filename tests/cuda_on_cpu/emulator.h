// Lets g++ compile the .cu files of csrc/cuda and run their kernels on the CPU, for tests only:
//
//   g++ -x c++ -include emulator.h -I <CUDA's own headers> csrc/cuda/randn.cu emulator.cpp
//
// A kernel is an ordinary function here, called once per CUDA thread. The threads of a block are
// fibers, so that __syncthreads and the *_sync warp operations really wait for the others; blocks
// run one after the other. This file is what a kernel sees; emulator.cpp runs it. Reported, as a
// std::runtime_error of the launch: a barrier that not all threads reach, a warp operation whose
// mask names a lane that is not there or that waits elsewhere. A launch that the device does not
// take is refused with the runtime's error, as is one with more shared memory than the kernel was
// allowed. What needs instrumented memory accesses is the job of a build: of
// -fsanitize=address,undefined, or of races.cpp.
#pragma once
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__         // host_defines.h keeps what is already defined
#define __shared__ static  // one block at a time: its fibers share a static
#include <cuda_runtime.h>
#undef __host__
#undef __device__
#undef __launch_bounds__
#undef __forceinline__
#define __host__
#define __device__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

namespace emulator {

struct Thread {  // what the running thread may know of itself
  dim3 index;
  unsigned linear, lane;
};

extern const Thread* thread;  // null between launches
extern dim3 block_index, block_dim, grid_dim;

// What csrc/cuda/launch.h takes in place of cudaLaunchKernel; `function` says which kernel it is.
cudaError_t launch(const char* name, const void* function, dim3 grid, dim3 block,
                   size_t shared_bytes, const std::function<void()>& kernel);
void* dynamic_shared();

void barrier(int line);  // every thread of the block that has not returned
void warp_barrier(unsigned mask);
// The word that each lane of the mask sees; `source` is the lane that it reads.
uint64_t shuffle(unsigned mask, uint64_t word, int source);
unsigned ballot(unsigned mask, bool vote);

template <class T>
T shuffle_value(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = shuffle(mask, word, source);
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <class Kernel, class... Arguments>
cudaError_t start(const char* name, Kernel* kernel, dim3 grid, dim3 block, int64_t shared_bytes,
                  void*, const Arguments&... arguments) {
  return launch(name, reinterpret_cast<const void*>(kernel), grid, block, size_t(shared_bytes),
                [&] { kernel(arguments...); });
}

}  // namespace emulator

#define threadIdx (::emulator::thread->index)
#define blockIdx (::emulator::block_index)
#define blockDim (::emulator::block_dim)
#define gridDim (::emulator::grid_dim)

#define FASTDDPM_START ::emulator::start
#define FASTDDPM_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(::emulator::dynamic_shared())

#define __ldg(from) (*(from))  // no function: races.cpp counts accesses as they are written

inline void __syncthreads(int line = __builtin_LINE()) { ::emulator::barrier(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::emulator::warp_barrier(mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return ::emulator::shuffle_value(mask, value, source & 31);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return ::emulator::shuffle_value(mask, value, int(::emulator::thread->lane) ^ lanes);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
  const unsigned source = ::emulator::thread->lane + lanes;
  return ::emulator::shuffle_value(mask, value, int(source < 32 ? source : source - lanes));
}

inline unsigned __ballot_sync(unsigned mask, int vote) { return ::emulator::ballot(mask, vote); }
