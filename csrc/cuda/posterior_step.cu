#include "../philox.h"
#include "launch.h"

namespace fastddpm {
namespace {

// One thread per Philox block: every given tensor is read once and x_{t-1} written once.
__global__ void __launch_bounds__(THREADS) posterior_step_kernel(const PosteriorStep op) {
  FASTDDPM_FOR_QUADS(n, quad, op.shape.n, numel(op.shape)) {
    float row[COLUMNS], z[4];
    read_row(op.table, op.t, n, row);
    const bool noisy = !(row[SIGMA] <= 0.0f);  // also where a t outside the table made it NaN
    if (noisy && !op.z.data)
      normal4(make_philox(op.random.seed, op.random.step.data[n * op.random.step.stride],
                          op.random.sample_index.data[n * op.random.sample_index.stride]),
              uint32_t(quad), z);
    Cursor at(op.shape, n, 4 * quad);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * quad + i == numel(op.shape)) break;
      float x =
          posterior_mean(row, at.load(op.xt), at.load(op.model_output), op.prediction, op.clip);
      if (noisy) {
        float sigma = row[SIGMA];
        if (op.log_variance.data && sigma > 0.0f)
          sigma = exponential(0.5f * at.load(op.log_variance));
        x = madd(sigma, op.z.data ? at.load(op.z) : z[i], x);
      }
      at.store(op.out, x);
      at.next(op.shape);
    }
  }
}

}  // namespace

namespace cuda {

void posterior_step(const PosteriorStep& op, void* stream) {
  if (op.shape.n == 0 || op.shape.c * op.shape.h * op.shape.w == 0) return;
  FASTDDPM_LAUNCH(posterior_step_kernel,
                  quad_grid(op.shape.c * op.shape.h * op.shape.w, op.shape.n), THREADS, 0, stream,
                  op);
}

}  // namespace cuda
}  // namespace fastddpm
