#include "../philox.h"
#include "launch.h"

namespace fastddpm {
namespace {

// One thread per Philox block. 4 elements written and none read.
__global__ void __launch_bounds__(THREADS) randn_kernel(const Randn op) {
  FASTDDPM_FOR_QUADS(n, quad, op.n, op.numel) {
    float z[4];
    normal4(make_philox(op.random.seed, op.random.step.data[n * op.random.step.stride],
                        op.random.sample_index.data[n * op.random.sample_index.stride]),
            uint32_t(quad), z);
    for (int i = 0; i < 4 && 4 * quad + i < op.numel; ++i)
      store(op.out, op.dtype, n * op.numel + 4 * quad + i, z[i]);
  }
}

}  // namespace

namespace cuda {

void randn(const Randn& op, void* stream) {
  if (op.n == 0 || op.numel == 0) return;
  FASTDDPM_LAUNCH(randn_kernel, quad_grid(op.numel, op.n), THREADS, 0, stream, op);
}

}  // namespace cuda
}  // namespace fastddpm
