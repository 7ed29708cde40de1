// noise: the walk over samples and chunks; formula and random numbers are in math.h and philox.h.
#include "isa.h"
#include "normals.h"
#include "parallel.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

void noise(const Noise& op, int threads) {
  const Order order = memory_order(op.xt, op.shape, op.generate_eps);
  const int64_t length = chunk_length(order, op.shape, op.generate_eps), size = numel(op.shape);
  const int64_t chunks = (size + length - 1) / length;
  parallel_for(op.shape.n * chunks, op.shape.n * size, threads, [&](int64_t job, int) {
    const int64_t n = job / chunks, first = job % chunks * length;
    const int64_t count = size - first < length ? size - first : length;
    const float* row = op.table.data + op.t.data[n * op.t.stride] * COLUMNS;

    float x0_buffer[CHUNK], eps_buffer[CHUNK], xt[CHUNK];
    const View images = view(op.x0, op.shape, n, order, op.flip && op.flip[n]);
    const float* x0 = floats(images, first, count, x0_buffer);
    if (op.x0.dtype == DType::u8)
      for (int64_t i = 0; i < count; ++i) x0_buffer[i] = to_unit(x0_buffer[i]);

    const View eps_view = view(op.eps, op.shape, n, order);
    const float* eps = eps_buffer;
    if (op.generate_eps) {
      normals(stream(op.random, n), op.shape, order, first, count, eps_buffer);
      round_to(op.eps.dtype, count, eps_buffer);
      store(eps_view, first, count, eps_buffer);
    } else {
      eps = floats(eps_view, first, count, eps_buffer);
    }

    for (int64_t i = 0; i < count; ++i) xt[i] = q_sample(row, x0[i], eps[i]);
    store(view(op.xt, op.shape, n, order), first, count, xt);
  });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
