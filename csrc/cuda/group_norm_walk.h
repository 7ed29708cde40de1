// How the threads of a block walk over its slab (group_norm_cut.h): where the vectors of a tensor
// are, which of the two sources a channel is of, which elements dropout keeps.
#pragma once
#include "group_norm_cut.h"

namespace fastddpm {
namespace {

struct Slab {  // where the block is; c: the slab's first channel
  int64_t n, index, c, first, end;

  __device__ Slab(const Cut& cut, int64_t job) {
    n = divide(job, cut.slabs, index);
    c = index * cut.channels;
    first = blockIdx.x * cut.chunk;
    end = first + cut.chunk < cut.places ? first + cut.chunk : cut.places;
  }
};

// The block's shared memory; partial and totals by quantity.
struct Scratch {
  float *partial, *totals, *statistics, *coefficients;

  __device__ Scratch(const Cut& cut, float* memory) {
    const Sizes sizes(cut);
    partial = memory;
    totals = partial + sizes.partial;
    statistics = totals + sizes.totals;
    coefficients = statistics + sizes.statistics;
  }
};

template <int ROUNDS>
struct Unroll {};

template <int ROUNDS, class Index, class Body>
__device__ __forceinline__ void rounds(Unroll<ROUNDS>, Index first, Index end, int step,
                                       const Body& body) {
#pragma unroll ROUNDS
  for (Index place = first; place < end; place += step) body(place);
}

// Calls column(channel, each) once for the vectors of this thread that share their channels, the
// first of which is `channel` of the slab: one time in NHWC, else for every channel of its warp,
// whose lanes then come and go together. each(Unroll<ROUNDS>(), body) calls body(place, index) for
// them, with a vector's index in the slab, so many rounds of the loop at once.
template <Walk WALK, bool RESIDENT, class Column>
__device__ __forceinline__ void walk(const Cut& cut, const Slab& slab, const Column& column) {
  using Index = std::conditional_t<RESIDENT, int, int64_t>;  // of what fits shared memory: 32 bits
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const Index first = Index(slab.first), end = Index(slab.end);
  if (WALK == Walk::pixels) {
    const int row = thread / cut.columns, at = thread - row * cut.columns;
    const int step = threads / cut.columns;
    if (row >= step) return;
    column(at * cut.width, [&](auto unroll, const auto& body) {
      rounds(unroll, first + row, end, step,
             [&](Index place) { body(place, place * cut.columns + at); });
    });
  } else {
    for (int c = thread / 32; c < cut.channels; c += threads / 32)
      column(c, [&](auto unroll, const auto& body) {
        rounds(unroll, first + thread % 32, end, 32,
               [&](Index place) { body(place, c * Index(cut.places) + place); });
      });
  }
}

template <bool VALUE>
struct Constant {
  __device__ constexpr operator bool() const { return VALUE; }
};

// body(flag), with the flag as a constant: a loop of its own for each value, so that no branch
// stands between the loads of its rounds. MAY: false if the flag never is.
template <bool MAY = true, class Body>
__device__ __forceinline__ void specialise(bool flag, const Body& body) {
  if constexpr (MAY)
    if (flag) return body(Constant<true>());
  body(Constant<false>());
}

// ---- tensors -----------------------------------------------------------------------------------

// The vectors of a tensor that share their channels, from channel c of sample n on.
template <class T, Walk WALK>
struct Places {
  static constexpr int V = WIDTH<T>;
  static constexpr bool TYPED = !std::is_same<T, Any>::value;

  void* data;
  DType dtype;
  int64_t start, row, step;  // row: from an image's row to the next, where places have no one step
  int64_t width;

  __device__ Places(const Shape& shape, const Tensor& x, int64_t n, int64_t c)
      : data(x.data),
        dtype(x.dtype),
        start(n * x.stride[0] + c * x.stride[1]),
        row(x.stride[2]),
        step(WALK == Walk::pixels ? pixel_step(shape, x)
             : TYPED              ? V
                                  : x.stride[3]),
        width(shape.w) {}

