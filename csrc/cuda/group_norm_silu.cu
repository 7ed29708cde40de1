// group_norm_silu: normalise and apply; the cut and the statistics are in group_norm.h.
#include "group_norm.h"

namespace fastddpm {
namespace {

template <class T, Walk WALK, bool RESIDENT>
__device__ __forceinline__ void apply(const GroupNormSilu& op, const Cut& cut, const Slab& slab,
                                      const Scratch& scratch, const void* kept) {
  constexpr int V = WIDTH<T>;
  Lines<WALK, V> lines;
  walk<WALK>(
      cut, slab, [&](int channel) { lines.read(scratch, channel); },
      [&](int channel, int64_t place, int64_t index) {
        float x[V];
        if (RESIDENT)
          Vectors<T, WALK>::recall(kept, index, x);
        else
          Vectors<T, WALK>::load(op.shape, op.x, slab, channel, place, x);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const float v = madd(x[k] - lines[k].centre, lines[k].scale, lines[k].shift);
          x[k] = op.silu ? silu(v) : v;
        }
        Vectors<T, WALK>::store(op.shape, op.y, slab, channel, place, x);
      },
      Nothing());
  if (blockIdx.x != 0) return;
  for (int group = int(threadIdx.x); group < cut.groups; group += int(blockDim.x)) {
    const int64_t at = slab.n * op.groups + slab.index * cut.groups + group;
    const Normal normal = normal_of(cut, op.eps, scratch, group);
    if (op.mean) op.mean[at] = normal.centre + normal.rest;
    if (op.rstd) op.rstd[at] = normal.rstd;
  }
}

// A slab fits shared memory: it is read once and written once.
template <class T, Walk WALK>
__global__ void __launch_bounds__(MAX_THREADS, WALK == Walk::pixels ? MANY_BLOCKS : FEW_BLOCKS)
    group_norm_silu_resident(const GroupNormSilu op, const Cut cut, int64_t kept_bytes) {
  FASTDDPM_DYNAMIC_SHARED(memory);
  constexpr int V = WIDTH<T>;
  const Scratch scratch(cut, reinterpret_cast<float*>(memory + kept_bytes));
  for (int64_t job = blockIdx.y; job < op.shape.n * cut.slabs; job += gridDim.y) {
    const Slab slab(cut, job);
    Moments<V> moments;
    walk<WALK>(
        cut, slab, Nothing(),
        [&](int channel, int64_t place, int64_t index) {
          float x[V];
          Vectors<T, WALK>::load(op.shape, op.x, slab, channel, place, x);
          Vectors<T, WALK>::keep(memory, index, x);  // read back by this thread alone
          moments.add(x);
        },
        Nothing());
    block_statistics(cut, moments, cut.places, scratch);
    make_lines(op, cut, slab, scratch);
    apply<T, WALK, true>(op, cut, slab, scratch, memory);
    __syncthreads();
  }
}

// A chunk of a slab whose chunks' statistics are in the workspace.
template <class T, Walk WALK>
__global__ void __launch_bounds__(MAX_THREADS, MANY_BLOCKS)
    group_norm_silu_apply(const GroupNormSilu op, const Cut cut) {
  FASTDDPM_DYNAMIC_SHARED(memory);
  const Scratch scratch(cut, reinterpret_cast<float*>(memory));
  for (int64_t job = blockIdx.y; job < op.shape.n * cut.slabs; job += gridDim.y) {
    const Slab slab(cut, job);
    merge_statistics(op, cut, slab, scratch);
    make_lines(op, cut, slab, scratch);
    apply<T, WALK, false>(op, cut, slab, scratch, nullptr);
    __syncthreads();
  }
}

}  // namespace

namespace cuda {

void group_norm_silu(const GroupNormSilu& op, void* stream) {
  check_groups(op);
  if (is_empty(op.shape)) return;
  const Cut cut = make_cut(op, 1, op.x, op.y);
  const dim3 grid = slab_grid(op.shape, cut);
  const int64_t bytes = shared_bytes(cut, 1, op.x);
  with_cut(cut, op.x, [&](auto type, auto walk) {
    using T = decltype(type);
    constexpr Walk WALK = decltype(walk)::value;
    if (cut.resident) {
      FASTDDPM_LAUNCH((group_norm_silu_resident<T, WALK>), grid, cut.threads, bytes, stream, op,
                      cut, slab_bytes(cut, op.x));
    } else {
      FASTDDPM_LAUNCH((group_norm_statistics<T, WALK>), grid, cut.threads, bytes, stream, op, cut);
      FASTDDPM_LAUNCH((group_norm_silu_apply<T, WALK>), grid, cut.threads, bytes, stream, op, cut);
    }
  });
}

}  // namespace cuda
}  // namespace fastddpm
