// What a plan consists of once its layers are known, shared by the files that build it and run it.
#pragma once
#include <cmath>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "../layers/way.h"
#include "plan.h"

namespace fastddpm {
namespace cpu {

struct Activation {                         // or any other memory that a layer hands on or needs
  int64_t height, width, channels, floats;  // floats of an image
  int64_t first, last;                      // the layers that write it and read it last
  int64_t statistics = -1;                  // its channel statistics, where a norm needs them
  int64_t segment = -1;                     // whose layers alone use it, or -1
  int64_t offset = 0;                       // in the segment's arena or the common one, an image
};

struct Layer {
  enum Kind { CONVOLUTION, ATTENTION, RESAMPLE } kind;
  std::string name;
  std::vector<int64_t> sources;
  int64_t y, prepared = -1, coefficients = -1, residual = -1;
  // A convolution's:
  Way way{};
  int64_t time_offset = -1, modulation_offset = -1;
  bool halve = false;  // a resampling's, too; without it that doubles
  Norm norm;
  std::vector<float> bias;
  Buffer weight{nullptr, scratch_free};
  // An attention's:
  int64_t heads = 1;
};

struct Plan::State {
  const Kernels& kernels = kernels_in_use();
  std::vector<Activation> activations;
  std::vector<Layer> layers;
  bool bf16 = false;
  std::vector<Segment> segments;
  int64_t output = -1, arena = 0, time_size = 0, weights = 0;
  int64_t peak = 0, arena_floats = 0, local_floats = 0, workspace_floats = 0;
  Buffer arena_memory{nullptr, scratch_free}, local_memory{nullptr, scratch_free};
  Buffer workspace_memory{nullptr, scratch_free};
  std::mutex running;  // one run at a time has the arena

  Shape shape(int64_t id, int64_t n) const {
    const Activation& a = activations[id];
    return {n, a.channels, a.height, a.width};
  }

  // Building, in plan.cpp.
  int64_t add(int64_t height, int64_t width, int64_t channels, int64_t floats, int64_t first);
  int64_t add_image(int64_t height, int64_t width, int64_t channels);
  int64_t add_scratch(int64_t floats);
  Activation& read(const std::string& name, int64_t id);
  void need_statistics(int64_t id);
  Asked asked(const Layer& layer, const std::string& algorithm) const;
  void pack(Layer& layer, const float* weight, int threads);
  int64_t layer_floats(const Layer& layer) const;
  void divide();
  int64_t segment_of(int64_t layer) const;
  int64_t place(int64_t segment);
  void place_all();

  // Running, in run.cpp.
  int64_t c_in_2(const Layer& layer) const;
  Attention attention(const Layer& layer, int64_t images) const;
  int64_t workspace(int64_t images, int threads, bool own_biases) const;
  void reserve(int64_t n, int64_t share, int threads, bool own_biases);
};

inline bool all_finite(const float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!std::isfinite(x[i])) return false;
  return true;
}

}  // namespace cpu
}  // namespace fastddpm
