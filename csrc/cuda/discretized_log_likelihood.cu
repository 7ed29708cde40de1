#include "launch.h"

namespace fastddpm {
namespace {

// One thread per 4 elements, in float64: a likelihood is taken once per image, not once per step.
__global__ void __launch_bounds__(THREADS)
    discretized_log_likelihood_kernel(const DiscretizedLogLikelihood op) {
  FASTDDPM_FOR_QUADS(n, quad, op.shape.n, numel(op.shape)) {
    Cursor at(op.shape, n, 4 * quad);
    for (int i = 0; i < 4; ++i) {
      if (4 * quad + i == numel(op.shape)) break;
      at.store(op.out, float(log_bin_mass(at.load(op.x), at.load(op.mean), at.load(op.log_scale))));
      at.next(op.shape);
    }
  }
}

}  // namespace

namespace cuda {

void discretized_log_likelihood(const DiscretizedLogLikelihood& op, void* stream) {
  if (op.shape.n == 0 || op.shape.c * op.shape.h * op.shape.w == 0) return;
  FASTDDPM_LAUNCH(discretized_log_likelihood_kernel,
                  quad_grid(op.shape.c * op.shape.h * op.shape.w, op.shape.n), THREADS, 0, stream,
                  op);
}

}  // namespace cuda
}  // namespace fastddpm
