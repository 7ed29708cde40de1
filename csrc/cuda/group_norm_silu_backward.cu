// With v = (x - centre) scale + shift, g = grad m silu'(v), m what dropout multiplied with, and
// xhat = (x - mean) rstd, per channel A = sum of g and B = sum of g xhat; with a = weight (1 +
// scale), P and Q the means over the group of a g and of a g xhat:
//
//   dx = rstd (a g - P - xhat Q) + grad_u,  dbefore = sum of dx,  dshift = A,
//   dscale = weight B + bias A,  dweight = sum over n of (1 + scale) B,  dbias = of (1 + scale) A
#include "group_norm.h"

namespace fastddpm {
namespace {

constexpr int ROWS = 8;  // of threads in group_norm_silu_backward_parameters, by 32 channels

// ---- the workspace, behind the chunks' statistics ----------------------------------------------

// (N, C, chunks, 2): the chunks' sums of g and of g (x - centre).
__device__ inline float* chunk_sums(const GroupNormSilu& op, int64_t chunks, int64_t n, int64_t c) {
  return op.workspace + op.shape.n * 3 * op.groups * chunks + (n * op.shape.c + c) * chunks * 2;
}

// (N, C, 2): A and B of a sample.
__device__ inline float* sample_sums(const GroupNormSilu& op, int64_t chunks, int64_t n,
                                     int64_t c) {
  return chunk_sums(op, chunks, op.shape.n, 0) + (n * op.shape.c + c) * 2;
}

// (N, c1, chunks): the chunks' sums of dx, where there is more than one.
__device__ inline float* chunk_before(const GroupNormSilu& op, int64_t chunks, int64_t n,
                                      int64_t c) {
  return sample_sums(op, chunks, op.shape.n, 0) + (n * op.c1 + c) * chunks;
}

// ---- the parts of a kernel ---------------------------------------------------------------------

// P and Q, before they are divided by the group's elements.
struct Projections {
  float p = 0.0f, q = 0.0f;

