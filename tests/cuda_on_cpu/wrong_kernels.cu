// Kernels with one mistake each, and the same kernel without it: what the emulator has to find.
//
// wrong_kernels NAME runs one on exactly as much memory as it is allowed. It ends with 0 if nothing
// was found, with 3 and the reason if the emulator threw, or as a sanitizer makes it.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"

namespace {

constexpr int THREADS = 64;

// Reverses the block's part of x through shared memory.
template <bool BARRIER>
__global__ void reverse(float* x) {
  __shared__ float part[THREADS];
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  part[threadIdx.x] = x[i];
  if (BARRIER) __syncthreads();
  x[i] = part[THREADS - 1 - threadIdx.x];
}

template <bool BOUND>
__global__ void past_the_end(float* x, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (!BOUND || i < n) x[i] += 1.0f;
}

template <int SIZE>
__global__ void past_shared(float* x) {
  __shared__ float part[SIZE];
  part[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = 2.0f * part[threadIdx.x];
}

__global__ void past_dynamic_shared(float* x) {
  FASTDDPM_DYNAMIC_SHARED(memory);
  float* part = reinterpret_cast<float*>(memory);
  part[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = 2.0f * part[threadIdx.x];
}

// Every lane names all lanes, but a half of them went another way.
template <bool ALL>
__global__ void half_a_warp(float* x) {
  if (ALL || threadIdx.x % 32 < 16)
    x[threadIdx.x] += __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
}

template <bool SAME>
__global__ void two_masks(float* x) {
  const unsigned low = SAME ? 0xffffffffu : 0x0000ffffu;
  __syncwarp(threadIdx.x % 32 < 16 ? low : 0xffffffffu);
  x[threadIdx.x] += 1.0f;
}

template <bool ALL>
__global__ void barrier_in_a_branch(float* x) {
  if (ALL || threadIdx.x < 32) __syncthreads();
  x[threadIdx.x] += 1.0f;
  __syncthreads();
}

// Neighbours of a warp exchange values: a shuffle would do, memory needs __syncwarp.
template <bool BARRIER>
__global__ void exchange(float* x) {
  __shared__ float part[THREADS];
  part[threadIdx.x] = x[threadIdx.x];
  if (BARRIER) __syncwarp();
  x[threadIdx.x] = part[threadIdx.x ^ 1];
}

// All blocks write the same element.
template <bool OWN>
__global__ void between_blocks(float* x) {
  if (threadIdx.x == 0) x[OWN ? blockIdx.x : 0] = 1.0f;
}

__global__ void misaligned(float* x, int offset) {
  if (threadIdx.x == 0) reinterpret_cast<uint4*>(x + offset)->x = 0;
}

void run(const std::string& name) {
  std::vector<float> memory(2 * THREADS, 1.0f);
  float* x = memory.data();
  const auto is = [&](const char* other) { return name == other; };
  const dim3 one(1), two(2);
#define RUN(shared, grid, kernel, ...)                                      \
  do {                                                                      \
    const auto function = kernel;                                           \
    FASTDDPM_LAUNCH(function, grid, THREADS, shared, nullptr, __VA_ARGS__); \
    return;                                                                 \
  } while (false)
  if (is("reverse")) RUN(0, two, reverse<true>, x);
  if (is("reverse_wrong")) RUN(0, two, reverse<false>, x);
  if (is("past_the_end")) RUN(0, dim3(3), past_the_end<true>, x, 2 * THREADS);
  if (is("past_the_end_wrong")) RUN(0, dim3(3), past_the_end<false>, x, 2 * THREADS);
  if (is("past_shared")) RUN(0, one, past_shared<THREADS>, x);
  if (is("past_shared_wrong")) RUN(0, one, past_shared<THREADS - 1>, x);
  if (is("past_dynamic_shared")) RUN(4 * THREADS, one, past_dynamic_shared, x);
  if (is("past_dynamic_shared_wrong")) RUN(4 * THREADS - 4, one, past_dynamic_shared, x);
  if (is("half_a_warp")) RUN(0, one, half_a_warp<true>, x);
  if (is("half_a_warp_wrong")) RUN(0, one, half_a_warp<false>, x);
  if (is("two_masks")) RUN(0, one, two_masks<true>, x);
  if (is("two_masks_wrong")) RUN(0, one, two_masks<false>, x);
  if (is("barrier_in_a_branch")) RUN(0, one, barrier_in_a_branch<true>, x);
  if (is("barrier_in_a_branch_wrong")) RUN(0, one, barrier_in_a_branch<false>, x);
  if (is("exchange")) RUN(0, one, exchange<true>, x);
  if (is("exchange_wrong")) RUN(0, one, exchange<false>, x);
  if (is("between_blocks")) RUN(0, two, between_blocks<true>, x);
  if (is("between_blocks_wrong")) RUN(0, two, between_blocks<false>, x);
  if (is("misaligned")) RUN(0, one, misaligned, x, 4);
  if (is("misaligned_wrong")) RUN(0, one, misaligned, x, 1);
  if (is("shared_limit")) RUN(227 << 10, one, past_dynamic_shared, x);
  if (is("shared_limit_wrong")) RUN((227 << 10) + 1, one, past_dynamic_shared, x);
  std::fprintf(stderr, "no kernel %s\n", name.c_str());
  std::exit(2);
}

}  // namespace

int main(int, char** arguments) {
  try {
    run(arguments[1]);
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  return 0;
}
