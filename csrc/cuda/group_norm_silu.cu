// group_norm_silu: normalise and apply. The cut, the walk and the statistics: group_norm*.h.
//
// A kernel with MORE takes a residual and drops elements, which costs registers; `before` and a
// second source cost none in the loops.
#include "group_norm.h"

namespace fastddpm {
namespace {

template <class T, Walk WALK, bool MORE, bool RESIDENT>
__device__ __forceinline__ void apply(const GroupNormSilu& op, const Cut& cut, const Slab& slab,
                                      const Scratch& scratch, const void* kept) {
  constexpr int V = WIDTH<T>;
  walk<WALK, RESIDENT>(cut, slab, [&](int channel, const auto& each) {
    const int64_t c = slab.c + channel;
    const Lines<WALK, V> lines(op, cut, slab, scratch, channel);
    const Places<T, WALK> from = of_sources<T, WALK>(op, op.x, op.x2, slab.n, c);
    const Places<T, WALK> y(op.shape, op.y, slab.n, c);
    specialise<MORE>(op.dropout.threshold != 0, [&](auto drops) {
      const Mask<T, WALK> mask(op, slab.n, c, drops);
      each(Unroll<drops ? 1 : 4>(), [&](auto place, auto index) {
        float x[V];
        const uint32_t dropped = drops ? mask.dropped(place) : 0;
        if (RESIDENT)
          Kept<T>::load(kept, index, x);
        else
          from.load(place, x);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const float v = madd(x[k] - lines[k].centre, lines[k].scale, lines[k].shift);
          x[k] = op.silu ? silu(v) : v;
          if (drops) x[k] *= dropped >> k & 1 ? 0.0f : op.dropout.keep_scale;
        }
        y.store(place, x);
      });
    });
  });
  if (blockIdx.x != 0) return;
  for (int group = int(threadIdx.x); group < cut.groups; group += int(blockDim.x)) {
    const int64_t at = slab.n * op.groups + slab.index * cut.groups + group;
    const Normal normal = normal_of(cut, op.eps, scratch, group);
    if (op.mean) op.mean[at] = normal.centre + normal.rest;
    if (op.rstd) op.rstd[at] = normal.rstd;
  }
}

// A slab fits shared memory: it is read once and written once.
template <class T, Walk WALK, bool MORE>
__global__ void __launch_bounds__(MORE || WALK == Walk::planes ? FEW : MANY, 1)
    group_norm_silu_resident(const GroupNormSilu op, const Cut cut, int64_t kept_bytes) {
  FASTDDPM_DYNAMIC_SHARED(memory);
  const Scratch scratch(cut, reinterpret_cast<float*>(memory + kept_bytes));
  for (int64_t job = blockIdx.y; job < op.shape.n * cut.slabs; job += gridDim.y) {
    const Slab slab(cut, job);
    Moments<WIDTH<T>> moments;
    read_slab<true, MORE, T, WALK>(op, cut, slab, memory, moments);
    block_statistics(cut, moments, cut.places, scratch);
    make_lines<WALK>(op, cut, slab, scratch);
    apply<T, WALK, MORE, true>(op, cut, slab, scratch, memory);
    __syncthreads();
  }
}

// A chunk of a slab whose chunks' statistics are in the workspace.
template <class T, Walk WALK, bool MORE>
__global__ void __launch_bounds__(MORE ? FEW : MANY, 1)
    group_norm_silu_apply(const GroupNormSilu op, const Cut cut) {
  FASTDDPM_DYNAMIC_SHARED(memory);
  const Scratch scratch(cut, reinterpret_cast<float*>(memory));
  for (int64_t job = blockIdx.y; job < op.shape.n * cut.slabs; job += gridDim.y) {
    const Slab slab(cut, job);
    merge_statistics(op, cut, slab, scratch);
    make_lines<WALK>(op, cut, slab, scratch);
    apply<T, WALK, MORE, false>(op, cut, slab, scratch, nullptr);
    __syncthreads();
  }
}

template <class T, Walk WALK, bool MORE>
void run(const GroupNormSilu& op, const Cut& cut, void* stream) {
  const dim3 grid = slab_grid(op.shape, cut);
  const int64_t bytes = shared_bytes(cut, 1, op.x);
  if (cut.resident) {
    FASTDDPM_LAUNCH((group_norm_silu_resident<T, WALK, MORE>), grid, cut.threads, bytes, stream, op,
                    cut, slab_bytes(cut, op.x));
  } else {
    FASTDDPM_LAUNCH((group_norm_statistics<T, WALK, MORE>), grid, cut.threads, bytes, stream, op,
                    cut);
    GroupNormSilu second = op;
    if (op.residual.data)  // the sum is written
      second.x = op.u, second.residual.data = second.u.data = second.before.data = nullptr;
    FASTDDPM_LAUNCH((group_norm_silu_apply<T, WALK, MORE>), grid, cut.threads, bytes, stream,
                    second, cut);
  }
}

}  // namespace

namespace cuda {

void group_norm_silu(const GroupNormSilu& op, void* stream) {
  check_groups(op);
  if (is_empty(op.shape)) return;
  const Cut cut = make_cut(op, 1, {op.x, op.y, op.x2, op.residual, op.u});
  const bool more = op.residual.data || op.dropout.threshold;
  with_cut(cut, op.x, [&](auto type, auto walk) {
    using T = decltype(type);
    constexpr Walk WALK = decltype(walk)::value;
    constexpr bool ANY = std::is_same<T, Any>::value;  // slow: one kernel does
    if (ANY || more)
      run<T, WALK, true>(op, cut, stream);
    else
      run<T, WALK, ANY>(op, cut, stream);
  });
}

}  // namespace cuda
}  // namespace fastddpm
