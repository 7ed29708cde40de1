// residual_sum: u = x + residual + before, one walk over memory; in NHWC a thread keeps its
// channels for a strip of pixels, so that their part of `before` is read once.
#include "access.h"

namespace fastddpm {
namespace {

constexpr int STRIP = 8;  // pixels of a thread

// u of one vector. The sum of three has the order of the reference.
template <class T, bool RESIDUAL>
__device__ __forceinline__ void add(const T* x, const T* residual, T* u,
                                    const float (&before)[WIDTH<T>]) {
  float values[WIDTH<T>], more[WIDTH<T>];
  load_constant(x, values);
  if (RESIDUAL) load_constant(residual, more);
#pragma unroll
  for (int k = 0; k < WIDTH<T>; ++k) {
    values[k] += before[k];
    if (RESIDUAL) values[k] += more[k];
  }
  store_vector(u, values);
}

// NHWC: a thread takes one vector of channels of STRIP neighbouring pixels.
template <class T, bool RESIDUAL>
__global__ void __launch_bounds__(THREADS) residual_sum_pixels(const ResidualSum op) {
  constexpr int V = WIDTH<T>;
  const int64_t columns = op.shape.c / V, pixels = op.shape.h * op.shape.w;
  const int64_t strips = (pixels + STRIP - 1) / STRIP;
  FASTDDPM_FOR_JOBS(n, job, op.shape.n, strips * columns) {
    int64_t column;
    const int64_t first = divide(job, columns, column) * STRIP;
    float before[V];
#pragma unroll
    for (int k = 0; k < V; ++k) before[k] = element(op.before, n, column * V + k, 0.0f);
    const T* const x = sample<T>(op.x, n) + column * V;
    const T* const residual = RESIDUAL ? sample<T>(op.residual, n) + column * V : nullptr;
    T* const u = sample<T>(op.u, n) + column * V;
    const int64_t of_x = pixel_step(op.shape, op.x), of_u = pixel_step(op.shape, op.u);
    const int64_t of_residual = RESIDUAL ? pixel_step(op.shape, op.residual) : 0;
#pragma unroll 4
    for (int i = 0; i < STRIP; ++i) {
      const int64_t pixel = first + i;
      if (pixel < pixels)
        add<T, RESIDUAL>(x + pixel * of_x, residual + pixel * of_residual, u + pixel * of_u,
                         before);
    }
  }
}

// Whole vectors lie in one plane: a thread takes one.
template <class T, bool RESIDUAL>
__global__ void __launch_bounds__(THREADS) residual_sum_planes(const ResidualSum op) {
  constexpr int V = WIDTH<T>;
  const int64_t vectors = op.shape.h * op.shape.w / V;
  FASTDDPM_FOR_JOBS(n, job, op.shape.n, op.shape.c * vectors) {
    int64_t place;
    const int64_t c = divide(job, vectors, place);
    const float value = element(op.before, n, c, 0.0f);
    float before[V];
#pragma unroll
    for (int k = 0; k < V; ++k) before[k] = value;
    const auto at = [&](const Tensor& t) { return sample<T>(t, n) + c * t.stride[1] + place * V; };
    add<T, RESIDUAL>(at(op.x), RESIDUAL ? at(op.residual) : nullptr, at(op.u), before);
  }
}

// An element of any layout and mix of types.
__global__ void __launch_bounds__(THREADS) residual_sum_elements(const ResidualSum op) {
  FASTDDPM_FOR_JOBS(n, job, op.shape.n, numel(op.shape)) {
    const Cursor at(op.shape, n, job);
    float u = at.load(op.x) + element(op.before, n, at.c, 0.0f);
    if (op.residual.data) u += at.load(op.residual);
    at.store(op.u, u);
  }
}

template <class T, bool RESIDUAL>
void launch_vectors(const ResidualSum& op, bool pixels, void* stream) {
  const Shape& s = op.shape;
  if (pixels) {
    const int64_t strips = (s.h * s.w + STRIP - 1) / STRIP;
    FASTDDPM_LAUNCH((residual_sum_pixels<T, RESIDUAL>), job_grid(s.n, strips * (s.c / WIDTH<T>)),
                    THREADS, 0, stream, op);
  } else {
    FASTDDPM_LAUNCH((residual_sum_planes<T, RESIDUAL>), job_grid(s.n, s.c * (s.h * s.w / WIDTH<T>)),
                    THREADS, 0, stream, op);
  }
}

}  // namespace

namespace cuda {

void residual_sum(const ResidualSum& op, void* stream) {
  const Shape& s = op.shape;
  if (is_empty(s)) return;
  const int64_t vector = 16 / size_of(op.x.dtype);
  bool same = true, pixels = s.c % vector == 0, planes = s.h * s.w % vector == 0;
  for (const Tensor& x : {op.x, op.residual, op.u}) {
    if (!x.data) continue;
    same = same && x.dtype == op.x.dtype;
    pixels = pixels && pixels_in(s, x) && pixels_aligned(s, x);
    planes = planes && planes_in(s, x);
  }
  if (!same || (!pixels && !planes)) {
    FASTDDPM_LAUNCH(residual_sum_elements, job_grid(s.n, numel(s)), THREADS, 0, stream, op);
    return;
  }
  with_type(op.x.dtype, [&](auto type) {
    using T = decltype(type);
    if (op.residual.data)
      launch_vectors<T, true>(op, pixels, stream);
    else
      launch_vectors<T, false>(op, pixels, stream);
  });
}

}  // namespace cuda
}  // namespace fastddpm
