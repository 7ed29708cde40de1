// With v = (x - centre) scale + shift, g = grad silu'(v), xhat = (x - mean) rstd, per channel
// A = sum of g and B = sum of g xhat; with a = weight (1 + scale), P and Q the means over the group
// of a g and of a g xhat:
//
//   dx = rstd (a g - P - xhat Q),  dshift = A,  dscale = weight B + bias A,
//   dweight = sum over n of (1 + scale) B,  dbias = sum over n of (1 + scale) A
#include "group_norm.h"

namespace fastddpm {
namespace {

constexpr int ROWS = 8;  // of threads in sum_samples, by 32 channels

// Per channel of the slab, in its scratch.totals: A, then from `channels` on the sum of g (x -
// centre), of the places of this block.
template <class T, Walk WALK, bool RESIDENT>
__device__ __forceinline__ void channel_sums(const GroupNormSiluBackward& op, const Cut& cut,
                                             const Slab& slab, const Scratch& scratch,
                                             const void* kept_x, void* kept_grad) {
  constexpr int V = WIDTH<T>;
  const GroupNormSilu& forward = op.forward;
  Lines<WALK, V> lines;
  float sums[2][V];
  const auto clear = [&] {
#pragma unroll
    for (int k = 0; k < V; ++k) sums[0][k] = sums[1][k] = 0.0f;
  };
  clear();
  walk<WALK>(
      cut, slab,
      [&](int channel) {
        lines.read(scratch, channel);
        if (WALK == Walk::planes) clear();
      },
      [&](int channel, int64_t place, int64_t index) {
        float x[V], grad[V];
        Vectors<T, WALK>::load(forward.shape, op.grad, slab, channel, place, grad);
        if (RESIDENT) {
          Vectors<T, WALK>::recall(kept_x, index, x);
          Vectors<T, WALK>::keep(kept_grad, index, grad);
        } else {
          Vectors<T, WALK>::load(forward.shape, forward.x, slab, channel, place, x);
        }
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const float u = x[k] - lines[k].centre;
          const float v = madd(u, lines[k].scale, lines[k].shift);
          const float g = forward.silu ? grad[k] * silu_gradient(v) : grad[k];
          sums[0][k] += g;
          sums[1][k] = madd(g, u, sums[1][k]);
        }
      },
      [&](int channel) {
        if constexpr (WALK == Walk::planes) {
          for (int i = 0; i < 2; ++i) {
            float sum = 0.0f;
            for (int k = 0; k < V; ++k) sum += sums[i][k];
            sum = warp_sum(sum);
            if (threadIdx.x % 32 == 0) scratch.totals[i * cut.channels + channel] = sum;
          }
        }
      });
  if (WALK == Walk::pixels)
    block_sums(cut, sums, 1, 1, cut.channels, scratch.partial, scratch.totals);
  else
    __syncthreads();
}

// (N, C, 2) sums of the samples, behind the statistics and the chunks' sums in the workspace.
__device__ inline float* sample_sums(const GroupNormSilu& op, int64_t chunks) {
  return op.workspace + op.shape.n * (3 * op.groups * chunks + 2 * op.shape.c * chunks);
}

// (N, C, chunks, 2), of the chunks, behind their statistics.
__device__ inline float* chunk_sums(const GroupNormSilu& op, const Cut& cut, int64_t n, int64_t c) {
  return op.workspace + op.shape.n * 3 * op.groups * cut.chunks +
         (n * op.shape.c + c) * cut.chunks * 2;
}

// Makes of the sums of g and of g (x - centre) in scratch.totals the sums A and B, gives those of
// the sample to what comes after, and leaves for the group what a pixel's gradient needs:
// scratch.statistics = (offset, slope) of dx = scale g + slope (x - centre) + offset.
__device__ inline void finish_sums(const GroupNormSilu& op, const Cut& cut, const Slab& slab,
                                   const Scratch& scratch) {
  const int lane = int(threadIdx.x) % 32;
  for (int group = int(threadIdx.x) / 32; group < cut.groups; group += int(blockDim.x) / 32) {
    const Normal normal = normal_of(cut, op.eps, scratch, group);
    float p = 0.0f, q = 0.0f;
    for (int i = lane; i < cut.per_group; i += 32) {
      const int channel = group * cut.per_group + i;
      const int64_t c = slab.c + channel;
      const float a = scratch.totals[channel];
      const float b = normal.rstd * madd(-normal.rest, a, scratch.totals[cut.channels + channel]);
      const float gain =
          element(op.weight, 0, c, 1.0f) * (1.0f + element(op.scale, slab.n, c, 0.0f));
      p = madd(gain, a, p);
      q = madd(gain, b, q);
      if (blockIdx.x == 0) {
        float* to = sample_sums(op, cut.chunks) + 2 * (slab.n * op.shape.c + c);
        to[0] = a, to[1] = b;
      }
    }
    p = warp_sum(p), q = warp_sum(q);
    __syncwarp();  // all lanes have read the statistics
    if (lane == 0) {
      const float slope = -normal.rstd * normal.rstd * q / float(cut.elements);
      scratch.statistics[3 * group] =
          madd(-slope, normal.rest, -normal.rstd * p / float(cut.elements));
      scratch.statistics[3 * group + 1] = slope;
    }
  }
  __syncthreads();
}

template <class T, Walk WALK, bool RESIDENT>
__device__ __forceinline__ void apply_gradient(const GroupNormSiluBackward& op, const Cut& cut,
                                               const Slab& slab, const Scratch& scratch,
                                               const void* kept_x, const void* kept_grad) {
  constexpr int V = WIDTH<T>;
  const GroupNormSilu& forward = op.forward;
  Lines<WALK, V> lines;
  float offset[Lines<WALK, V>::COUNT], slope[Lines<WALK, V>::COUNT];
  walk<WALK>(
      cut, slab,
      [&](int channel) {
        lines.read(scratch, channel);
#pragma unroll
        for (int k = 0; k < Lines<WALK, V>::COUNT; ++k) {
          const float* s = scratch.statistics + 3 * ((channel + k) / cut.per_group);
          offset[k] = s[0], slope[k] = s[1];
        }
      },
      [&](int channel, int64_t place, int64_t index) {
        float x[V], grad[V];
        if (RESIDENT) {
          Vectors<T, WALK>::recall(kept_x, index, x);
          Vectors<T, WALK>::recall(kept_grad, index, grad);
        } else {
          Vectors<T, WALK>::load(forward.shape, forward.x, slab, channel, place, x);
          Vectors<T, WALK>::load(forward.shape, op.grad, slab, channel, place, grad);
        }
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const int at = WALK == Walk::pixels ? k : 0;
          const float u = x[k] - lines[k].centre;
          const float v = madd(u, lines[k].scale, lines[k].shift);
          const float g = forward.silu ? grad[k] * silu_gradient(v) : grad[k];
          x[k] = madd(lines[k].scale, g, madd(slope[at], u, offset[at]));
        }
        Vectors<T, WALK>::store(forward.shape, op.dx, slab, channel, place, x);
      },
      Nothing());
}

