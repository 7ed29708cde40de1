// What convolution and its gradient share: what is read, prepared for the kernels a group of images
// at a time.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "../layers/way.h"
#include "../view.h"

namespace fastddpm {
namespace cpu {

// A weight as the kernels read it, for one way on one instruction set.
struct PackedWeight {
  const Kernels* kernels;
  Way way;
  Buffer memory{nullptr, scratch_free};

  PackedWeight(const Kernels& kernels, const Way& way, const Weight& weight, int threads)
      : kernels(&kernels), way(way), memory(allocate(way.weight_floats, false)) {
    pack(kernels, way, weight, memory.get(), threads);
  }
};

// That of op.weight, on the instruction set in use.
std::unique_ptr<PackedWeight> packed_weight(const Convolution& op, int threads);

// The packed weights of one tensor. They are used again as long as all its values are the same,
// which a digest of them says, and kept from the second call on that finds them so: a weight that
// changes between calls costs no memory. Threads may share it.
class PackedWeights {
 public:
  std::shared_ptr<const PackedWeight> of(const Convolution& op, int threads);

 private:
  struct Seen {
    const Kernels* kernels;
    Way way;
    Weight weight;  // its type and strides
    uint32_t digest[DIGEST];
    std::shared_ptr<const PackedWeight> packed;  // or null: seen once
  };

  std::mutex running;
  std::vector<Seen> all;  // what was used last comes first
};

// Throws std::invalid_argument for what would lead out of bounds.
void check(const Convolution& op);

Geometry geometry_of(const Convolution& op);
Weight weight_of(const Convolution& op);

// The images themselves where they are contiguous float32 in (N, H, W, C), else null.
float* in_place(const Tensor& x, const Shape& shape);

// Memory that parts of are taken, one behind the other.
class Memory {
 public:
  explicit Memory(float* begin) : at(begin) {}
  float* take(int64_t floats) {
    float* part = at;
    at += lines(floats);
    return part;
  }

 private:
  float* at;
};

class Input {
 public:
  // joined: two sources are always prepared as one.
  Input(const Kernels& kernels, const Convolution& op, const Way& way, bool joined = false);

  int64_t floats(int64_t images) const;  // that prepare() takes

  // Images first .. first + images, in `memory` where they can't be read as they are.
  Operands prepare(int64_t first, int64_t images, Memory& memory, int threads) const;

  // Their sources alone, normalised or not; floats(images) hold them too.
  void sources(int64_t first, int64_t images, Memory& memory, int threads,
               const float* source[SOURCES]) const;

  int64_t channels[SOURCES];
  int64_t c_in_2() const { return direct ? channels[1] : 0; }

 private:
  const Kernels& kernels;
  const Convolution& op;
  const Way way;
  const float* whole[SOURCES];      // sources that are read where they lie
  bool direct;                      // whether the kernels read the sources
  std::vector<float> weight, bias;  // the norm's

  Shape source_shape(int64_t s, int64_t images) const {
    return {images, channels[s], op.source.h, op.source.w};
  }
  void normalise(PrepareInput& input, Memory& memory, int threads) const;
};

}  // namespace cpu
}  // namespace fastddpm
