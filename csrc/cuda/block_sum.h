// The float64 sum over a block of threads.
#pragma once
#include "access.h"

namespace fastddpm {
namespace {

// For thread 0 to read, in a fixed order; may be called again at once.
__device__ double block_sum(double x) {
  __shared__ double warps[THREADS / 32];
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x == 0)
    for (int i = 0; i < THREADS / 32; ++i) sum += warps[i];
  __syncthreads();
  return sum;
}

}  // namespace
}  // namespace fastddpm
