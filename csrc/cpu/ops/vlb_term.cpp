// vlb_term: the walk over the elements; the formulas are in bound.h. All tensors are read in (C, H,
// W) order, whatever their layouts, so that a sample's sums have the same bits in each.
#include "../../bound.h"
#include "../isa.h"
#include "normals.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t LANES = 32;  // side by side, added in pairs at the end

struct Sums {
  double nats, squares;
};

// The sums of each(i) over i in [0, count), in an order of its own.
template <class Each>
inline Sums sum_of(int64_t count, const Each& each) {
  double nats[LANES] = {}, squares[LANES] = {};
  const int64_t whole = count / LANES * LANES;
  for (int64_t first = 0; first < whole; first += LANES)
    for (int64_t k = 0; k < LANES; ++k) {
      const Sums one = each(first + k);
      nats[k] += one.nats, squares[k] += one.squares;
    }
  for (int64_t i = whole; i < count; ++i) {
    const Sums one = each(i);
    nats[i - whole] += one.nats, squares[i - whole] += one.squares;
  }
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t k = 0; k < half; ++k) nats[k] += nats[k + half], squares[k] += squares[k + half];
  return {nats[0], squares[0]};
}

BoundStep step_of(const VlbTerm& op, int64_t n) {
  const int64_t t = op.t.data[n * op.t.stride];
  return bound_step(op.table.data + t * COLUMNS, op.log_ratio[t], t == 0, op.x0.dtype == DType::u8,
                    op.prediction, op.clip, op.log_variance.data, op.learned_range);
}

Sums chunk_sums(const VlbTerm& op, int64_t n, int64_t first, int64_t count) {
  float buffers[4][CHUNK];
  const BoundStep step = step_of(op, n);
  const auto operand = [&](const Tensor& x, float* buffer) {
    return floats(view(x, op.shape, n, Order::chw), first, count, buffer);
  };
  const float* x0 = operand(op.x0, buffers[0]);
  const float* output = operand(op.model_output, buffers[1]);
  const float* xt = buffers[2];
  const float* word = op.log_variance.data ? operand(op.log_variance, buffers[3]) : nullptr;
  if (op.xt.data) {
    xt = operand(op.xt, buffers[2]);
  } else {
    const float* row = op.table.data + op.t.data[n * op.t.stride] * COLUMNS;
    const bool bytes = op.x0.dtype == DType::u8;
    normals_chw(stream(op.random, n), first, count, buffers[2]);
    for (int64_t i = 0; i < count; ++i)
      buffers[2][i] = q_sample(row, bytes ? to_unit(x0[i]) : x0[i], buffers[2][i]);
  }
  if (step.decoder)
    return sum_of(count, [&](int64_t i) -> Sums {
      const double image = step.x0(x0[i]), prediction = step.predicted(xt[i], output[i]);
      return {step.nll(image, prediction, xt[i], word ? word[i] : 0.0f),
              step.square(image, prediction)};
    });
  if (word)
    return sum_of(count, [&](int64_t i) -> Sums {
      const double image = step.x0(x0[i]), prediction = step.predicted(xt[i], output[i]);
      return {step.kl(image, prediction, word[i]), step.square(image, prediction)};
    });
  return sum_of(count, [&](int64_t i) -> Sums {
    const double image = step.x0(x0[i]), prediction = step.predicted(xt[i], output[i]);
    return {step.kl(image, prediction, 0.0f), step.square(image, prediction)};
  });
}

}  // namespace

void vlb_term(const VlbTerm& op, int threads) {
  const int64_t size = numel(op.shape), chunks = (size + CHUNK - 1) / CHUNK;
  const Scratch<double> sums(2 * op.shape.n * chunks, false);
  for_chunks(op.shape.n, size, CHUNK, 4 * op.shape.n * size, threads,
             [&](int64_t n, int64_t first, int64_t count) {
               const Sums part = chunk_sums(op, n, first, count);
               double* const at = sums.data + 2 * (n * chunks + first / CHUNK);
               at[0] = part.nats, at[1] = part.squares;
             });
  for (int64_t n = 0; n < op.shape.n; ++n) {
    double nats = 0.0, squares = 0.0;
    for (int64_t i = 0; i < chunks; ++i) {
      nats += sums.data[2 * (n * chunks + i)];
      squares += sums.data[2 * (n * chunks + i) + 1];
    }
    op.term[n] = float(bits_per_dim(nats, size));
    op.mse[n] = float(squares / double(size));
  }
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
