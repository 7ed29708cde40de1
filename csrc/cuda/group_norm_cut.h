// How group_norm_silu and its gradient cut a batch into the work of CUDA blocks.
//
// A block owns a slab: some groups of channels of one sample. In NHWC (Walk::pixels) these are
// enough groups that a pixel's part of the slab is a whole number of vectors and at least 32 bytes,
// and that the block's threads have something to do; threads stand side by side along it and every
// thread keeps its channels. Otherwise (Walk::planes) a slab is one group and each warp takes one
// channel after the other.
//
// A slab that fits shared memory is read once. A larger one is cut into chunks of its places, each
// the work of one block, and read twice: for the statistics, then to be normalised. What the chunks
// found is merged in their order, so sums have a fixed order: a sample's result does not depend on
// its batch. How it is cut depends on the sample's shape and on the device's shared memory alone.
#pragma once
#include <initializer_list>

#include "access.h"

namespace fastddpm {
namespace {

// At least how many threads run at once on a multiprocessor: bounds registers, to 80 and 128.
constexpr int MANY = 768, FEW = 512;

constexpr int MAX_THREADS = 512;                                // of a block
constexpr int MAX_COLUMNS = 256;                                // threads side by side
constexpr int MAX_GROUPS = 128;                                 // of a slab
constexpr int MIN_SEGMENT = 32 /* bytes */, MIN_VECTORS = 256;  // of a slab, if the sample has them

enum class Walk { pixels, planes };

struct Any {};  // a storage type that is looked up at every element

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
  bool by_warps;     // columns is a power of two up to 32: a warp's lanes sum a column by shuffles
  int run;           // neighbours of a vector that are of one group
  int entries;       // partial sums of a column
  int threads;       // of a block
  int chunks;        // blocks that share a slab
  int64_t slabs;     // of a sample
  int64_t places;    // vectors of a channel, or pixels
  int64_t chunk;     // places of a chunk
  int64_t elements;  // of a group
};

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_power_of_two(int n) { return (n & (n - 1)) == 0; }

inline int greatest_common_divisor(int a, int b) {
  return b ? greatest_common_divisor(b, a % b) : a;
}

// ---- the block's shared memory -----------------------------------------------------------------

// Behind the slab's data: partial sums and totals of two quantities, the groups' statistics, and in
// NHWC the channels' coefficients (elsewhere a warp has one channel and keeps them itself, so that
// a group of any size fits).
constexpr int STATISTICS = 5, COEFFICIENTS = 3;

struct Sizes {  // in floats
  int64_t partial, totals, statistics, coefficients;

