// discretized_log_likelihood: the walk over the elements; the formula is in math.h.
#include "../isa.h"
#include "../view.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

void discretized_log_likelihood(const DiscretizedLogLikelihood& op, int threads) {
  const Order order = memory_order(op.out, op.shape);
  const int64_t size = numel(op.shape), work = op.shape.n * size * 16;
  for_chunks(op.shape.n, size, CHUNK, work, threads, [&](int64_t n, int64_t first, int64_t count) {
    float x[CHUNK], mean[CHUNK], log_scale[CHUNK], out[CHUNK];
    load(view(op.x, op.shape, n, order), first, count, x);
    load(view(op.mean, op.shape, n, order), first, count, mean);
    load(view(op.log_scale, op.shape, n, order), first, count, log_scale);
    for (int64_t i = 0; i < count; ++i) out[i] = float(log_bin_mass(x[i], mean[i], log_scale[i]));
    store(view(op.out, op.shape, n, order), first, count, out);
  });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
