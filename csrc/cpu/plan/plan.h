// A network as a list of native calls over one arena: built layer by layer, then replayed.
#pragma once
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../ops.h"
#include "../layers/layers.h"

namespace fastddpm {
namespace cpu {

// GroupNorm of a layer's input, then SiLU if `silu`.
struct Norm {
  int64_t groups = 0;  // 0: none
  float eps = 0.0f;
  std::vector<float> weight, bias;  // (channels of all sources,)
  bool silu = false;
};

// What the layers take of the time: a row of time_size() floats for each image, `image` floats from
// one to the next; 0: one for all.
struct Time {
  const float* row;
  int64_t image;
};

// y = conv(norm(sources side by side)) + bias + time[offset ...] (+ residual).
struct ConvolutionLayer {
  std::string name;
  std::vector<int64_t> sources;  // activations of one size, one or two
  const float* weight;           // (c_out, channels of all sources, kernel, kernel), copied
  int64_t c_out, kernel;         // kernel 1 or 3
  std::vector<float> bias;       // (c_out,)
  int64_t time_offset = -1;      // of its c_out values in the row of time embeddings, or -1
  Norm norm;
  int64_t modulation_offset = -1;  // of the norm's (scale, shift), (1 + scale) norm + shift, each
                                   // of all channels, in the row of time embeddings, or -1
  int64_t residual = -1;           // an activation like y, or -1
  int64_t stride = 1, before = 0, after = 0;  // the border of zeros, before and after
  int64_t repeat = 1;                         // 2: each pixel of the sources becomes 2x2 first
  bool halve = false;              // 2x2 pixels, normed, become their mean first; repeat is 1
  std::string algorithm = "auto";  // or "direct", "winograd_2", "winograd_4"; "bf16" in bfloat16
  int threads = 1;                 // that pack the weight
};

// A layer as it will run, for reports.
struct LayerReport {
  std::string name, algorithm;
  int64_t c_in, c_out, height, width, kernel;
  double flop;  // of an image, by the definition of the layer
};

// Layers first .. last, the last excluded, that run in one of two ways: each on all images with all
// threads, or, if `by_image`, all of them on a few images that stay in a core's cache, each thread
// on its own.
struct Segment {
  int64_t first, last;
  bool by_image;
  int64_t arena = 0;  // floats an image
};

// Every method throws std::invalid_argument that names the layer and what does not fit. Results
// have the same bits for every n, threads and group on one instruction set.
class Plan {
 public:
  // The input: (n, channels, height, width) at each forward. Uses the instruction set in use now.
  // bf16: products of bfloat16 operands; sums, statistics and all that is added stay float32.
  Plan(int64_t height, int64_t width, int64_t channels, bool bf16 = false);
  ~Plan();

  int64_t convolution(const ConvolutionLayer& layer);                      // returns y
  int64_t attention(const std::string& name, int64_t qkv, int64_t heads);  // returns y
  // Returns y, x with each pixel as 2x2 if `doubles`, else the means of its 2x2 pixels.
  int64_t resample(const std::string& name, int64_t x, bool doubles);
  void finish(int64_t output);  // places all activations in the arena; no layer can follow

  // out = network(x). Threads of the caller take turns. group: images that go through all layers
  // together, 0: chosen. step: what each image does next, n samples whose model_output lies in out,
  // checked by check(); or null. Returns whether all of out is finite.
  bool forward(const Tensor& x, int64_t n, Time time, const Tensor& out, int threads, int64_t group,
               const PosteriorStep* step = nullptr);

  // forward with the seconds of each layer, one layer after the other on all threads.
  std::vector<double> profile(const Tensor& x, int64_t n, Time time, const Tensor& out,
                              int threads);

  // The first layer whose result has a NaN or an infinity for this input, or "".
  std::string not_finite(const Tensor& x, int64_t n, Time time, int threads);

  int64_t channels(int64_t activation) const;
  std::vector<LayerReport> layers() const;
  const std::vector<Segment>& segments() const;
  Shape input_shape(int64_t n) const;
  Shape output_shape(int64_t n) const;
  int64_t time_size() const;
  int64_t weight_bytes() const;  // packed
  int64_t image_bytes() const;   // the arena's share of one image
  int64_t peak_bytes() const;    // allocated so far: arena, workspaces and weights
  const char* isa() const;

  // Memory begins as zeros: Plan.__new__ without __init__ makes a Python object around it, which
  // then is one without a state.
  static void* operator new(size_t size) { return std::memset(::operator new(size), 0, size); }
  static void operator delete(void* memory) { ::operator delete(memory); }

  struct State;

 private:
  struct Made : std::unique_ptr<State> {  // a state that is there
    using std::unique_ptr<State>::unique_ptr;
    State* operator->() const {
      if (!get()) throw std::invalid_argument("the plan was never initialised");
      return get();
    }
    State& operator*() const { return *operator->(); }
  };
  Made state;
};

}  // namespace cpu
}  // namespace fastddpm
