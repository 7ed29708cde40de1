// noise: one thread a tile, or a Philox block of any layout; the formula is in math.h.
#include <type_traits>

#include "access.h"

namespace fastddpm {
namespace {

// The x0 of a tile. A mirrored one is read as two halves from the other end of their rows, which W
// is a multiple of 4 for.
template <class X0, int CHANNELS>
__device__ __forceinline__ void load_x0(const Noise& op, int64_t n, int64_t tile,
                                        float (&x0)[PLACES * CHANNELS]) {
  const X0* from = sample<X0>(op.x0, n);
  if (!op.flip || !op.flip[n]) {
    load_vector(from + tile * PLACES * CHANNELS, x0);
  } else {
#pragma unroll
    for (int half = 0; half < PLACES / 4; ++half) {
      const int64_t place = tile * PLACES + 4 * half;
      int64_t w;
      divide(place, op.shape.w, w);
      float four[4 * CHANNELS];
      load_vector(from + (place + op.shape.w - 4 - 2 * w) * CHANNELS, four);
#pragma unroll
      for (int k = 0; k < 4 * CHANNELS; ++k)
        x0[4 * half * CHANNELS + k] = four[(3 - k / CHANNELS) * CHANNELS + k % CHANNELS];
    }
  }
  if (std::is_same<X0, uint8_t>::value)
#pragma unroll
    for (int k = 0; k < PLACES * CHANNELS; ++k) x0[k] = to_unit(x0[k]);
}

// One thread per tile: x0 is read once, x_t and a generated eps that is kept are written once. E:
// storage of eps and x_t.
template <class X0, class E, int CHANNELS>
__global__ void __launch_bounds__(THREADS) noise_tiles(const Noise op) {
  constexpr int V = PLACES * CHANNELS;
  const int64_t tiles = numel(op.shape) / V;
  FASTDDPM_FOR_JOBS(n, tile, op.shape.n, tiles) {
    float row[COLUMNS], x0[V], eps[V];
    load_x0<X0, CHANNELS>(op, n, tile, x0);
    read_row(op.table, op.t, n, row);
    E* const stored = sample<E>(op.eps, n) + tile * V;
    if (op.generate_eps) {
      draw_tile<CHANNELS>(stream_of(op.random, n), numel(op.shape), tile, eps);
      // x_t is made of eps as it is stored: a target of the training loss has to match it.
#pragma unroll
      for (int k = 0; k < V; ++k) eps[k] = to_float(from_float<E>(eps[k]));
      if (op.eps.data) store_vector(stored, eps);
    } else {
      load_vector(stored, eps);
    }
#pragma unroll
    for (int k = 0; k < V; ++k) x0[k] = q_sample(row, x0[k], eps[k]);
    store_vector(sample<E>(op.xt, n) + tile * V, x0);
  }
}

// One thread per Philox block, in any layout and mix of types.
__global__ void __launch_bounds__(THREADS) noise_quads(const Noise op) {
  const int64_t quads = (numel(op.shape) + 3) / 4;
  FASTDDPM_FOR_JOBS(n, quad, op.shape.n, quads) {
    float row[COLUMNS], eps[4];
    read_row(op.table, op.t, n, row);
    if (op.generate_eps) normal4(stream_of(op.random, n), uint32_t(quad), eps);
    const bool flip = op.flip && op.flip[n];
    Cursor at(op.shape, n, 4 * quad);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * quad + i == numel(op.shape)) break;
      const float e = op.generate_eps ? rounded(op.xt.dtype, eps[i]) : at.load(op.eps);
      if (op.generate_eps && op.eps.data) at.store(op.eps, e);
      Cursor source = at;
      if (flip) source.w = op.shape.w - 1 - at.w;
      float x0 = source.load(op.x0);
      if (op.x0.dtype == DType::u8) x0 = to_unit(x0);
      at.store(op.xt, q_sample(row, x0, e));
      at.next(op.shape);
    }
  }
}

template <class X0, class E>
void launch_tiles(const Noise& op, int channels, void* stream) {
  const dim3 grid = job_grid(op.shape.n, numel(op.shape) / (PLACES * channels));
  if (channels == 1)
    FASTDDPM_LAUNCH((noise_tiles<X0, E, 1>), grid, THREADS, 0, stream, op);
  else
    FASTDDPM_LAUNCH((noise_tiles<X0, E, 3>), grid, THREADS, 0, stream, op);
}

}  // namespace

namespace cuda {

void noise(const Noise& op, void* stream) {
  if (is_empty(op.shape)) return;
  const DType x0 = op.x0.dtype, e = op.xt.dtype;
  const bool types = (!op.eps.data || op.eps.dtype == e) && (x0 == e || x0 == DType::u8);
  const bool rows = !op.flip || op.shape.w % 4 == 0;
  const int channels = types && rows ? tile_channels(op.shape, op.x0, op.eps, op.xt) : 0;
  if (channels == 0)
    FASTDDPM_LAUNCH(noise_quads, job_grid(op.shape.n, (numel(op.shape) + 3) / 4), THREADS, 0,
                    stream, op);
  else
    with_type(e, [&](auto type) {
      using E = decltype(type);
      if (x0 == DType::u8)
        launch_tiles<uint8_t, E>(op, channels, stream);
      else
        launch_tiles<E, E>(op, channels, stream);
    });
}

}  // namespace cuda
}  // namespace fastddpm