  // Makes of a channel's sums A and B and gives them to what comes after.
  __device__ void add(const GroupNormSilu& op, const Cut& cut, const Normal& normal, int64_t n,
                      int64_t c, float a, float around_centre) {
    const float b = normal.rstd * madd(-normal.rest, a, around_centre);
    const float gain = element(op.weight, 0, c, 1.0f) * (1.0f + element(op.scale, n, c, 0.0f));
    p = madd(gain, a, p);
    q = madd(gain, b, q);
    if (blockIdx.x == 0) {
      float* to = sample_sums(op, cut.chunks, n, c);
      to[0] = a, to[1] = b;
    }
  }
};

// Sums g and g (x - centre) by channel, over the places of this block: to scratch.totals where
// threads stand side by side; else the chunks' to the workspace, and those of whole channels to
// this thread's part of the projections.
template <class T, Walk WALK, bool RESIDENT>
__device__ __forceinline__ void channel_sums(const GroupNormSiluBackward& op, const Cut& cut,
                                             const Slab& slab, const Scratch& scratch,
                                             const void* kept_x, void* kept_grad,
                                             Projections& projections) {
  constexpr int V = WIDTH<T>;
  const GroupNormSilu& forward = op.forward;
  float sums[2][V];
  const auto clear = [&] {
#pragma unroll
    for (int k = 0; k < V; ++k) sums[0][k] = sums[1][k] = 0.0f;
  };
  clear();
  walk<WALK, RESIDENT>(cut, slab, [&](int channel, const auto& each) {
    const int64_t c = slab.c + channel;
    const Lines<WALK, V> lines(forward, cut, slab, scratch, channel);
    const Places<T, WALK> from = of_sources<T, WALK>(forward, forward.x, forward.x2, slab.n, c);
    const Places<T, WALK> grads(forward.shape, op.grad, slab.n, c);
    if (WALK == Walk::planes) clear();
    specialise(forward.dropout.threshold != 0, [&](auto drops) {
      const Mask<T, WALK> mask(forward, slab.n, c, drops);
      each(Unroll<drops ? 1 : 4>(), [&](auto place, auto index) {
        float x[V], grad[V];
        const uint32_t dropped = drops ? mask.dropped(place) : 0;
        grads.load(place, grad);
        if (RESIDENT)
          Kept<T>::load(kept_x, index, x);
        else
          from.load(place, x);
#pragma unroll
        for (int k = 0; drops && k < V; ++k) grad[k] *= dropped >> k & 1 ? 0.0f : 1.0f;
        if (RESIDENT) Kept<T>::store(kept_grad, index, grad);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          if (drops) grad[k] *= forward.dropout.keep_scale;
          const float d = x[k] - lines[k].centre;
          const float v = madd(d, lines[k].scale, lines[k].shift);
          const float g = forward.silu ? grad[k] * silu_gradient(v) : grad[k];
          sums[0][k] += g;
          sums[1][k] = madd(g, d, sums[1][k]);
        }
      });
    });
    if constexpr (WALK == Walk::planes) {
      float total[2] = {0.0f, 0.0f};
      for (int i = 0; i < 2; ++i) {
        for (int k = 0; k < V; ++k) total[i] += sums[i][k];
        total[i] = warp_sum(total[i]);
      }
      if (threadIdx.x % 32 != 0) return;
      if (RESIDENT) {
        const Normal normal = normal_of(cut, forward.eps, scratch, 0);
        projections.add(forward, cut, normal, slab.n, c, total[0], total[1]);
      } else {
        float* to = chunk_sums(forward, cut.chunks, slab.n, c) + 2 * blockIdx.x;
        to[0] = total[0], to[1] = total[1];
      }
    }
  });
  if constexpr (WALK == Walk::pixels)
    block_sums(cut, sums, 1, 1, cut.channels, scratch.partial, scratch.totals);
  if constexpr (WALK == Walk::pixels && !RESIDENT)
    for (int channel = int(threadIdx.x); channel < cut.channels; channel += int(blockDim.x)) {
      float* to = chunk_sums(forward, cut.chunks, slab.n, slab.c + channel) + 2 * blockIdx.x;
      to[0] = scratch.totals[channel], to[1] = scratch.totals[cut.channels + channel];
    }
}

// The sums of the chunks of every channel, as channel_sums leaves them for a whole slab.
template <Walk WALK>
__device__ void merge_sums(const GroupNormSilu& op, const Cut& cut, const Slab& slab,
                           const Scratch& scratch, Projections& projections) {
  for (int channel = int(threadIdx.x); channel < cut.channels; channel += int(blockDim.x)) {
    const float* from = chunk_sums(op, cut.chunks, slab.n, slab.c + channel);
    float a = 0.0f, b = 0.0f;
    for (int i = 0; i < cut.chunks; ++i) a += from[2 * i], b += from[2 * i + 1];
    if constexpr (WALK == Walk::pixels) {
      scratch.totals[channel] = a, scratch.totals[cut.channels + channel] = b;
    } else {
      const Normal normal = normal_of(cut, op.eps, scratch, 0);
      projections.add(op, cut, normal, slab.n, slab.c + channel, a, b);
    }
  }
  __syncthreads();
}

// Leaves for each group what a pixel's gradient needs, behind its statistics: offset and slope of
// dx = scale g + slope (x - centre) + offset.
template <Walk WALK>
__device__ void finish_sums(const GroupNormSilu& op, const Cut& cut, const Slab& slab,
                            const Scratch& scratch, const Projections& of_thread) {
  const int thread = int(threadIdx.x), lane = thread % 32;
  const auto write = [&](int group, const Normal& normal, float p, float q) {
    const float slope = -normal.rstd * normal.rstd * q / float(cut.elements);
    float* to = scratch.statistics + STATISTICS * group + 3;
    to[0] = madd(-slope, normal.rest, -normal.rstd * p / float(cut.elements));
    to[1] = slope;
  };
  if constexpr (WALK == Walk::pixels) {
    for (int group = thread / 32; group < cut.groups; group += int(blockDim.x) / 32) {
      const Normal normal = normal_of(cut, op.eps, scratch, group);
      Projections sum;
      for (int i = lane; i < cut.per_group; i += 32) {
        const int channel = group * cut.per_group + i;
        sum.add(op, cut, normal, slab.n, slab.c + channel, scratch.totals[channel],
                scratch.totals[cut.channels + channel]);
      }
      const float p = warp_sum(sum.p), q = warp_sum(sum.q);
      if (lane == 0) write(group, normal, p, q);
    }
  } else {
    const float values[2][1] = {{of_thread.p}, {of_thread.q}};
    block_sums(cut, values, 1, 1, 1, scratch.partial, scratch.totals);
    if (thread == 0)
      write(0, normal_of(cut, op.eps, scratch, 0), scratch.totals[0], scratch.totals[1]);
  }
  __syncthreads();
}

// DROPS: what is read is still to be dropped; gradients that are kept have their zeros already.
template <class T, Walk WALK, bool RESIDENT, bool DROPS>
__device__ __forceinline__ void apply_gradient(const GroupNormSiluBackward& op, const Cut& cut,
                                               const Slab& slab, const Scratch& scratch,
                                               const void* kept_x, const void* kept_grad) {
  constexpr int V = WIDTH<T>;
  const GroupNormSilu& forward = op.forward;
  const float keep_scale = forward.dropout.threshold ? forward.dropout.keep_scale : 1.0f;
  const auto before = [&](int64_t c) {
    return cut.chunks == 1 ? op.dbefore + slab.n * forward.c1 + c
                           : chunk_before(forward, cut.chunks, slab.n, c) + blockIdx.x;
  };
  float sums[1][V];
#pragma unroll
  for (int k = 0; k < V; ++k) sums[0][k] = 0.0f;
  walk<WALK, RESIDENT>(cut, slab, [&](int channel, const auto& each) {
    const int64_t c = slab.c + channel;
    const Lines<WALK, V> lines(forward, cut, slab, scratch, channel);
    float offset[Lines<WALK, V>::COUNT], slope[Lines<WALK, V>::COUNT];
#pragma unroll
    for (int k = 0; k < Lines<WALK, V>::COUNT; ++k) {
      const float* s = scratch.statistics + STATISTICS * ((channel + k) / cut.per_group);
      offset[k] = s[3], slope[k] = s[4];
    }
    const Places<T, WALK> from = of_sources<T, WALK>(forward, forward.x, forward.x2, slab.n, c);
    const Places<T, WALK> grads(forward.shape, op.grad, slab.n, c);
    const Places<T, WALK> grads_u(forward.shape, op.grad_u, slab.n, c);
    const Places<T, WALK> to = of_sources<T, WALK>(forward, op.dx, op.dx2, slab.n, c);
    const bool summed = op.dbefore && c < forward.c1;
    if (WALK == Walk::planes)
#pragma unroll
      for (int k = 0; k < V; ++k) sums[0][k] = 0.0f;
    const Mask<T, WALK> mask(forward, slab.n, c, DROPS);
    specialise(op.grad_u.data && c < forward.c1, [&](auto adds) {
      each(Unroll<DROPS               ? 1
                  : adds || !RESIDENT ? 2
                                      : 4>(),
           [&](auto place, auto index) {
             float x[V], grad[V];
             const uint32_t dropped = DROPS ? mask.dropped(place) : 0;
             if (RESIDENT) {
               Kept<T>::load(kept_x, index, x);
               Kept<T>::load(kept_grad, index, grad);
             } else {
               from.load(place, x);
               grads.load(place, grad);
             }
#pragma unroll
             for (int k = 0; k < V; ++k) {
               const int at = WALK == Walk::pixels ? k : 0;
               const float d = x[k] - lines[k].centre;
               const float v = madd(d, lines[k].scale, lines[k].shift);
               const float kept = grad[k] * (DROPS && dropped >> k & 1 ? 0.0f : keep_scale);
               const float g = forward.silu ? kept * silu_gradient(v) : kept;
               x[k] = madd(lines[k].scale, g, madd(slope[at], d, offset[at]));
             }
             if (adds) {
               grads_u.load(place, grad);
#pragma unroll
               for (int k = 0; k < V; ++k) x[k] += grad[k];
             }
#pragma unroll
             for (int k = 0; k < V; ++k) sums[0][k] += x[k];
             to.store(place, x);
           });
    });
    if (WALK == Walk::planes && summed) {
      float sum = 0.0f;
      for (int k = 0; k < V; ++k) sum += sums[0][k];
      sum = warp_sum(sum);
      if (threadIdx.x % 32 == 0) *before(c) = sum;
    }
  });
  if (WALK == Walk::pixels && op.dbefore) {
    block_sums(cut, sums, 1, 1, cut.channels, scratch.partial, scratch.totals);
    for (int channel = int(threadIdx.x); channel < cut.channels; channel += int(blockDim.x))
      if (slab.c + channel < forward.c1) *before(slab.c + channel) = scratch.totals[channel];
  }
}

// ---- the kernels -------------------------------------------------------------------------------

// The slabs of x and of grad fit shared memory: both are read once, dx is written once.
template <class T, Walk WALK>
__global__ void __launch_bounds__(FEW, 1)
    group_norm_silu_backward_resident(const GroupNormSiluBackward op, const Cut cut,
                                      int64_t kept_bytes) {
  FASTDDPM_DYNAMIC_SHARED(memory);
  const GroupNormSilu& forward = op.forward;
  const Scratch scratch(cut, reinterpret_cast<float*>(memory + 2 * kept_bytes));
  for (int64_t job = blockIdx.y; job < forward.shape.n * cut.slabs; job += gridDim.y) {
    const Slab slab(cut, job);
    Moments<WIDTH<T>> moments;
    Projections projections;
    read_slab<true, false, T, WALK>(forward, cut, slab, memory, moments);
    block_statistics(cut, moments, cut.places, scratch);
    make_lines<WALK>(forward, cut, slab, scratch);
    channel_sums<T, WALK, true>(op, cut, slab, scratch, memory, memory + kept_bytes, projections);
    finish_sums<WALK>(forward, cut, slab, scratch, projections);
    apply_gradient<T, WALK, true, false>(op, cut, slab, scratch, memory, memory + kept_bytes);
    __syncthreads();
  }
}

template <class T, Walk WALK>
__global__ void __launch_bounds__(FEW, 1)
    group_norm_silu_backward_sums(const GroupNormSiluBackward op, const Cut cut) {
  FASTDDPM_DYNAMIC_SHARED(memory);
  const GroupNormSilu& forward = op.forward;
  const Scratch scratch(cut, reinterpret_cast<float*>(memory));
  for (int64_t job = blockIdx.y; job < forward.shape.n * cut.slabs; job += gridDim.y) {
    const Slab slab(cut, job);
    Projections unused;
    merge_statistics(forward, cut, slab, scratch);
    make_lines<WALK>(forward, cut, slab, scratch);
    channel_sums<T, WALK, false>(op, cut, slab, scratch, nullptr, nullptr, unused);
    __syncthreads();
  }
}

// Dropping takes registers that the others need not pay for with fewer blocks.
template <class T, Walk WALK, bool DROPS>
__global__ void __launch_bounds__(DROPS ? MAX_COLUMNS : FEW, 1)
    group_norm_silu_backward_apply(const GroupNormSiluBackward op, const Cut cut) {
  FASTDDPM_DYNAMIC_SHARED(memory);
  const GroupNormSilu& forward = op.forward;
  const Scratch scratch(cut, reinterpret_cast<float*>(memory));
  for (int64_t job = blockIdx.y; job < forward.shape.n * cut.slabs; job += gridDim.y) {
    const Slab slab(cut, job);
    Projections projections;
    merge_statistics(forward, cut, slab, scratch);
    make_lines<WALK>(forward, cut, slab, scratch);
    merge_sums<WALK>(forward, cut, slab, scratch, projections);
    finish_sums<WALK>(forward, cut, slab, scratch, projections);
    apply_gradient<T, WALK, false, DROPS>(op, cut, slab, scratch, nullptr, nullptr);
    __syncthreads();
  }
}

// The gradients of the parameters, from A and B, and dbefore of its chunks: 32 channels a block,
// each row of threads takes every ROWS-th sample. Without samples or pixels they are 0.
__global__ void __launch_bounds__(32 * ROWS)
    group_norm_silu_backward_parameters(const GroupNormSiluBackward op, int64_t chunks) {
  __shared__ double partial[2][ROWS][32];  // a batch may be long
  const GroupNormSilu& f = op.forward;
  const int lane = int(threadIdx.x) % 32, row = int(threadIdx.x) / 32;
  const int64_t c = blockIdx.x * int64_t(32) + lane;
  const bool pixels = f.shape.h * f.shape.w > 0;
  double weight = 0.0, bias = 0.0;
  if (c < f.shape.c) {
    for (int64_t n = row; n < f.shape.n; n += ROWS) {
      const int64_t at = n * f.shape.c + c;
      const float* sums = sample_sums(f, chunks, n, c);
      const float a = pixels ? sums[0] : 0.0f, b = pixels ? sums[1] : 0.0f;
      const float gain = 1.0f + element(f.scale, n, c, 0.0f);
      weight += double(gain * b);
      bias += double(gain * a);
      if (op.dshift) op.dshift[at] = a;
      if (op.dscale)
        op.dscale[at] = madd(element(f.weight, 0, c, 1.0f), b, element(f.bias, 0, c, 0.0f) * a);
      if (op.dbefore && c < f.c1 && (chunks > 1 || !pixels)) {
        float sum = 0.0f;
        for (int64_t i = 0; pixels && i < chunks; ++i) sum += chunk_before(f, chunks, n, c)[i];
        op.dbefore[n * f.c1 + c] = sum;
      }
    }
  }
  partial[0][row][lane] = weight;
  partial[1][row][lane] = bias;
  __syncthreads();
  if (row > 1 || c >= f.shape.c) return;
  double sum = 0.0;
  for (int i = 0; i < ROWS; ++i) sum += partial[row][i][lane];
  float* to = row == 0 ? op.dweight : op.dbias;
  if (to) to[c] = float(sum);
}

}  // namespace