  __device__ int64_t offset(int64_t place) const {
    if (WALK == Walk::pixels || TYPED) return start + place * step;
    int64_t w;
    const int64_t h = divide(place, width, w);
    return start + h * row + w * step;
  }

  // What the kernel does not write.
  __device__ void load(int64_t place, float (&values)[V]) const {
    if constexpr (TYPED)
      load_constant(static_cast<const T*>(data) + offset(place), values);
    else
      values[0] = fastddpm::load(data, dtype, offset(place));
  }

  __device__ void store(int64_t place, const float (&values)[V]) const {
    if constexpr (TYPED)
      store_vector(static_cast<T*>(data) + offset(place), values);
    else
      fastddpm::store(data, dtype, offset(place), values[0]);
  }

  // What storing leaves of the values.
  __device__ void round(float (&values)[V]) const {
    if constexpr (TYPED) {
#pragma unroll
      for (int k = 0; k < V; ++k) values[k] = to_float(from_float<T>(values[k]));
    } else {
      values[0] = rounded(dtype, values[0]);
    }
  }
};

// Channel c of h is one of x or of x2.
template <class T, Walk WALK>
__device__ __forceinline__ Places<T, WALK> of_sources(const GroupNormSilu& op, const Tensor& first,
                                                      const Tensor& second, int64_t n, int64_t c) {
  const bool in_first = c < op.c1;
  Tensor x;
  x.data = in_first ? first.data : second.data;
  x.dtype = in_first ? first.dtype : second.dtype;
#pragma unroll
  for (int i = 0; i < 4; ++i) x.stride[i] = in_first ? first.stride[i] : second.stride[i];
  return Places<T, WALK>(op.shape, x, n, in_first ? c : c - op.c1);
}

// A slab in shared memory: a vector keeps its storage type, an element of Any is a float.
template <class T>
struct Kept {
  static constexpr int V = WIDTH<T>;
  using Stored = std::conditional_t<std::is_same<T, Any>::value, float, T>;

  static __device__ void store(void* slab, int64_t index, const float (&values)[V]) {
    store_vector(static_cast<Stored*>(slab) + index * V, values);
  }

  static __device__ void load(const void* slab, int64_t index, float (&values)[V]) {
    load_vector(static_cast<const Stored*>(slab) + index * V, values);
  }
};

// ---- dropout -----------------------------------------------------------------------------------

// Which elements of the vectors that share their channels are kept: element pixel * C + channel of
// a sample has word e % 4 of block e / 4 of its stream. Nothing is read unless some are dropped.
template <class T, Walk WALK>
struct Mask {
  static constexpr int V = WIDTH<T>;

  Philox stream;
  uint32_t threshold;
  int64_t channels, c;

  __device__ Mask(const GroupNormSilu& op, int64_t n, int64_t c, bool drops)
      : stream{}, threshold(op.dropout.threshold), channels(op.shape.c), c(c) {
    if (drops) stream = stream_of(op.dropout.random, n);
  }

  // Bit k: element k of the vector is dropped.
  __device__ __forceinline__ uint32_t dropped(int64_t place) const {
    uint32_t words[4], bits = 0;
    if constexpr (WALK == Walk::pixels && V > 1) {  // whole blocks: C is a multiple of V
      const uint32_t block = uint32_t(place) * uint32_t(channels / 4) + uint32_t(c / 4);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (k % 4 == 0) philox4x32(stream, block + k / 4, words);
        bits |= uint32_t(words[k % 4] < threshold) << k;
      }
    } else {
#pragma unroll 1
      for (int k = 0; k < V; ++k) {
        const int64_t element = (place * V + k) * channels + c;
        philox4x32(stream, uint32_t(element / 4), words);
        const int which = int(element % 4);
        const uint32_t low = which & 1 ? words[1] : words[0],
                       high = which & 1 ? words[3] : words[2];
        bits |= uint32_t((which & 2 ? high : low) < threshold) << k;
      }
    }
    return bits;
  }
};

}  // namespace
}  // namespace fastddpm
