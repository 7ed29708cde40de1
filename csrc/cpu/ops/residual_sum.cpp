// residual_sum: the walk over blocks; the sum itself is shared with group_norm_silu (cut.h).
#include "../isa.h"
#include "cut.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

void residual_sum(const ResidualSum& op, int threads) {
  const Cut cut(op.shape, op.u);
  const int64_t per_thread = 2 * cut.row + 3 * cut.step;
  const Scratch<float> scratch(cut.team(threads) * per_thread, false);
  parallel_for(cut.samples * cut.blocks, cut.elements(), threads, [&](int64_t job, int thread) {
    const int64_t n = job / cut.blocks, b = job % cut.blocks;
    float *const list = scratch.data + thread * per_thread, *const line = list + cut.row;
    float* const buffers = line + cut.row;
    cut.for_sources(b, [&](const Source& s) {
      const View x = view(op.x, s.shape, n, cut.order), u = view(op.u, s.shape, n, cut.order);
      const View residual = op.residual.data ? view(op.residual, s.shape, n, cut.order) : View{};
      const float* before = cut.repeat(s, read_block(cut, op.before, op.shape.c, n, b, list), line);
      cut.for_steps(s, b, [&](int64_t first, int64_t count) {
        sum_step(s, x, op.residual.data ? &residual : nullptr, u, before, first, count, buffers,
                 buffers + cut.step, buffers + 2 * cut.step);
      });
    });
  });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