namespace cuda {

void group_norm_silu_backward(const GroupNormSiluBackward& op, void* stream) {
  const GroupNormSilu& forward = op.forward;
  check_groups(forward);
  int64_t chunks = 1;
  if (!is_empty(forward.shape)) {
    const Cut cut =
        make_cut(forward, 2, {forward.x, forward.x2, op.grad, op.grad_u, op.dx, op.dx2});
    const dim3 grid = slab_grid(forward.shape, cut);
    const int64_t bytes = shared_bytes(cut, 2, forward.x);
    chunks = cut.chunks;
    with_cut(cut, forward.x, [&](auto type, auto walk) {
      using T = decltype(type);
      constexpr Walk WALK = decltype(walk)::value;
      if (cut.resident) {
        FASTDDPM_LAUNCH((group_norm_silu_backward_resident<T, WALK>), grid, cut.threads, bytes,
                        stream, op, cut, slab_bytes(cut, forward.x));
      } else {
        FASTDDPM_LAUNCH((group_norm_statistics<T, WALK, false>), grid, cut.threads, bytes, stream,
                        forward, cut);
        FASTDDPM_LAUNCH((group_norm_silu_backward_sums<T, WALK>), grid, cut.threads, bytes, stream,
                        op, cut);
        if (forward.dropout.threshold)
          FASTDDPM_LAUNCH((group_norm_silu_backward_apply<T, WALK, true>), grid, cut.threads, bytes,
                          stream, op, cut);
        else
          FASTDDPM_LAUNCH((group_norm_silu_backward_apply<T, WALK, false>), grid, cut.threads,
                          bytes, stream, op, cut);
      }
    });
  }
  if (op.dweight || op.dbias || op.dscale || op.dshift || op.dbefore)
    FASTDDPM_LAUNCH(group_norm_silu_backward_parameters, dim3(unsigned(up(forward.shape.c, 32))),
                    32 * ROWS, 0, stream, op, chunks);
}

}  // namespace cuda
}  // namespace fastddpm
