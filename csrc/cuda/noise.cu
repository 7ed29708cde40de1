#include "../philox.h"
#include "launch.h"

namespace fastddpm {
namespace {

// One thread per Philox block: x0 is read once, x_t and a generated eps are written once.
__global__ void __launch_bounds__(THREADS) noise_kernel(const Noise op) {
  FASTDDPM_FOR_QUADS(n, quad, op.shape.n, numel(op.shape)) {
    float row[COLUMNS], eps[4];
    read_row(op.table, op.t, n, row);
    if (op.generate_eps)
      normal4(make_philox(op.random.seed, op.random.step.data[n * op.random.step.stride],
                          op.random.sample_index.data[n * op.random.sample_index.stride]),
              uint32_t(quad), eps);
    const bool flip = op.flip && op.flip[n];
    Cursor at(op.shape, n, 4 * quad);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * quad + i == numel(op.shape)) break;
      // x_t is made of eps as it is stored: a target of the training loss has to match it.
      const float e = op.generate_eps ? rounded(op.eps.dtype, eps[i]) : at.load(op.eps);
      if (op.generate_eps) at.store(op.eps, e);
      Cursor source = at;
      if (flip) source.w = op.shape.w - 1 - at.w;
      float x0 = source.load(op.x0);
      if (op.x0.dtype == DType::u8) x0 = to_unit(x0);
      at.store(op.xt, q_sample(row, x0, e));
      at.next(op.shape);
    }
  }
}

}  // namespace

namespace cuda {

void noise(const Noise& op, void* stream) {
  if (op.shape.n == 0 || op.shape.c * op.shape.h * op.shape.w == 0) return;
  FASTDDPM_LAUNCH(noise_kernel, quad_grid(op.shape.c * op.shape.h * op.shape.w, op.shape.n),
                  THREADS, 0, stream, op);
}

}  // namespace cuda
}  // namespace fastddpm
