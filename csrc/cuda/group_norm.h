// What the kernels of group_norm_silu and of its gradient share: sums over a block, statistics, and
// the line that a channel's values follow to the argument of silu.
#pragma once
#include "group_norm_walk.h"

namespace fastddpm {
namespace {

constexpr unsigned ALL_LANES = 0xffffffffu;

// ---- sums over a block -------------------------------------------------------------------------

__device__ inline float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
  return x;
}

// totals[k * results + r]: the sums over the block of what its threads hold of quantity k for
// result r, for all threads to read. Each column's vector is cut into runs of `run` neighbours,
// each run belongs to one result, and a result has `runs` runs side by side. In a fixed order.
template <int V, int K>
__device__ void block_sums(const Cut& cut, const float (&values)[K][V], int run, int runs,
                           int results, float* partial, float* totals) {
  const int thread = int(threadIdx.x), lane = thread % 32;
  const int row = thread / cut.columns, column = thread - row * cut.columns;
  const bool writes = cut.by_warps ? lane < cut.columns : row < int(blockDim.x) / cut.columns;
  const int entry = cut.by_warps ? thread / 32 : row;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sum += values[k][i];
      if ((i + 1) % run != 0) continue;
      if (cut.by_warps)
        for (int lanes = 16; lanes >= cut.columns; lanes /= 2)
          sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
      const int at = (column * V + i) / run;
      if (writes) partial[(k * results * runs + at) * cut.entries + entry] = sum;
      sum = 0.0f;
    }
  }
  __syncthreads();
  const int length = runs * cut.entries;
  for (int r = thread / 32; r < K * results; r += int(blockDim.x) / 32) {
    float sum = 0.0f;
    for (int i = lane; i < length; i += 32) sum += partial[r * length + i];
    sum = warp_sum(sum);
    if (lane == 0) totals[r] = sum;
  }
  __syncthreads();
}

template <int V, int K>
__device__ void group_sums(const Cut& cut, const float (&values)[K][V], const Scratch& scratch) {
  const int runs = cut.walk == Walk::pixels ? cut.per_group / cut.run : 1;
  block_sums(cut, values, cut.run, runs, cut.groups, scratch.partial, scratch.totals);
}

// ---- statistics --------------------------------------------------------------------------------

// Welford's mean and squared deviations of one thread's elements, for each place of a vector, all
// relative to its first element: as exact for a large mean with a small spread as for any other.
template <int V>
struct Moments {
  float count = 0.0f, origin[V], mean[V], squares[V];

  __device__ Moments() {
#pragma unroll
    for (int k = 0; k < V; ++k) origin[k] = mean[k] = squares[k] = 0.0f;
  }

  __device__ __forceinline__ void add(const float (&x)[V]) {
    const bool first = count == 0.0f;
    count += 1.0f;
    const float share = 1.0f / count;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      origin[k] = first ? x[k] : origin[k];
      const float u = x[k] - origin[k], d = u - mean[k];
      mean[k] = madd(d, share, mean[k]);
      squares[k] = madd(d, u - mean[k], squares[k]);
    }
  }

  // As if by[k] had been added to every element before.
  __device__ __forceinline__ void move(const float (&by)[V]) {
#pragma unroll
    for (int k = 0; k < V; ++k) origin[k] += by[k];
  }
};

// STATISTICS numbers of a group in scratch.statistics begin with (centre, rest, squares) of the
// block's elements: the mean is centre + rest, squares the sum of squared deviations from centre.
// `places`: those the block has read.
template <int V>
__device__ void block_statistics(const Cut& cut, const Moments<V>& moments, int64_t places,
                                 const Scratch& scratch) {
  const float elements = float(cut.elements / cut.places * places);
  float sum[1][V], around[2][V];
#pragma unroll
  for (int k = 0; k < V; ++k) sum[0][k] = moments.count * (moments.origin[k] + moments.mean[k]);
  group_sums(cut, sum, scratch);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int channel = int(threadIdx.x) % cut.columns * V + k;
    const float centre =
        scratch.totals[cut.walk == Walk::pixels ? channel / cut.per_group : 0] / elements;
    const float d = (moments.origin[k] - centre) + moments.mean[k];
    around[0][k] = moments.count == 0.0f ? 0.0f : moments.count * d;
    around[1][k] = moments.count == 0.0f ? 0.0f : madd(moments.count * d, d, moments.squares[k]);
  }
  const int thread = int(threadIdx.x);
  float centre = 0.0f;
  if (thread < cut.groups) centre = scratch.totals[thread] / elements;
  __syncthreads();
  group_sums(cut, around, scratch);
  if (thread < cut.groups) {
    float* to = scratch.statistics + STATISTICS * thread;
    to[0] = centre;
    to[1] = scratch.totals[thread] / elements;
    to[2] = scratch.totals[cut.groups + thread];
  }
}

