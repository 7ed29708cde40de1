// squared_error and its gradient: the walks over the elements. A sample's sum is that of its
// chunks', in their order.
#include "../isa.h"
#include "cut.h"
#include "squares.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

void squared_error(const SquaredError& op, int threads) {
  const Order order = memory_order(op.prediction, op.shape);
  const int64_t size = numel(op.shape), chunks = (size + CHUNK - 1) / CHUNK;
  const Scratch<double> sums(op.shape.n * chunks, false);
  for_chunks(
      op.shape.n, size, CHUNK, op.shape.n * size, threads,
      [&](int64_t n, int64_t first, int64_t count) {
        float buffers[2][CHUNK];
        const float* p = floats(view(op.prediction, op.shape, n, order), first, count, buffers[0]);
        const float* t = floats(view(op.target, op.shape, n, order), first, count, buffers[1]);
        sums.data[n * chunks + first / CHUNK] =
            sum_of_squares(count, [&](int64_t i) { return p[i] - t[i]; });
      });
  for (int64_t n = 0; n < op.shape.n; ++n) {
    double sum = 0.0;
    for (int64_t i = 0; i < chunks; ++i) sum += sums.data[n * chunks + i];
    op.out[n] = float(sum / double(size));
  }
}

void squared_error_backward(const SquaredErrorBackward& op, int threads) {
  const Order order = memory_order(op.dprediction, op.shape);
  const int64_t size = numel(op.shape);
  for_chunks(
      op.shape.n, size, CHUNK, op.shape.n * size, threads,
      [&](int64_t n, int64_t first, int64_t count) {
        float buffers[2][CHUNK];
        const View out = view(op.dprediction, op.shape, n, order);
        const float* p = floats(view(op.prediction, op.shape, n, order), first, count, buffers[0]);
        const float* t = floats(view(op.target, op.shape, n, order), first, count, buffers[1]);
        const float slope = element(op.grad, 0, n, 0.0f) * float(2.0 / double(size));
        float* d = direct(out, first);
        const bool stored = d;
        d = stored ? d : buffers[0];
        fill(d, count, [&](int64_t i) { return slope * (p[i] - t[i]); });
        if (!stored) store(out, first, count, d);
      });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
