// What a plan consists of once its layers are known, shared by the files that build it and run it.
#pragma once
#include <cmath>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "../isa.h"
#include "../parallel.h"
#include "plan.h"

namespace fastddpm {
namespace cpu {

struct PlanKernels {
  const char* isa;
  decltype(&plain::channel_statistics) channel_statistics;
  decltype(&plain::group_coefficients) group_coefficients;
  decltype(&plain::prepare_input) prepare_input;
  decltype(&plain::convolve) convolve;
  decltype(&plain::attention) attention;
  decltype(&plain::convolve_workspace) convolve_workspace;
  decltype(&plain::attention_workspace) attention_workspace;
  decltype(&plain::best_algorithm) best_algorithm;
  decltype(&plain::packed_weight_size) packed_weight_size;
  decltype(&plain::pack_weight) pack_weight;
  decltype(&plain::vector_width) vector_width;
  decltype(&plain::convolve_bf16) convolve_bf16;
  decltype(&plain::attention_bf16) attention_bf16;
  decltype(&plain::attention_workspace_bf16) attention_workspace_bf16;
  decltype(&plain::packed_weight_size_bf16) packed_weight_size_bf16;
  decltype(&plain::product_rate_bf16) product_rate_bf16;
  decltype(&plain::pack_weight_bf16) pack_weight_bf16;
  decltype(&plain::posterior_step) posterior_step;
};

using Buffer = std::unique_ptr<float, void (*)(void*)>;

inline Buffer allocate(int64_t floats, bool zeroed) {
  return {static_cast<float*>(scratch_alloc(floats * int64_t(sizeof(float)), zeroed)),
          scratch_free};
}

constexpr int64_t LINE = 16;  // floats: activations begin at cache lines

inline int64_t lines(int64_t floats) { return (floats + LINE - 1) / LINE * LINE; }

struct Activation {                         // or any other memory that a layer hands on or needs
  int64_t height, width, channels, floats;  // floats of an image
  int64_t first, last;                      // the layers that write it and read it last
  int64_t statistics = -1;                  // its channel statistics, where a norm needs them
  int64_t segment = -1;                     // whose layers alone use it, or -1
  int64_t offset = 0;                       // in the segment's arena or the common one, an image
};

struct Layer {
  enum Kind { CONVOLUTION, ATTENTION } kind;
  std::string name;
  std::vector<int64_t> sources;
  int64_t y, prepared = -1, coefficients = -1, residual = -1;
  // A convolution's:
  Algorithm algorithm = Algorithm::direct;
  int64_t c_in = 0, c_out = 0, kernel = 1, stride = 1, before = 0, after = 0, repeat = 1;
  int64_t time_offset = -1, pixel = 0, image = 0;  // values of the prepared input
  bool repeated = false;                           // the kernel repeats the pixels, not `repeat`
  Norm norm;
  std::vector<float> bias;
  Buffer weight{nullptr, scratch_free};
  int64_t weight_floats = 0;
  // An attention's:
  int64_t heads = 1;
};

const PlanKernels& kernels_in_use();

struct Plan::State {
  const PlanKernels& kernels = kernels_in_use();
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
  void choose_algorithm(Layer& layer, const std::string& asked, int64_t height, int64_t width);
  void pack(Layer& layer, const float* weight);
  int64_t layer_floats(const Layer& layer) const;
  void divide();
  int64_t segment_of(int64_t layer) const;
  int64_t place(int64_t segment);
  void place_all();

  // Running, in run.cpp.
  Convolve convolution(const Layer& layer, int64_t images) const;
  ConvolveBf16 convolve_bf16(const Layer& layer, int64_t images) const;
  Attention attention(const Layer& layer, int64_t images) const;
  int64_t workspace(int64_t images, int threads) const;
  void reserve(int64_t n, int64_t share, int threads);
};

inline bool all_finite(const float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!std::isfinite(x[i])) return false;
  return true;
}

}  // namespace cpu
}  // namespace fastddpm