// The statistics of the chunks of a group: (chunk, 3) floats each, in their order.
__device__ inline float* chunk_statistics(const GroupNormSilu& op, const Cut& cut, const Slab& slab,
                                          int group) {
  const int64_t g = slab.n * op.groups + slab.index * cut.groups + group;
  return op.workspace + g * cut.chunks * 3;
}

// scratch.statistics of the whole slab, of those of its chunks.
__device__ inline void merge_statistics(const GroupNormSilu& op, const Cut& cut, const Slab& slab,
                                        const Scratch& scratch) {
  for (int group = int(threadIdx.x); group < cut.groups; group += int(blockDim.x)) {
    const float* chunk = chunk_statistics(op, cut, slab, group);
    const float centre = chunk[0];
    float rest = 0.0f, squares = 0.0f;
    for (int i = 0; i < cut.chunks; ++i, chunk += 3) {
      const int64_t left = cut.places - i * cut.chunk;
      const float share = float(cut.elements / cut.places * (left < cut.chunk ? left : cut.chunk));
      const float d = chunk[0] - centre;
      rest = madd(share, d + chunk[1], rest);
      // The squares are around chunk[0]; move them to `centre`.
      squares += chunk[2] + share * d * madd(2.0f, chunk[1], d);
    }
    float* to = scratch.statistics + STATISTICS * group;
    to[0] = centre;
    to[1] = rest / float(cut.elements);
    to[2] = squares;
  }
}

struct Normal {  // of a group: x is normalised as ((x - centre) - rest) rstd
  float centre, rest, rstd;
};

__device__ inline Normal normal_of(const Cut& cut, float eps, const Scratch& scratch, int group) {
  const float* s = scratch.statistics + STATISTICS * group;
  const float raw = madd(-s[1], s[1], s[2] / float(cut.elements));
  return {s[0], s[1], 1.0f / sqrtf((raw < 0.0f ? 0.0f : raw) + eps)};
}

// ---- lines --------------------------------------------------------------------------------------

// What is added to x in channel c.
__device__ inline float before_of(const GroupNormSilu& op, int64_t n, int64_t c) {
  return c < op.c1 ? element(op.before, n, c, 0.0f) : 0.0f;
}

// The argument of silu is (x - centre) scale + shift, with x as it was read: `before` is taken off
// the centre. With a residual, x is the sum that was written.
struct Line {
  float centre, scale, shift;
};

__device__ inline Line line_of(const GroupNormSilu& op, const Normal& normal, int64_t n,
                               int64_t c) {
  const float gain = 1.0f + element(op.scale, n, c, 0.0f);
  const float scale = normal.rstd * element(op.weight, 0, c, 1.0f) * gain;
  const float shift = madd(gain, element(op.bias, 0, c, 0.0f), element(op.shift, n, c, 0.0f));
  return {normal.centre - (op.residual.data ? 0.0f : before_of(op, n, c)), scale,
          madd(-normal.rest, scale, shift)};
}

// Leaves the Line of each channel of a slab by pixels in scratch.coefficients. Once it is done, the
// statistics are there for all threads, too.
template <Walk WALK>
__device__ void make_lines(const GroupNormSilu& op, const Cut& cut, const Slab& slab,
                           const Scratch& scratch) {
  __syncthreads();
  if constexpr (WALK == Walk::pixels) {
    for (int channel = int(threadIdx.x); channel < cut.channels; channel += int(blockDim.x)) {
      const Normal normal = normal_of(cut, op.eps, scratch, channel / cut.per_group);
      const Line line = line_of(op, normal, slab.n, slab.c + channel);
      float* to = scratch.coefficients + COEFFICIENTS * channel;
      to[0] = line.centre, to[1] = line.scale, to[2] = line.shift;
    }
    __syncthreads();
  }
}