// The slabs of x and of grad fit shared memory: both are read once, dx is written once.
template <class T, Walk WALK>
__global__ void __launch_bounds__(MAX_THREADS, FEW_BLOCKS)
    group_norm_silu_backward_resident(const GroupNormSiluBackward op, const Cut cut,
                                      int64_t kept_bytes) {
  FASTDDPM_DYNAMIC_SHARED(memory);
  constexpr int V = WIDTH<T>;
  const GroupNormSilu& forward = op.forward;
  const Scratch scratch(cut, reinterpret_cast<float*>(memory + 2 * kept_bytes));
  for (int64_t job = blockIdx.y; job < forward.shape.n * cut.slabs; job += gridDim.y) {
    const Slab slab(cut, job);
    Moments<V> moments;
    walk<WALK>(
        cut, slab, Nothing(),
        [&](int channel, int64_t place, int64_t index) {
          float x[V];
          Vectors<T, WALK>::load(forward.shape, forward.x, slab, channel, place, x);
          Vectors<T, WALK>::keep(memory, index, x);
          moments.add(x);
        },
        Nothing());
    block_statistics(cut, moments, cut.places, scratch);
    make_lines(forward, cut, slab, scratch);
    channel_sums<T, WALK, true>(op, cut, slab, scratch, memory, memory + kept_bytes);
    finish_sums(forward, cut, slab, scratch);
    apply_gradient<T, WALK, true>(op, cut, slab, scratch, memory, memory + kept_bytes);
    __syncthreads();
  }
}

