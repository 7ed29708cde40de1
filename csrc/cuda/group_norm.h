// What the kernels of group_norm_silu and of its gradient share: the walk over a block's part of
// the batch (group_norm_cut.h), sums over a block, statistics.
#pragma once
#include "group_norm_cut.h"

namespace fastddpm {
namespace {

constexpr unsigned ALL_LANES = 0xffffffffu;

// ---- one block's part --------------------------------------------------------------------------

struct Slab {  // where the block is; c: the slab's first channel
  int64_t n, index, c, first, end;

  __device__ Slab(const Cut& cut, int64_t job) {
    n = divide(job, cut.slabs, index);
    c = index * cut.channels;
    first = blockIdx.x * cut.chunk;
    end = first + cut.chunk < cut.places ? first + cut.chunk : cut.places;
  }
};

// The block's shared memory.
struct Scratch {
  float *partial, *totals, *statistics, *coefficients;

  __device__ Scratch(const Cut& cut, float* memory) {
    partial = memory;
    totals = partial + 2 * (cut.walk == Walk::pixels ? cut.channels : 1) * cut.entries;
    statistics = totals + 2 * cut.channels;
    coefficients = statistics + 3 * cut.groups;
  }
};

// Calls, for the vectors of this thread: enter(channel) when a vector's first channel (in the slab)
// changes, body(channel, place, index) with the vector's index in the slab, leave(channel) after
// the last of it. All lanes of a warp enter and leave together if walk is planes.
template <Walk WALK, class Enter, class Body, class Leave>
__device__ __forceinline__ void walk(const Cut& cut, const Slab& slab, const Enter& enter,
                                     const Body& body, const Leave& leave) {
  const int thread = int(threadIdx.x);
  if (WALK == Walk::pixels) {
    const int row = thread / cut.columns, column = thread - row * cut.columns;
    const int rows = int(blockDim.x) / cut.columns;
    if (row >= rows) return;
    enter(column * cut.width);
#pragma unroll 4
    for (int64_t place = slab.first + row; place < slab.end; place += rows)
      body(column * cut.width, place, place * cut.columns + column);
    leave(column * cut.width);
  } else {
    for (int c = thread / 32; c < cut.channels; c += int(blockDim.x) / 32) {
      enter(c);
#pragma unroll 4
      for (int64_t place = slab.first + thread % 32; place < slab.end; place += 32)
        body(c, place, c * cut.places + place);
      leave(c);
    }
  }
}

struct Nothing {
  __device__ void operator()(int) const {}
};

// Access to the vectors of a tensor.
template <class T, Walk WALK>
struct Vectors {
  static constexpr int V = WIDTH<T>;

  static __device__ int64_t offset(const Shape& shape, const Tensor& x, const Slab& slab,
                                   int channel, int64_t place) {
    const int64_t start = slab.n * x.stride[0] + (slab.c + channel) * x.stride[1];
    if (WALK == Walk::pixels) return start + place * pixel_step(shape, x);
    if (!std::is_same<T, Any>::value) return start + place * V;
    int64_t w;
    const int64_t h = divide(place, shape.w, w);
    return start + h * x.stride[2] + w * x.stride[3];
  }

  static __device__ void load(const Shape& shape, const Tensor& x, const Slab& slab, int channel,
                              int64_t place, float (&values)[V]) {
    const int64_t at = offset(shape, x, slab, channel, place);
    if constexpr (std::is_same<T, Any>::value)
      values[0] = fastddpm::load(x.data, x.dtype, at);
    else
      load_vector(static_cast<const T*>(x.data) + at, values);
  }

  static __device__ void store(const Shape& shape, const Tensor& x, const Slab& slab, int channel,
                               int64_t place, const float (&values)[V]) {
    const int64_t at = offset(shape, x, slab, channel, place);
    if constexpr (std::is_same<T, Any>::value)
      fastddpm::store(x.data, x.dtype, at, values[0]);
    else
      store_vector(static_cast<T*>(x.data) + at, values);
  }

  // In shared memory a vector keeps its storage type, an element of Any is a float.
  using Kept = std::conditional_t<std::is_same<T, Any>::value, float, T>;

  static __device__ void keep(void* slab, int64_t index, const float (&values)[V]) {
    store_vector(static_cast<Kept*>(slab) + index * V, values);
  }

