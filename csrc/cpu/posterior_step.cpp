// posterior_step: the walk over samples and chunks; the formula is in math.h.
#include "isa.h"
#include "normals.h"
#include "parallel.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

void posterior_step(const PosteriorStep& op, int threads) {
  const bool drawn = !op.z.data;
  const Order order = memory_order(op.out, op.shape, drawn);
  const int64_t length = chunk_length(order, op.shape, drawn), size = numel(op.shape);
  const int64_t chunks = (size + length - 1) / length;
  parallel_for(op.shape.n * chunks, op.shape.n * size, threads, [&](int64_t job, int) {
    const int64_t n = job / chunks, first = job % chunks * length;
    const int64_t count = size - first < length ? size - first : length;
    float row[COLUMNS];
    __builtin_memcpy(row, op.table.data + op.t.data[n * op.t.stride] * COLUMNS, sizeof row);

    float xt_buffer[CHUNK], out_buffer[CHUNK], mean[CHUNK];
    const float* xt = floats(view(op.xt, op.shape, n, order), first, count, xt_buffer);
    const float* out = floats(view(op.model_output, op.shape, n, order), first, count, out_buffer);
    for (int64_t i = 0; i < count; ++i)
      mean[i] = posterior_mean(row, xt[i], out[i], op.prediction, op.clip);

    if (row[SIGMA] > 0.0f) {
      float z_buffer[CHUNK], sigma_buffer[CHUNK];
      const float* z = z_buffer;
      if (!drawn)
        z = floats(view(op.z, op.shape, n, order), first, count, z_buffer);
      else
        normals(stream(op.random, n), op.shape, order, first, count, z_buffer);
      if (op.log_variance.data) {
        load(view(op.log_variance, op.shape, n, order), first, count, sigma_buffer);
        for (int64_t i = 0; i < count; ++i)
          mean[i] = madd(exponential(0.5f * sigma_buffer[i]), z[i], mean[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) mean[i] = madd(row[SIGMA], z[i], mean[i]);
      }
    }
    store(view(op.out, op.shape, n, order), first, count, mean);
  });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
