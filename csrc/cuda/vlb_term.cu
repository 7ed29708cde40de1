// vlb_term: a thread takes four elements at a time, a block a chunk of one sample, in (C, H, W)
// order whatever the layouts; where a sample has several chunks, a second kernel adds their sums in
// order. The formulas are in bound.h.
#include "../bound.h"
#include "block_sum.h"

namespace fastddpm {
namespace {

__device__ void write_sums(const VlbTerm& op, int64_t n, int64_t chunk, int64_t chunks, double nats,
                           double squares) {
  if (threadIdx.x != 0) return;
  if (op.workspace) {
    op.workspace[2 * (n * chunks + chunk)] = nats;
    op.workspace[2 * (n * chunks + chunk) + 1] = squares;
  } else {
    op.term[n] = float(bits_per_dim(nats, numel(op.shape)));
    op.mse[n] = float(squares / double(numel(op.shape)));
  }
}

__global__ void __launch_bounds__(THREADS, 1) vlb_term_parts(const VlbTerm op, int64_t chunks) {
  const int64_t elements = numel(op.shape);
  for (int64_t job = blockIdx.x; job < op.shape.n * chunks; job += gridDim.x) {
    int64_t chunk;
    const int64_t n = divide(job, chunks, chunk);
    const int64_t stop = (chunk + 1) * VLB_TERM_CHUNK, end = stop < elements ? stop : elements;
    const int64_t given = op.t.data[n * op.t.stride], last = op.table.steps - 1;
    const int64_t t = given < 0 ? 0 : given > last ? last : given;
    float row[COLUMNS];
    read_row(op.table, op.t, n, row);
    const BoundStep step =
        bound_step(row, op.log_ratio[t], t == 0, op.x0.dtype == DType::u8, op.prediction, op.clip,
                   op.log_variance.data != nullptr, op.learned_range);
    double nats = 0.0, squares = 0.0;
    for (int64_t first = chunk * VLB_TERM_CHUNK + 4 * int64_t(threadIdx.x); first < end;
         first += 4 * THREADS) {
      float z[4];
      if (!op.xt.data) normal4(stream_of(op.random, n), uint32_t(first / 4), z);
      Cursor at(op.shape, n, first);
#pragma unroll 1
      for (int k = 0; k < 4 && first + k < end; ++k) {
        const float value = at.load(op.x0), output = at.load(op.model_output);
        const float word = op.log_variance.data ? at.load(op.log_variance) : 0.0f;
        const float unit = op.x0.dtype == DType::u8 ? to_unit(value) : value;
        const float xt = op.xt.data ? at.load(op.xt) : q_sample(row, unit, z[k]);
        const double x0 = step.x0(value), prediction = step.predicted(xt, output);
        nats += step.decoder ? step.nll(x0, prediction, xt, word) : step.kl(x0, prediction, word);
        squares += step.square(x0, prediction);
        at.next(op.shape);
      }
    }
    nats = block_sum(nats);
    squares = block_sum(squares);
    write_sums(op, n, chunk, chunks, nats, squares);
  }
}

// A thread adds the sums of one sample.
__global__ void __launch_bounds__(THREADS) vlb_term_sums(const VlbTerm op, int64_t chunks) {
  const int64_t n = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (n >= op.shape.n) return;
  double nats = 0.0, squares = 0.0;
  for (int64_t i = 0; i < chunks; ++i) {
    nats += op.workspace[2 * (n * chunks + i)];
    squares += op.workspace[2 * (n * chunks + i) + 1];
  }
  op.term[n] = float(bits_per_dim(nats, numel(op.shape)));
  op.mse[n] = float(squares / double(numel(op.shape)));
}

}  // namespace

namespace cuda {

void vlb_term(const VlbTerm& op, void* stream) {
  const Shape& s = op.shape;
  if (s.n == 0) return;
  const int64_t chunks = numel(s) ? vlb_term_chunks(numel(s)) : 1;
  const int64_t blocks = s.n * chunks;
  const dim3 grid(unsigned(blocks < 0x7fffffff ? blocks : 0x7fffffff));
  FASTDDPM_LAUNCH(vlb_term_parts, grid, THREADS, 0, stream, op, chunks);
  if (op.workspace)
    FASTDDPM_LAUNCH(vlb_term_sums, dim3(unsigned((s.n + THREADS - 1) / THREADS)), THREADS, 0,
                    stream, op, chunks);
}

}  // namespace cuda
}  // namespace fastddpm
