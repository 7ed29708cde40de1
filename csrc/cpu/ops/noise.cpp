// noise: the walk over samples and chunks; formula and random numbers are in math.h and philox.h.
#include "../isa.h"
#include "normals.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

inline float unit(uint8_t pixel) { return to_unit(to_float(pixel)); }
template <class T>
inline float unit(T x) {
  return to_float(x);
}

template <class X, class T>
void noise_run(const float* table_row, const X* x0, const T* eps, int64_t count, T* xt) {
  float row[COLUMNS];
  __builtin_memcpy(row, table_row, sizeof row);
  fill(xt, count, [&](int64_t i) { return q_sample(row, unit(x0[i]), to_float(eps[i])); });
}

struct Walk {
  const Noise& op;
  const Order order;

  // Calls body(row, n, first, count) for every chunk of `length` elements, its eps there.
  template <class Body>
  void run(int64_t length, int threads, const Body& body) const {
    const int64_t size = numel(op.shape), all = op.shape.n * size;
    for_chunks(op.shape.n, size, length, all, threads,
               [&](int64_t n, int64_t first, int64_t count) {
                 if (op.generate_eps) {
                   float z[CHUNK];
                   normals(stream(op.random, n), op.shape, order, first, count, z);
                   store(view(op.eps, op.shape, n, order), first, count, z);
                 }
                 body(op.table.data + op.t.data[n * op.t.stride] * COLUMNS, n, first, count);
               });
  }
};

// Whether every operand is contiguous, those of X and T: then there is nothing to copy.
template <class X, class T>
bool run_direct(const Walk& walk, int threads) {
  const Noise& op = walk.op;
  if (op.flip || !is_run_of<X>(op.x0, op.shape, walk.order) ||
      !is_run_of<T>(op.eps, op.shape, walk.order) || !is_run_of<T>(op.xt, op.shape, walk.order))
    return false;
  walk.run(op.generate_eps ? chunk_length(walk.order, op.shape, true) : LONG_CHUNK, threads,
           [&](const float* row, int64_t n, int64_t first, int64_t count) {
             noise_run(row, run<X>(op.x0, n, first), run<T>(op.eps, n, first), count,
                       run<T>(op.xt, n, first));
           });
  return true;
}

void run_copied(const Walk& walk, int threads) {
  const Noise& op = walk.op;
  walk.run(chunk_length(walk.order, op.shape, op.generate_eps), threads,
           [&](const float* row, int64_t n, int64_t first, int64_t count) {
             float x0_buffer[CHUNK], eps_buffer[CHUNK], xt[CHUNK];
             const View images = view(op.x0, op.shape, n, walk.order, op.flip && op.flip[n]);
             const float* x0 = floats(images, first, count, x0_buffer);
             if (op.x0.dtype == DType::u8)
               for (int64_t i = 0; i < count; ++i) x0_buffer[i] = to_unit(x0_buffer[i]);
             const View eps = view(op.eps, op.shape, n, walk.order);
             noise_run(row, x0, floats(eps, first, count, eps_buffer), count, xt);
             store(view(op.xt, op.shape, n, walk.order), first, count, xt);
           });
}

// A drawn eps that nobody keeps: rounded to what x_t is stored in, as one that is stored.
template <class T>
void round_to(int64_t count, float* z) {
  for (int64_t i = 0; i < count; ++i) z[i] = to_float(from_float<T>(z[i]));
}

void run_unkept(const Noise& op, int threads) {
  const Order order = memory_order(op.xt, op.shape, true);
  const int64_t size = numel(op.shape);
  for_chunks(op.shape.n, size, chunk_length(order, op.shape, true), op.shape.n * size, threads,
             [&](int64_t n, int64_t first, int64_t count) {
               float x0_buffer[CHUNK], z[CHUNK], xt_buffer[CHUNK];
               normals(stream(op.random, n), op.shape, order, first, count, z);
               if (op.xt.dtype == DType::bf16) round_to<BF16>(count, z);
               if (op.xt.dtype == DType::f16) round_to<F16>(count, z);
               const View images = view(op.x0, op.shape, n, order, op.flip && op.flip[n]);
               const View out = view(op.xt, op.shape, n, order);
               const float* x0 = floats(images, first, count, x0_buffer);
               if (op.x0.dtype == DType::u8)
                 for (int64_t i = 0; i < count; ++i) x0_buffer[i] = to_unit(x0_buffer[i]);
               float* const xt = direct(out, first);
               noise_run(op.table.data + op.t.data[n * op.t.stride] * COLUMNS, x0, z, count,
                         xt ? xt : xt_buffer);
               if (!xt) store(out, first, count, xt_buffer);
             });
}

}  // namespace

void noise(const Noise& op, int threads) {
  if (op.generate_eps && !op.eps.data) return run_unkept(op, threads);
  const Walk walk{op, memory_order(op.xt, op.shape, op.generate_eps)};
  if (!run_direct<uint8_t, float>(walk, threads) && !run_direct<uint8_t, BF16>(walk, threads) &&
      !run_direct<float, float>(walk, threads) && !run_direct<BF16, BF16>(walk, threads))
    run_copied(walk, threads);
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