  __host__ __device__ explicit Sizes(const Cut& cut) {
    const bool pixels = cut.walk == Walk::pixels;
    const int64_t channels = pixels ? cut.channels : 1;
    partial = 2 * channels * cut.entries, totals = 2 * channels;
    statistics = STATISTICS * cut.groups, coefficients = pixels ? COEFFICIENTS * channels : 0;
  }
};

inline int64_t slab_bytes(const Cut& cut, const Tensor& x) {
  const int64_t elements = cut.elements * cut.groups;
  return up(elements * (cut.typed ? size_of(x.dtype) : 4), 16) * 16;
}

inline int64_t shared_bytes(const Cut& cut, int slabs_kept, const Tensor& x) {
  const Sizes sizes(cut);
  return (cut.resident ? slabs_kept * slab_bytes(cut, x) : 0) +
         4 * (sizes.partial + sizes.totals + sizes.statistics + sizes.coefficients);
}

// ---- the cut -----------------------------------------------------------------------------------

inline void set_threads(Cut& cut, int64_t vectors, bool alone) {
  const bool by_pixel = cut.walk == Walk::pixels;
  const int most = alone ? MAX_THREADS : MAX_THREADS / 2;
  const int needed = cut.columns > cut.groups ? cut.columns : cut.groups;  // a thread for each
  const int enough = vectors <= 64 ? 64 : vectors <= 512 ? 128 : most;
  cut.threads = enough < needed ? int(up(needed, 32) * 32) : enough;
  if (!by_pixel) cut.threads = 32 * (cut.channels < most / 32 ? cut.channels : most / 32);
  cut.by_warps = is_power_of_two(cut.columns) && cut.columns <= 32;
  cut.entries = cut.by_warps ? cut.threads / 32 : cut.threads / cut.columns;
}

// A cut by pixels of one storage type or of any, or by planes, as far as it goes without knowing
// how much shared memory there is. False if it can't be.
inline bool begin_cut(Cut& cut, const GroupNormSilu& op, Walk walk, bool typed) {
  const Shape& s = op.shape;
  const int64_t plane = s.h * s.w, size = size_of(op.x.dtype), width = typed ? 16 / size : 1;
  cut = {};
  cut.walk = walk, cut.typed = typed, cut.width = int(width);
  cut.per_group = int(s.c / op.groups);
  cut.elements = cut.per_group * plane;
  if (walk == Walk::planes) {
    cut.groups = 1;
  } else {
    for (int groups = 1; groups <= op.groups && groups <= MAX_GROUPS; ++groups) {
      const int64_t channels = int64_t(groups) * cut.per_group;
      if (channels / width > MAX_COLUMNS) break;
      if (op.groups % groups || channels % width) continue;
      cut.groups = groups;
      if (channels * size >= MIN_SEGMENT && channels / width * plane >= MIN_VECTORS) break;
    }
    if (!cut.groups) return false;
  }
  const bool by_pixel = walk == Walk::pixels;
  cut.channels = cut.groups * cut.per_group;
  cut.columns = by_pixel ? cut.channels / cut.width : 1;
  cut.run = by_pixel ? greatest_common_divisor(cut.width, cut.per_group) : cut.width;
  cut.slabs = op.groups / cut.groups;
  cut.places = by_pixel ? plane : plane / cut.width;
  cut.chunks = 1, cut.chunk = cut.places;
  return true;
}

// Whether the block's shared memory is there: for `slabs_kept` tensors, or else for none.
inline bool finish_cut(Cut& cut, const Tensor& x, int slabs_kept, int64_t limit) {
  const int64_t vectors = (cut.walk == Walk::pixels ? cut.columns : cut.channels) * cut.places;
  cut.resident = true;
  for (const bool alone : {false, true}) {
    const Cut smaller = cut;
    set_threads(cut, vectors, alone);
    const int64_t bytes = shared_bytes(cut, slabs_kept, x);
    if (bytes > limit && alone) cut = smaller;
    // One that shares its multiprocessor with none has to keep its memory busy by itself.
    if (bytes > limit || 2 * bytes <= limit) break;
  }
  if (shared_bytes(cut, slabs_kept, x) <= limit) return true;
  cut.resident = false;
  const int64_t wanted = up(vectors, 8 * cut.threads);
  const int64_t most = wanted < GROUP_NORM_CHUNKS ? wanted : GROUP_NORM_CHUNKS;
  cut.chunks = int(most < cut.places ? most : cut.places);
  cut.chunk = up(cut.places, cut.chunks);
  cut.chunks = int(up(cut.places, cut.chunk));
  set_threads(cut, vectors / cut.places * cut.chunk, false);
  return shared_bytes(cut, slabs_kept, x) <= limit;
}

// How to handle the tensors, of op.shape or of some of its channels; one that is not given is null.
// `slabs_kept` of them are kept in shared memory.
inline Cut make_cut(const GroupNormSilu& op, int slabs_kept,
                    std::initializer_list<Tensor> tensors) {
  const Shape& s = op.shape;
  const int64_t vector = 16 / size_of(op.x.dtype);
  bool same = true, pixels = s.c > 1, in_vectors = true, planes = true;
  for (const Tensor& x : tensors) {
    if (!x.data) continue;
    same = same && x.dtype == op.x.dtype;
    pixels = pixels && pixels_in(s, x);
    in_vectors = in_vectors && pixels_aligned(s, x);
    planes = planes && planes_in(s, x);
  }
  // A vector lies in one of two sources.
  const bool typed_pixels = pixels && in_vectors && same && op.c1 % vector == 0;
  const bool typed_planes = planes && same && s.h * s.w % vector == 0;
  const int64_t limit = shared_limit();
  Cut cut{};
  for (const bool typed : {true, false})
    if ((typed ? typed_pixels : pixels) && begin_cut(cut, op, Walk::pixels, typed) &&
        finish_cut(cut, op.x, slabs_kept, limit))
      return cut;
  begin_cut(cut, op, Walk::planes, typed_planes);
  finish_cut(cut, op.x, slabs_kept, limit);
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
  if (op.c1 < 0 || op.c1 > op.shape.c)
    throw std::invalid_argument("x must have some of the channels of y");
  if (is_empty(op.shape)) return;
  if ((op.c1 < op.shape.c) != (op.x2.data != nullptr))
    throw std::invalid_argument("x2 must have the channels of y that x lacks");
  if (!op.residual.data != !op.u.data)
    throw std::invalid_argument("residual and u must both be given, or neither");
  if (!op.workspace) throw std::invalid_argument("group_norm_silu needs a workspace on CUDA");
}

inline dim3 slab_grid(const Shape& shape, const Cut& cut) {
  const int64_t jobs = shape.n * cut.slabs;
  return dim3(unsigned(cut.chunks), unsigned(jobs < 65535 ? jobs : 65535));
}

}  // namespace
}  // namespace fastddpm