template <class T, Walk WALK>
__global__ void __launch_bounds__(MAX_THREADS, FEW_BLOCKS)
    group_norm_silu_backward_sums(const GroupNormSiluBackward op, const Cut cut) {
  FASTDDPM_DYNAMIC_SHARED(memory);
  const GroupNormSilu& forward = op.forward;
  const Scratch scratch(cut, reinterpret_cast<float*>(memory));
  for (int64_t job = blockIdx.y; job < forward.shape.n * cut.slabs; job += gridDim.y) {
    const Slab slab(cut, job);
    merge_statistics(forward, cut, slab, scratch);
    make_lines(forward, cut, slab, scratch);
    channel_sums<T, WALK, false>(op, cut, slab, scratch, nullptr, nullptr);
    for (int channel = int(threadIdx.x); channel < cut.channels; channel += int(blockDim.x)) {
      float* to = chunk_sums(forward, cut, slab.n, slab.c + channel) + 2 * blockIdx.x;
      to[0] = scratch.totals[channel], to[1] = scratch.totals[cut.channels + channel];
    }
    __syncthreads();
  }
}

template <class T, Walk WALK>
__global__ void __launch_bounds__(MAX_THREADS, FEW_BLOCKS)
    group_norm_silu_backward_apply(const GroupNormSiluBackward op, const Cut cut) {
  FASTDDPM_DYNAMIC_SHARED(memory);
  const GroupNormSilu& forward = op.forward;
  const Scratch scratch(cut, reinterpret_cast<float*>(memory));
  for (int64_t job = blockIdx.y; job < forward.shape.n * cut.slabs; job += gridDim.y) {
    const Slab slab(cut, job);
    merge_statistics(forward, cut, slab, scratch);
    make_lines(forward, cut, slab, scratch);
    for (int channel = int(threadIdx.x); channel < cut.channels; channel += int(blockDim.x)) {
      const float* from = chunk_sums(forward, cut, slab.n, slab.c + channel);
      float a = 0.0f, b = 0.0f;
      for (int i = 0; i < cut.chunks; ++i) a += from[2 * i], b += from[2 * i + 1];
      scratch.totals[channel] = a, scratch.totals[cut.channels + channel] = b;
    }
    __syncthreads();
    finish_sums(forward, cut, slab, scratch);
    apply_gradient<T, WALK, false>(op, cut, slab, scratch, nullptr, nullptr);
    __syncthreads();
  }
}

// The gradients of the parameters, from A and B: 32 channels a block, each row of threads takes
// every ROWS-th sample. Without samples or pixels they are 0.
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
      const float* sums = sample_sums(f, chunks) + 2 * at;
      const float a = pixels ? sums[0] : 0.0f, b = pixels ? sums[1] : 0.0f;
      const float gain = 1.0f + element(f.scale, n, c, 0.0f);
      weight += double(gain * b);
      bias += double(gain * a);
      if (op.dshift) op.dshift[at] = a;
      if (op.dscale)
        op.dscale[at] = madd(element(f.weight, 0, c, 1.0f), b, element(f.bias, 0, c, 0.0f) * a);
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
    const Cut cut = make_cut(forward, 2, forward.x, op.grad, op.dx);
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
        FASTDDPM_LAUNCH((group_norm_statistics<T, WALK>), grid, cut.threads, bytes, stream, forward,
                        cut);
        FASTDDPM_LAUNCH((group_norm_silu_backward_sums<T, WALK>), grid, cut.threads, bytes, stream,
                        op, cut);
        FASTDDPM_LAUNCH((group_norm_silu_backward_apply<T, WALK>), grid, cut.threads, bytes, stream,
                        op, cut);
      }
    });
  }
  if (op.dweight || op.dbias || op.dscale || op.dshift)
    FASTDDPM_LAUNCH(group_norm_silu_backward_parameters, dim3(unsigned(up(forward.shape.c, 32))),
                    32 * ROWS, 0, stream, op, chunks);
}

}  // namespace cuda
}  // namespace fastddpm
