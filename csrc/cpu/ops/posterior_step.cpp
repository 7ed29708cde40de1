// posterior_step: the walk over samples and chunks; the formula is in math.h.
#include "../isa.h"
#include "normals.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

// One run of elements; result may be xt. The prediction is constant to the compiler: branches
// would keep the loop from running at the speed of memory. The bound is not: between constants
// compilers trade minimum and maximum for masks.
template <class T, class Z>
using Step = void (*)(const float*, float, const T*, const T*, const Z*, int64_t, T*);

template <class T, class Z, bool NOISE, Prediction PREDICTION>
void step(const float* table_row, float bound, const T* xt, const T* output, const Z* z,
          int64_t count, T* result) {
  float row[COLUMNS];
  __builtin_memcpy(row, table_row, sizeof row);
  fill(result, count, [&](int64_t i) {
    const float mean = posterior_mean(row, to_float(xt[i]), to_float(output[i]), PREDICTION, bound);
    return NOISE ? madd(row[SIGMA], to_float(z[i]), mean) : mean;
  });
}

template <class T, class Z, bool NOISE>
Step<T, Z> step_of(Prediction prediction) {
  if (prediction == Prediction::mean) return step<T, Z, NOISE, Prediction::mean>;
  if (prediction == Prediction::x0) return step<T, Z, NOISE, Prediction::x0>;
  if (prediction == Prediction::v) return step<T, Z, NOISE, Prediction::v>;
  return step<T, Z, NOISE, Prediction::eps>;
}

struct Walk {
  const PosteriorStep& op;
  const Order order;
  const bool drawn;
  const float bound;

  // Calls body(row, n, first, count) for every chunk of `length` elements.
  template <class Body>
  void run(int64_t length, int threads, const Body& body) const {
    const int64_t size = numel(op.shape), all = op.shape.n * size;
    for_chunks(op.shape.n, size, length, all, threads,
               [&](int64_t n, int64_t first, int64_t count) {
                 body(op.table.data + op.t.data[n * op.t.stride] * COLUMNS, n, first, count);
               });
  }

  void draw(int64_t n, int64_t first, int64_t count, float* z) const {
    normals(stream(op.random, n), op.shape, order, first, count, z);
  }
};

// Whether every operand is contiguous and of one type: then there is nothing to copy.
template <class T>
bool run_direct(const Walk& walk, int threads) {
  const PosteriorStep& op = walk.op;
  const Shape& shape = op.shape;
  const auto is_run = [&](const Tensor& x) { return is_run_of<T>(x, shape, walk.order); };
  if (!is_run(op.xt) || !is_run(op.model_output) || !is_run(op.out) ||
      !(walk.drawn || is_run(op.z)) || op.log_variance.data)
    return false;
  const auto quiet = step_of<T, T, false>(op.prediction);
  const auto given = step_of<T, T, true>(op.prediction);
  const auto drawn = step_of<T, float, true>(op.prediction);
  walk.run(walk.drawn ? chunk_length(walk.order, shape, true) : LONG_CHUNK, threads,
           [&](const float* row, int64_t n, int64_t first, int64_t count) {
             const T* xt = run<T>(op.xt, n, first);
             const T* output = run<T>(op.model_output, n, first);
             T* out = run<T>(op.out, n, first);
             if (!(row[SIGMA] > 0.0f)) {
               quiet(row, walk.bound, xt, output, nullptr, count, out);
             } else if (walk.drawn) {
               float z[CHUNK];
               walk.draw(n, first, count, z);
               drawn(row, walk.bound, xt, output, z, count, out);
             } else {
               given(row, walk.bound, xt, output, run<T>(op.z, n, first), count, out);
             }
           });
  return true;
}

void run_copied(const Walk& walk, int threads) {
  const PosteriorStep& op = walk.op;
  const auto quiet = step_of<float, float, false>(op.prediction);
  const auto noisy = step_of<float, float, true>(op.prediction);
  walk.run(chunk_length(walk.order, op.shape, walk.drawn), threads,
           [&](const float* row, int64_t n, int64_t first, int64_t count) {
             const auto operand = [&](const Tensor& x) { return view(x, op.shape, n, walk.order); };
             float xt_buffer[CHUNK], output_buffer[CHUNK], z_buffer[CHUNK], result[CHUNK];
             const float* xt = floats(operand(op.xt), first, count, xt_buffer);
             const float* output = floats(operand(op.model_output), first, count, output_buffer);
             const float* z = z_buffer;
             const bool noise = row[SIGMA] > 0.0f;
             if (noise && walk.drawn)
               walk.draw(n, first, count, z_buffer);
             else if (noise)
               z = floats(operand(op.z), first, count, z_buffer);
             if (noise && op.log_variance.data) {
               float log_variance[CHUNK];
               load(operand(op.log_variance), first, count, log_variance);
               quiet(row, walk.bound, xt, output, z, count, result);
               const Deviation sigma = deviation(row, op.learned_range);
               for (int64_t i = 0; i < count; ++i)
                 result[i] = madd(sigma.of(log_variance[i]), z[i], result[i]);
             } else {
               (noise ? noisy : quiet)(row, walk.bound, xt, output, z, count, result);
             }
             store(operand(op.out), first, count, result);
           });
}

}  // namespace

void posterior_step(const PosteriorStep& op, int threads) {
  const bool drawn = !op.z.data;
  const Walk walk{op, memory_order(op.out, op.shape, drawn), drawn, clip_bound(op.clip)};
  if (!run_direct<float>(walk, threads) && !run_direct<BF16>(walk, threads))
    run_copied(walk, threads);
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