// The lines of a thread's channels, from `channel` on: of all of a vector's in NHWC.
template <Walk WALK, int V>
struct Lines {
  static constexpr int COUNT = WALK == Walk::pixels ? V : 1;
  Line line[COUNT];

  __device__ Lines(const GroupNormSilu& op, const Cut& cut, const Slab& slab,
                   const Scratch& scratch, int channel) {
    if constexpr (WALK == Walk::pixels) {
#pragma unroll
      for (int k = 0; k < COUNT; ++k) {
        const float* from = scratch.coefficients + COEFFICIENTS * (channel + k);
        line[k] = {from[0], from[1], from[2]};
      }
    } else {
      line[0] = line_of(op, normal_of(cut, op.eps, scratch, 0), slab.n, slab.c + channel);
    }
  }

  __device__ const Line& operator[](int k) const { return line[WALK == Walk::pixels ? k : 0]; }
};

// ---- the first pass ----------------------------------------------------------------------------

// Reads what is normalised once, for its moments: x or x2, kept in shared memory if RESIDENT, or
// the sum of x, `before` and the residual, which is written to u and kept. MORE: there may be one.
template <bool RESIDENT, bool MORE, class T, Walk WALK>
__device__ __forceinline__ void read_slab(const GroupNormSilu& op, const Cut& cut, const Slab& slab,
                                          void* kept, Moments<WIDTH<T>>& moments) {
  constexpr int V = WIDTH<T>;
  walk<WALK, RESIDENT>(cut, slab, [&](int channel, const auto& each) {
    const int64_t c = slab.c + channel;
    const Places<T, WALK> from = of_sources<T, WALK>(op, op.x, op.x2, slab.n, c);
    float before[V];
    const auto read_before = [&] {
#pragma unroll
      for (int k = 0; k < V; ++k)
        before[k] = k == 0 || WALK == Walk::pixels ? before_of(op, slab.n, c + k) : before[0];
    };
    if (MORE || WALK == Walk::planes) read_before();
    if (MORE && op.residual.data && c < op.c1) {
      const Places<T, WALK> residual(op.shape, op.residual, slab.n, c);
      const Places<T, WALK> u(op.shape, op.u, slab.n, c);
      each(Unroll<2>(), [&](auto place, auto index) {
        float x[V], more[V];
        from.load(place, x);
        residual.load(place, more);
#pragma unroll
        for (int k = 0; k < V; ++k) x[k] = (x[k] + before[k]) + more[k];
        u.round(x);
        u.store(place, x);
        if (RESIDENT) Kept<T>::store(kept, index, x);
        moments.add(x);
      });
    } else {
      each(Unroll<4>(), [&](auto place, auto index) {
        float x[V];
        from.load(place, x);
        if (RESIDENT) Kept<T>::store(kept, index, x);  // read back by this thread alone
        if (WALK == Walk::planes)
#pragma unroll
          for (int k = 0; k < V; ++k) x[k] += before[0];
        moments.add(x);
      });
      if (!MORE && WALK == Walk::pixels) read_before();
      if (WALK == Walk::pixels) moments.move(before);
    }
  });
}

// Of the two-pass path: the statistics of a chunk, to the workspace.
template <class T, Walk WALK, bool MORE>
__global__ void __launch_bounds__(MORE ? FEW : MANY, 1)
    group_norm_statistics(const GroupNormSilu op, const Cut cut) {
  FASTDDPM_DYNAMIC_SHARED(memory);
  const Scratch scratch(cut, reinterpret_cast<float*>(memory));
  for (int64_t job = blockIdx.y; job < op.shape.n * cut.slabs; job += gridDim.y) {
    const Slab slab(cut, job);
    Moments<WIDTH<T>> moments;
    read_slab<false, MORE, T, WALK>(op, cut, slab, nullptr, moments);
    block_statistics(cut, moments, slab.end - slab.first, scratch);
    const int group = int(threadIdx.x);
    if (group < cut.groups) {  // the thread that wrote them
      float* to = chunk_statistics(op, cut, slab, group) + 3 * blockIdx.x;
      for (int i = 0; i < 3; ++i) to[i] = scratch.statistics[STATISTICS * group + i];
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace fastddpm
