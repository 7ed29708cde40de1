// discretized_log_likelihood: one thread an element or a tile; the formula is in math.h.
#include "access.h"

namespace fastddpm {
namespace {

// One thread per 16 bytes of the result, in float64: a likelihood is taken once per image, not once
// per step. The order of elements does not matter if it is the same in all tensors.
template <class T>
__global__ void __launch_bounds__(THREADS)
    discretized_log_likelihood_vectors(const DiscretizedLogLikelihood op, int64_t vectors) {
  constexpr int V = 16 / sizeof(T);
  FASTDDPM_FOR_JOBS(n, vector, 1, vectors) {
    float x[V], mean[V], log_scale[V];
    load_vector(static_cast<const T*>(op.x.data) + vector * V, x);
    load_vector(static_cast<const T*>(op.mean.data) + vector * V, mean);
    load_vector(static_cast<const T*>(op.log_scale.data) + vector * V, log_scale);
#pragma unroll 1
    for (int k = 0; k < V; ++k) x[k] = float(log_bin_mass(x[k], mean[k], log_scale[k]));
    store_vector(static_cast<T*>(op.out.data) + vector * V, x);
  }
}

// One thread per 4 elements, in any layout and mix of types.
__global__ void __launch_bounds__(THREADS, 1)
    discretized_log_likelihood_quads(const DiscretizedLogLikelihood op) {
  const int64_t quads = (numel(op.shape) + 3) / 4;
  FASTDDPM_FOR_JOBS(n, quad, op.shape.n, quads) {
    Cursor at(op.shape, n, 4 * quad);
    for (int i = 0; i < 4; ++i) {
      if (4 * quad + i == numel(op.shape)) break;
      at.store(op.out, float(log_bin_mass(at.load(op.x), at.load(op.mean), at.load(op.log_scale))));
      at.next(op.shape);
    }
  }
}

// Whether x has the type and strides of `like`, which fills its memory, and starts at a vector.
bool matches(const Shape& s, const Tensor& x, const Tensor& like) {
  const int64_t size[4] = {s.n, s.c, s.h, s.w};
  bool same = x.dtype == like.dtype && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  int64_t last = 0;
  for (int i = 0; i < 4; ++i) {
    same = same && (size[i] == 1 || (x.stride[i] == like.stride[i] && x.stride[i] > 0));
    last += (size[i] - 1) * x.stride[i];
  }
  return same && last + 1 == s.n * numel(s);
}

}  // namespace

namespace cuda {

void discretized_log_likelihood(const DiscretizedLogLikelihood& op, void* stream) {
  if (is_empty(op.shape)) return;
  const int64_t elements = op.shape.n * numel(op.shape), width = 16 / size_of(op.out.dtype);
  const bool flat = elements % width == 0 && matches(op.shape, op.x, op.out) &&
                    matches(op.shape, op.mean, op.out) && matches(op.shape, op.log_scale, op.out) &&
                    matches(op.shape, op.out, op.out);
  if (flat)
    with_type(op.out.dtype, [&](auto type) {
      using T = decltype(type);
      FASTDDPM_LAUNCH(discretized_log_likelihood_vectors<T>, job_grid(1, elements / width), THREADS,
                      0, stream, op, elements / width);
    });
  else
    FASTDDPM_LAUNCH(discretized_log_likelihood_quads,
                    job_grid(op.shape.n, (numel(op.shape) + 3) / 4), THREADS, 0, stream, op);
}

}  // namespace cuda
}  // namespace fastddpm
