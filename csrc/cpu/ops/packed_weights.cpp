// The packed weights of one tensor, kept from call to call as long as its values stay.
#include <algorithm>
#include <cstring>

#include "convolution.h"

namespace fastddpm {
namespace cpu {
namespace {

constexpr size_t MOST =
    4;  // ways of one weight: of images of several sizes, on one instruction set

// Bytes of a weight whose elements lie side by side, in any order; 0 if they don't.
int64_t dense_bytes(const Weight& weight) {
  struct Axis {
    int64_t stride, size;
  } axes[4] = {{weight.stride[0], weight.c_out},
               {weight.stride[1], weight.c_in},
               {weight.stride[2], weight.kernel},
               {weight.stride[3], weight.kernel}};
  std::sort(axes, axes + 4, [](const Axis& a, const Axis& b) { return a.stride < b.stride; });
  int64_t count = 1;
  for (const Axis& axis : axes) {
    if (axis.size == 1) continue;
    if (axis.stride != count) return 0;
    count *= axis.size;
  }
  return count * element_size(weight.dtype);
}

bool same_place(const Weight& a, const Weight& b) {
  return a.dtype == b.dtype && std::equal(a.stride, a.stride + 4, b.stride);
}

}  // namespace

std::shared_ptr<const PackedWeight> PackedWeights::of(const Convolution& op, int threads) {
  const Kernels& kernels = kernels_in_use();
  const Weight weight = weight_of(op);
  const int64_t bytes = dense_bytes(weight);
  if (!bytes) return packed_weight(op, threads);
  const Way way = way_of(kernels, geometry_of(op), op.rounded);
  Seen seen{&kernels, way, weight, {}, nullptr};
  const Bytes all_of_it{weight.data, bytes};
  kernels.digest(&all_of_it, 1, seen.digest, threads);

  const std::lock_guard<std::mutex> turn(running);
  const auto known = std::find_if(all.begin(), all.end(), [&](const Seen& other) {
    return other.kernels == seen.kernels && other.way.same_weight(way) &&
           same_place(other.weight, weight);
  });
  bool again = false;
  if (known != all.end()) {
    again = !std::memcmp(known->digest, seen.digest, sizeof seen.digest);
    if (again && known->packed) {
      std::rotate(all.begin(), known, known + 1);
      return all.front().packed;
    }
    all.erase(known);
  }
  std::shared_ptr<const PackedWeight> packed =
      std::make_shared<PackedWeight>(kernels, way, weight, threads);
  if (again) seen.packed = packed;
  all.insert(all.begin(), seen);
  if (all.size() > MOST) all.pop_back();
  return packed;
}

}  // namespace cpu
}  // namespace fastddpm
