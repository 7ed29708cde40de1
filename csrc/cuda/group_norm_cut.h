// How group_norm_silu and its gradient cut a batch into the work of CUDA blocks.
//
// A block owns a slab: some groups of channels of one sample. In NHWC (Walk::pixels) these are
// enough groups that a pixel's part of the slab is a whole number of vectors and at least 32 bytes;
// threads stand side by side along it and every thread keeps its channels. Otherwise (Walk::planes)
// a slab is one group and each warp takes one channel after the other.
//
// A slab that fits shared memory is read once. A larger one is cut into chunks of its places, each
// the work of one block, and read twice: for the statistics, then to be normalised. What the chunks
// found is merged in their order, so sums have a fixed order: a sample's result does not depend on
// its batch. How it is cut depends on the sample's shape and on the device's shared memory alone.
#pragma once
#include "access.h"

namespace fastddpm {
namespace {

constexpr int MAX_THREADS = 256, MIN_SEGMENT = 32 /* bytes */;
constexpr int MANY_BLOCKS = 3, FEW_BLOCKS = 2;  // of a multiprocessor at least: bounds registers
constexpr int MAX_GROUPS = 128;                 // of a slab: no more than a block has threads

enum class Walk { pixels, planes };

struct Any {};  // a storage type that is looked up at every element

template <class T>
constexpr int WIDTH = 16 / sizeof(T);  // elements of a vector
template <>
constexpr int WIDTH<Any> = 1;

struct Cut {
  Walk walk;
  bool typed;        // vectors of 16 bytes of one storage type; else elements of Any
  bool resident;     // the slab stays in shared memory
  int width;         // elements of a vector
  int groups;        // of a slab
  int per_group;     // channels of a group
  int channels;      // of a slab
  int columns;       // threads side by side along a pixel
  int run;           // neighbours of a vector that are of one group
  int entries;       // partial sums of a column
  int threads;       // of a block
  int chunks;        // blocks that share a slab
  int64_t slabs;     // of a sample
  int64_t places;    // vectors of a channel, or pixels
  int64_t chunk;     // places of a chunk
  int64_t elements;  // of a group
};

// ---- the cut -----------------------------------------------------------------------------------

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_power_of_two(int n) { return (n & (n - 1)) == 0; }

inline int greatest_common_divisor(int a, int b) {
  return b ? greatest_common_divisor(b, a % b) : a;
}

// From a pixel to the next, where pixels_in() holds.
__host__ __device__ inline int64_t pixel_step(const Shape& s, const Tensor& x) {
  return s.w == 1 ? x.stride[2] : x.stride[3];
}

inline bool pixels_in(const Shape& s, const Tensor& x) {
  return x.stride[1] == 1 && (s.h == 1 || s.w == 1 || x.stride[2] == s.w * x.stride[3]);
}

inline bool pixels_aligned(const Shape& s, const Tensor& x) {
  return aligned(x, s.n, 16) && (s.h * s.w == 1 || pixel_step(s, x) * size_of(x.dtype) % 16 == 0);
}

inline bool planes_in(const Shape& s, const Tensor& x) {
  return (s.w == 1 || x.stride[3] == 1) && (s.h == 1 || x.stride[2] == s.w) &&
         aligned(x, s.n, 16) && (s.c == 1 || x.stride[1] * size_of(x.dtype) % 16 == 0);
}

// Shared memory behind the slab's data: partial sums and totals of two quantities, per channel
// COEFFICIENTS numbers.
constexpr int COEFFICIENTS = 3;

inline int64_t scratch_floats(const Cut& cut) {
  const int64_t columns = int64_t(cut.walk == Walk::pixels ? cut.channels : 1);
  return 2 * columns * cut.entries + 2 * cut.channels + 3 * cut.groups +
         COEFFICIENTS * cut.channels;
}

inline int64_t slab_bytes(const Cut& cut, const Tensor& x) {
  const int64_t elements = cut.elements * cut.groups;
  return up(elements * (cut.typed ? size_of(x.dtype) : 4), 16) * 16;
}

inline int64_t shared_bytes(const Cut& cut, int slabs_kept, const Tensor& x) {
  return (cut.resident ? slabs_kept * slab_bytes(cut, x) : 0) + 4 * scratch_floats(cut);
}

// How to handle the tensors, all of op.shape; `slabs_kept` of them are kept in shared memory.
template <class... Tensors>
Cut make_cut(const GroupNormSilu& op, int slabs_kept, const Tensor& x, const Tensors&... others) {
  const Shape& s = op.shape;
  Cut cut{};
  cut.per_group = int(s.c / op.groups);
  const int64_t plane = s.h * s.w, vector = 16 / size_of(x.dtype), size = size_of(x.dtype);
  cut.elements = cut.per_group * plane;
  const bool same = ((others.dtype == x.dtype) && ...);
  const bool pixels = pixels_in(s, x) && (pixels_in(s, others) && ...);
  const bool aligned = same && pixels_aligned(s, x) && (pixels_aligned(s, others) && ...);

  for (const bool typed : {true, false}) {
    if (cut.groups || (typed && !aligned) || !pixels || s.c == 1) continue;
    const int width = typed ? int(vector) : 1;
    for (int groups = 1; groups <= op.groups && !cut.groups; ++groups) {
      const int64_t channels = int64_t(groups) * cut.per_group;
      if (channels / width > MAX_THREADS || groups > MAX_GROUPS) break;
      if (op.groups % groups || channels % width) continue;
      if (channels * size < MIN_SEGMENT && groups < op.groups) continue;
      cut.walk = Walk::pixels, cut.typed = typed, cut.groups = groups, cut.width = width;
    }
  }
  if (!cut.groups) {
    cut.walk = Walk::planes, cut.groups = 1;
    cut.typed = same && plane % vector == 0 && planes_in(s, x) && (planes_in(s, others) && ...);
    cut.width = cut.typed ? int(vector) : 1;
  }
  const bool by_pixel = cut.walk == Walk::pixels;
  cut.channels = cut.groups * cut.per_group;
  cut.columns = by_pixel ? cut.channels / cut.width : 1;
  cut.run = by_pixel ? greatest_common_divisor(cut.width, cut.per_group) : cut.width;
  cut.slabs = op.groups / cut.groups;
  cut.places = by_pixel ? plane : plane / cut.width;

  const auto set_threads = [&](int64_t vectors) {
    const int enough = vectors <= 512 ? MAX_THREADS / 2 : MAX_THREADS;
    cut.threads = enough < cut.columns ? int(up(cut.columns, 32) * 32) : enough;
    const int warps_at_most = MAX_THREADS / 32;
    if (!by_pixel) cut.threads = 32 * (cut.channels < warps_at_most ? cut.channels : warps_at_most);
    const bool by_warps = is_power_of_two(cut.columns) && cut.columns <= 32;
    cut.entries = by_warps ? cut.threads / 32 : cut.threads / cut.columns;
  };
  set_threads(cut.columns * cut.places);
  cut.chunks = 1;
  cut.resident = true;
  cut.resident = shared_bytes(cut, slabs_kept, x) <= shared_limit();
  if (!cut.resident) {
    const int64_t vectors = by_pixel ? cut.columns * cut.places : cut.channels * cut.places;
    const int64_t wanted = up(vectors, 8 * cut.threads);
    const int64_t most = wanted < GROUP_NORM_CHUNKS ? wanted : GROUP_NORM_CHUNKS;
    cut.chunks = int(most < cut.places ? most : cut.places);
  }
  cut.chunk = up(cut.places, cut.chunks);
  cut.chunks = int(up(cut.places, cut.chunk));
  if (!cut.resident) set_threads(cut.columns * cut.chunk);
  return cut;
}

// body(T(), walk) with T the storage type of x or Any, and the walk as a constant.
template <Walk WALK>
struct WalkConstant {
  static constexpr Walk value = WALK;
};

template <class Body>
void with_cut(const Cut& cut, const Tensor& x, const Body& body) {
  const auto with_walk = [&](auto type) {
    if (cut.walk == Walk::pixels)
      body(type, WalkConstant<Walk::pixels>());
    else
      body(type, WalkConstant<Walk::planes>());
  };
  if (cut.typed)
    with_type(x.dtype, with_walk);
  else
    with_walk(Any());
}

inline void check_groups(const GroupNormSilu& op) {
  if (op.groups < 1 || op.shape.c < 1 || op.shape.c % op.groups)
    throw std::invalid_argument("num_groups must divide the channels; got " +
                                std::to_string(op.groups) + " and " + std::to_string(op.shape.c));
  if (!op.workspace && !is_empty(op.shape))
    throw std::invalid_argument("group_norm_silu needs a workspace on CUDA");
}

inline dim3 slab_grid(const Shape& shape, const Cut& cut) {
  const int64_t jobs = shape.n * cut.slabs;
  return dim3(unsigned(cut.chunks), unsigned(jobs < 65535 ? jobs : 65535));
}

}  // namespace
}  // namespace fastddpm
