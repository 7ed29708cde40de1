// posterior_step: one thread a tile, or a Philox block of any layout; the formula is in math.h.
#include "access.h"

namespace fastddpm {
namespace {

// One thread per tile: every given tensor is read once and x_{t-1} written once. X: storage of x_t,
// z and x_{t-1}; M: of the model's output and log variance.
template <class X, class M, int CHANNELS>
__global__ void __launch_bounds__(THREADS) posterior_step_tiles(const PosteriorStep op) {
  constexpr int V = PLACES * CHANNELS;
  const int64_t tiles = numel(op.shape) / V;
  FASTDDPM_FOR_JOBS(n, tile, op.shape.n, tiles) {
    float row[COLUMNS], x[V], output[V];
    load_vector(sample<X>(op.xt, n) + tile * V, x);
    load_vector(sample<M>(op.model_output, n) + tile * V, output);
    read_row(op.table, op.t, n, row);
#pragma unroll
    for (int k = 0; k < V; ++k)
      x[k] = posterior_mean(row, x[k], output[k], op.prediction, clip_bound(op.clip));
    if (row[SIGMA] > 0.0f) {
      float z[V];
      if (op.z.data)
        load_vector(sample<X>(op.z, n) + tile * V, z);
      else
        draw_tile<CHANNELS>(stream_of(op.random, n), numel(op.shape), tile, z);
      if (op.log_variance.data) {
        load_vector(sample<M>(op.log_variance, n) + tile * V, output);
        const Deviation sigma = deviation(row, op.learned_range);
#pragma unroll
        for (int k = 0; k < V; ++k) x[k] = madd(sigma.of(output[k]), z[k], x[k]);
      } else {
#pragma unroll
        for (int k = 0; k < V; ++k) x[k] = madd(row[SIGMA], z[k], x[k]);
      }
    }
    store_vector(sample<X>(op.out, n) + tile * V, x);
  }
}

// One thread per Philox block, in any layout and mix of types.
__global__ void __launch_bounds__(THREADS) posterior_step_quads(const PosteriorStep op) {
  const int64_t quads = (numel(op.shape) + 3) / 4;
  FASTDDPM_FOR_JOBS(n, quad, op.shape.n, quads) {
    float row[COLUMNS], z[4];
    read_row(op.table, op.t, n, row);
    const bool noisy = row[SIGMA] > 0.0f;
    if (noisy && !op.z.data) normal4(stream_of(op.random, n), uint32_t(quad), z);
    Cursor at(op.shape, n, 4 * quad);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * quad + i == numel(op.shape)) break;
      float x = posterior_mean(row, at.load(op.xt), at.load(op.model_output), op.prediction,
                               clip_bound(op.clip));
      if (noisy) {
        float sigma = row[SIGMA];
        if (op.log_variance.data)
          sigma = deviation(row, op.learned_range).of(at.load(op.log_variance));
        x = madd(sigma, op.z.data ? at.load(op.z) : z[i], x);
      }
      at.store(op.out, x);
      at.next(op.shape);
    }
  }
}

template <class X, class M>
void launch_tiles(const PosteriorStep& op, int channels, void* stream) {
  const dim3 grid = job_grid(op.shape.n, numel(op.shape) / (PLACES * channels));
  if (channels == 1)
    FASTDDPM_LAUNCH((posterior_step_tiles<X, M, 1>), grid, THREADS, 0, stream, op);
  else
    FASTDDPM_LAUNCH((posterior_step_tiles<X, M, 3>), grid, THREADS, 0, stream, op);
}

}  // namespace

namespace cuda {

void posterior_step(const PosteriorStep& op, void* stream) {
  if (is_empty(op.shape)) return;
  const DType x = op.xt.dtype, m = op.model_output.dtype;
  const bool types = op.out.dtype == x && (!op.z.data || op.z.dtype == x) &&
                     (!op.log_variance.data || op.log_variance.dtype == m) &&
                     (x == m || x == DType::f32);
  const int channels =
      types ? tile_channels(op.shape, op.xt, op.model_output, op.z, op.log_variance, op.out) : 0;
  if (channels == 0)
    FASTDDPM_LAUNCH(posterior_step_quads, job_grid(op.shape.n, (numel(op.shape) + 3) / 4), THREADS,
                    0, stream, op);
  else
    with_type(m, [&](auto type) {
      using M = decltype(type);
      if (x == m)
        launch_tiles<M, M>(op, channels, stream);
      else
        launch_tiles<float, M>(op, channels, stream);
    });
}

}  // namespace cuda
}  // namespace fastddpm
