// choices: one thread an example, one Philox block each; see philox.h.
#include "access.h"

namespace fastddpm {
namespace {

__global__ void __launch_bounds__(THREADS) draw_choices(const Choices op) {
  FASTDDPM_FOR_JOBS(n, job, op.n, 1) {
    const int64_t example = op.sample_index.data[n * op.sample_index.stride];
    choose(make_philox(op.seed, op.step, example), op.levels, op.t[n], op.flip[n]);
  }
}

}  // namespace

namespace cuda {

void choices(const Choices& op, void* stream) {
  if (op.n == 0) return;
  FASTDDPM_LAUNCH(draw_choices, job_grid(op.n, 1), THREADS, 0, stream, op);
}

}  // namespace cuda
}  // namespace fastddpm