  static __device__ void recall(const void* slab, int64_t index, float (&values)[V]) {
    load_vector(static_cast<const Kept*>(slab) + index * V, values);
  }
};

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
  const bool warps = cut.entries * 32 == int(blockDim.x);  // columns is a power of two up to 32
  const bool writes = warps ? lane < cut.columns : row < int(blockDim.x) / cut.columns;
  const int entry = warps ? thread / 32 : row;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sum += values[k][i];
      if ((i + 1) % run != 0) continue;
      if (warps)
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
};

// scratch.statistics[group] = (centre, rest, squares) of the block's elements: the mean is centre +
// rest, squares the sum of squared deviations from centre. `places`: those the block has read.
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
    scratch.statistics[3 * thread] = centre;
    scratch.statistics[3 * thread + 1] = scratch.totals[thread] / elements;
    scratch.statistics[3 * thread + 2] = scratch.totals[cut.groups + thread];
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
    scratch.statistics[3 * group] = centre;
    scratch.statistics[3 * group + 1] = rest / float(cut.elements);
    scratch.statistics[3 * group + 2] = squares;
  }
}

struct Normal {  // of a group: x is normalised as ((x - centre) - rest) rstd
  float centre, rest, rstd;
};

__device__ inline Normal normal_of(const Cut& cut, float eps, const Scratch& scratch, int group) {
  const float* s = scratch.statistics + 3 * group;
  const float raw = madd(-s[1], s[1], s[2] / float(cut.elements));
  return {s[0], s[1], 1.0f / sqrtf((raw < 0.0f ? 0.0f : raw) + eps)};
}

// The argument of silu is (x - centre) scale + shift.
struct Line {
  float centre, scale, shift;
};

// Fills scratch.coefficients with the Line of each channel of the slab; for all threads to read.
__device__ inline void make_lines(const GroupNormSilu& op, const Cut& cut, const Slab& slab,
                                  const Scratch& scratch) {
  __syncthreads();  // the statistics are there
  for (int channel = int(threadIdx.x); channel < cut.channels; channel += int(blockDim.x)) {
    const Normal normal = normal_of(cut, op.eps, scratch, channel / cut.per_group);
    const int64_t c = slab.c + channel;
    const float gain = 1.0f + element(op.scale, slab.n, c, 0.0f);
    const float scale = normal.rstd * element(op.weight, 0, c, 1.0f) * gain;
    const float shift =
        madd(gain, element(op.bias, 0, c, 0.0f), element(op.shift, slab.n, c, 0.0f));
    scratch.coefficients[COEFFICIENTS * channel] = normal.centre;
    scratch.coefficients[COEFFICIENTS * channel + 1] = scale;
    scratch.coefficients[COEFFICIENTS * channel + 2] = madd(-normal.rest, scale, shift);
  }
  __syncthreads();
}

// The lines of a thread's channels, from `channel` on: of all of a vector's in NHWC.
template <Walk WALK, int V>
struct Lines {
  static constexpr int COUNT = WALK == Walk::pixels ? V : 1;
  Line line[COUNT];

  __device__ void read(const Scratch& scratch, int channel) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      const float* from = scratch.coefficients + COEFFICIENTS * (channel + k);
      line[k] = {from[0], from[1], from[2]};
    }
  }

  __device__ const Line& operator[](int k) const { return line[WALK == Walk::pixels ? k : 0]; }
};

// ---- a kernel of the two-pass path -------------------------------------------------------------

template <class T, Walk WALK>
__global__ void __launch_bounds__(MAX_THREADS, MANY_BLOCKS)
    group_norm_statistics(const GroupNormSilu op, const Cut cut) {
  FASTDDPM_DYNAMIC_SHARED(memory);
  constexpr int V = WIDTH<T>;
  const Scratch scratch(cut, reinterpret_cast<float*>(memory));
  for (int64_t job = blockIdx.y; job < op.shape.n * cut.slabs; job += gridDim.y) {
    const Slab slab(cut, job);
    Moments<V> moments;
    walk<WALK>(
        cut, slab, Nothing(),
        [&](int channel, int64_t place, int64_t) {
          float x[V];
          Vectors<T, WALK>::load(op.shape, op.x, slab, channel, place, x);
          moments.add(x);
        },
        Nothing());
    block_statistics(cut, moments, slab.end - slab.first, scratch);
    const int group = int(threadIdx.x);
    if (group < cut.groups) {  // the thread that wrote them
      float* to = chunk_statistics(op, cut, slab, group) + 3 * blockIdx.x;
      for (int i = 0; i < 3; ++i) to[i] = scratch.statistics[3 * group + i];
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace fastddpm
