// randn: one thread a Philox block; the numbers are those of philox.h.
#include "access.h"

namespace fastddpm {
namespace {

// One thread per tile of two Philox blocks: 8 elements written and none read.
template <class T>
__global__ void __launch_bounds__(THREADS) randn_tiles(const Randn op) {
  const int64_t tiles = op.numel / PLACES;
  FASTDDPM_FOR_JOBS(n, tile, op.n, tiles) {
    float z[PLACES];
    draw_tile<1>(stream_of(op.random, n), op.numel, tile, z);
    store_vector(static_cast<T*>(op.out) + n * op.numel + tile * PLACES, z);
  }
}

// One thread per Philox block, where samples are no rows of aligned tiles.
__global__ void __launch_bounds__(THREADS) randn_quads(const Randn op) {
  const int64_t quads = (op.numel + 3) / 4;
  FASTDDPM_FOR_JOBS(n, quad, op.n, quads) {
    float z[4];
    normal4(stream_of(op.random, n), uint32_t(quad), z);
    for (int i = 0; i < 4 && 4 * quad + i < op.numel; ++i)
      store(op.out, op.dtype, n * op.numel + 4 * quad + i, z[i]);
  }
}

}  // namespace

namespace cuda {

void randn(const Randn& op, void* stream) {
  if (op.n == 0 || op.numel == 0) return;
  if (op.numel % PLACES == 0 && reinterpret_cast<uintptr_t>(op.out) % 16 == 0) {
    with_type(op.dtype, [&](auto type) {
      using T = decltype(type);
      FASTDDPM_LAUNCH(randn_tiles<T>, job_grid(op.n, op.numel / PLACES), THREADS, 0, stream, op);
    });
  } else {
    FASTDDPM_LAUNCH(randn_quads, job_grid(op.n, (op.numel + 3) / 4), THREADS, 0, stream, op);
  }
}

}  // namespace cuda
}  // namespace fastddpm
