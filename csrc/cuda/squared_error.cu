// squared_error and its gradient. A block sums the squares of a chunk of one sample in float64;
// where a sample has several, a second kernel adds their sums in order.
#include "block_sum.h"

namespace fastddpm {
namespace {

__device__ void write_sum(const SquaredError& op, int64_t n, int64_t chunk, int64_t chunks,
                          double sum) {
  if (threadIdx.x != 0) return;
  if (op.workspace)
    op.workspace[n * chunks + chunk] = sum;
  else
    op.out[n] = float(sum / double(numel(op.shape)));
}

// Samples of both that are rows of vectors of one type, in the same order.
template <class T>
__global__ void __launch_bounds__(THREADS)
    squared_error_vectors(const SquaredError op, int64_t chunks) {
  constexpr int V = WIDTH<T>;
  const int64_t vectors = numel(op.shape) / V, per_chunk = SQUARED_ERROR_CHUNK / V;
  for (int64_t job = blockIdx.x; job < op.shape.n * chunks; job += gridDim.x) {
    int64_t chunk;
    const int64_t n = divide(job, chunks, chunk), end = (chunk + 1) * per_chunk;
    double sum = 0.0;
    for (int64_t i = chunk * per_chunk + threadIdx.x; i < (end < vectors ? end : vectors);
         i += THREADS) {
      float p[V], t[V];
      load_constant(sample<T>(op.prediction, n) + i * V, p);
      load_constant(sample<T>(op.target, n) + i * V, t);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const double d = double(p[k] - t[k]);
        sum += d * d;
      }
    }
    write_sum(op, n, chunk, chunks, block_sum(sum));
  }
}

// Any layout and mix of types.
__global__ void __launch_bounds__(THREADS)
    squared_error_elements(const SquaredError op, int64_t chunks) {
  const int64_t elements = numel(op.shape);
  for (int64_t job = blockIdx.x; job < op.shape.n * chunks; job += gridDim.x) {
    int64_t chunk;
    const int64_t n = divide(job, chunks, chunk), end = (chunk + 1) * SQUARED_ERROR_CHUNK;
    double sum = 0.0;
    for (int64_t i = chunk * SQUARED_ERROR_CHUNK + threadIdx.x;
         i < (end < elements ? end : elements); i += THREADS) {
      const Cursor at(op.shape, n, i);
      const double d = double(at.load(op.prediction) - at.load(op.target));
      sum += d * d;
    }
    write_sum(op, n, chunk, chunks, block_sum(sum));
  }
}

// A warp adds the sums of one sample.
__global__ void __launch_bounds__(THREADS)
    squared_error_sums(const SquaredError op, int64_t chunks) {
  const int64_t n = int64_t(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
  if (n >= op.shape.n) return;
  double sum = 0.0;
  for (int64_t i = threadIdx.x % 32; i < chunks; i += 32) sum += op.workspace[n * chunks + i];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (threadIdx.x % 32 == 0) op.out[n] = float(sum / double(numel(op.shape)));
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    squared_error_backward_vectors(const SquaredErrorBackward op, float scale) {
  constexpr int V = WIDTH<T>;
  FASTDDPM_FOR_JOBS(n, vector, op.shape.n, numel(op.shape) / V) {
    float p[V], t[V];
    load_constant(sample<T>(op.prediction, n) + vector * V, p);
    load_constant(sample<T>(op.target, n) + vector * V, t);
    const float slope = element(op.grad, 0, n, 0.0f) * scale;
#pragma unroll
    for (int k = 0; k < V; ++k) p[k] = slope * (p[k] - t[k]);
    store_vector(sample<T>(op.dprediction, n) + vector * V, p);
  }
}

__global__ void __launch_bounds__(THREADS)
    squared_error_backward_elements(const SquaredErrorBackward op, float scale) {
  FASTDDPM_FOR_JOBS(n, job, op.shape.n, numel(op.shape)) {
    const Cursor at(op.shape, n, job);
    const float slope = element(op.grad, 0, n, 0.0f) * scale;
    at.store(op.dprediction, slope * (at.load(op.prediction) - at.load(op.target)));
  }
}

// Whether the samples are runs of whole vectors of one type in all of them, in the same order.
template <class... Tensors>
bool in_vectors(const Shape& s, const Tensor& first, const Tensors&... tensors) {
  const auto is_run = [&](const Tensor& x, bool nhwc) {
    const int64_t c = nhwc ? 1 : s.h * s.w, w = nhwc ? s.c : 1;
    return (s.c == 1 || x.stride[1] == c) && (s.w == 1 || x.stride[3] == w) &&
           (s.h == 1 || x.stride[2] == s.w * w);
  };
  const auto fits = [&](const Tensor& x) { return x.dtype == first.dtype && aligned(x, s.n, 16); };
  const auto all = [&](bool nhwc) { return is_run(first, nhwc) && (is_run(tensors, nhwc) && ...); };
  return numel(s) * size_of(first.dtype) % 16 == 0 && fits(first) && (fits(tensors) && ...) &&
         (all(false) || all(true));
}

dim3 grid_of(int64_t blocks) { return dim3(unsigned(blocks < 0x7fffffff ? blocks : 0x7fffffff)); }

}  // namespace

namespace cuda {

void squared_error(const SquaredError& op, void* stream) {
  const Shape& s = op.shape;
  if (s.n == 0) return;
  const int64_t chunks = numel(s) ? squared_error_chunks(numel(s)) : 1;
  if (in_vectors(s, op.prediction, op.target))
    with_type(op.prediction.dtype, [&](auto type) {
      using T = decltype(type);
      FASTDDPM_LAUNCH(squared_error_vectors<T>, grid_of(s.n * chunks), THREADS, 0, stream, op,
                      chunks);
    });
  else
    FASTDDPM_LAUNCH(squared_error_elements, grid_of(s.n * chunks), THREADS, 0, stream, op, chunks);
  if (op.workspace)
    FASTDDPM_LAUNCH(squared_error_sums, grid_of((s.n + THREADS / 32 - 1) / (THREADS / 32)), THREADS,
                    0, stream, op, chunks);
}

void squared_error_backward(const SquaredErrorBackward& op, void* stream) {
  const Shape& s = op.shape;
  if (is_empty(s)) return;
  const float scale = float(2.0 / double(numel(s)));
  if (in_vectors(s, op.dprediction, op.prediction, op.target))
    with_type(op.dprediction.dtype, [&](auto type) {
      using T = decltype(type);
      FASTDDPM_LAUNCH(squared_error_backward_vectors<T>, job_grid(s.n, numel(s) / WIDTH<T>),
                      THREADS, 0, stream, op, scale);
    });
  else
    FASTDDPM_LAUNCH(squared_error_backward_elements, job_grid(s.n, numel(s)), THREADS, 0, stream,
                    op, scale);
}

}  // namespace cuda
}  // namespace fastddpm
