// Builds plans and replays them: lifetimes, the arena, who runs which images. No kernels.
#include "plan.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "isa.h"
#include "parallel.h"
#include "view.h"

namespace fastddpm {

namespace cpu {

struct PlanKernels {
  const char* isa;
  decltype(&plain::channel_statistics) channel_statistics;
  decltype(&plain::group_coefficients) group_coefficients;
  decltype(&plain::prepare_input) prepare_input;
  decltype(&plain::convolution) convolution;
  decltype(&plain::attention) attention;
  decltype(&plain::convolution_workspace) convolution_workspace;
  decltype(&plain::attention_workspace) attention_workspace;
  decltype(&plain::best_algorithm) best_algorithm;
  decltype(&plain::packed_weight_size) packed_weight_size;
  decltype(&plain::pack_weight) pack_weight;
  decltype(&plain::vector_width) vector_width;
  decltype(&plain::convolution_bf16) convolution_bf16;
  decltype(&plain::attention_bf16) attention_bf16;
  decltype(&plain::attention_workspace_bf16) attention_workspace_bf16;
  decltype(&plain::packed_weight_size_bf16) packed_weight_size_bf16;
  decltype(&plain::pack_weight_bf16) pack_weight_bf16;
};

namespace {

#define FASTDDPM_PLAN_ROW(isa, base) \
  {#isa,                             \
   base::channel_statistics,         \
   base::group_coefficients,         \
   base::prepare_input,              \
   base::convolution,                \
   base::attention,                  \
   base::convolution_workspace,      \
   base::attention_workspace,        \
   base::best_algorithm,             \
   base::packed_weight_size,         \
   base::pack_weight,                \
   base::vector_width,               \
   isa::convolution_bf16,            \
   isa::attention_bf16,              \
   isa::attention_workspace_bf16,    \
   isa::packed_weight_size_bf16,     \
   isa::pack_weight_bf16},

const PlanKernels table[] = {FASTDDPM_EACH_ISA(FASTDDPM_PLAN_ROW)};

const PlanKernels& kernels_in_use() {
  for (const PlanKernels& row : table)
    if (!std::strcmp(row.isa, isa())) return row;
  return table[0];
}

using Buffer = std::unique_ptr<float, void (*)(void*)>;

Buffer allocate(int64_t floats, bool zeroed) {
  return {static_cast<float*>(scratch_alloc(floats * int64_t(sizeof(float)), zeroed)),
          scratch_free};
}

constexpr int64_t LINE = 16;                      // floats: activations begin at cache lines
constexpr int64_t STEP = 32;                      // channels: bfloat16 pixels are whole steps
constexpr int64_t OVERREAD = 15;                  // pixels: see ConvolutionBf16
constexpr int64_t GROUP_BYTES = 2 * 1024 * 1024;  // of a group's activations, about
constexpr int64_t SHARED_WEIGHT_BYTES = 16 * 1024 * 1024;  // more do not stay in a shared cache

struct Activation {                         // or any other memory that a layer hands on or needs
  int64_t height, width, channels, floats;  // floats of an image
  int64_t first, last;                      // the layers that write it and read it last
  int64_t statistics = -1;                  // its channel statistics, where a norm needs them
  int64_t offset = 0;                       // in the arena, in floats an image
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

bool all_finite(const float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!std::isfinite(x[i])) return false;
  return true;
}

[[noreturn]] void refuse(const std::string& name, const std::string& what) {
  throw std::invalid_argument(name + ": " + what);
}

}  // namespace

struct Plan::State {
  const PlanKernels& kernels = kernels_in_use();
  std::vector<Activation> activations;
  std::vector<Layer> layers;
  bool bf16 = false;
  int64_t output = -1, arena = 0, time_size = 0, weights = 0;
  int64_t peak = 0, arena_floats = 0, workspace_floats = 0;
  Buffer arena_memory{nullptr, scratch_free}, workspace_memory{nullptr, scratch_free};

  // ---- building --------------------------------------------------------------------------------

  int64_t add(int64_t height, int64_t width, int64_t channels, int64_t floats, int64_t first) {
    activations.push_back(
        {height, width, channels, (floats + LINE - 1) / LINE * LINE, first, first});
    return int64_t(activations.size()) - 1;
  }

  int64_t add_image(int64_t height, int64_t width, int64_t channels) {
    return add(height, width, channels, height * width * channels, int64_t(layers.size()));
  }

  int64_t add_scratch(int64_t floats) { return add(0, 0, 0, floats, int64_t(layers.size())); }

  Activation& read(const std::string& name, int64_t id) {
    if (output >= 0) refuse(name, "the plan is finished: no layer can follow");
    if (id < 0 || id >= int64_t(activations.size()) || !activations[id].channels)
      refuse(name, "there is no activation " + std::to_string(id));
    Activation& activation = activations[id];
    activation.last = int64_t(layers.size());
    return activation;
  }

  void need_statistics(int64_t id) {
    if (activations[id].statistics < 0) {
      const int64_t statistics = add(0, 0, 0, 2 * activations[id].channels, activations[id].first);
      activations[id].statistics = statistics;
    }
    activations[activations[id].statistics].last = int64_t(layers.size());
  }

  // Sets what follows from the algorithm: how the input has to lie.
  void choose_algorithm(Layer& layer, const std::string& asked, int64_t height, int64_t width) {
    const bool square = layer.kernel == 3 && layer.stride == 1;
    if (bf16) {
      if (asked != "auto" && asked != "bf16")
        refuse(layer.name, "algorithm must be 'auto' or 'bf16' in bfloat16; got '" + asked + "'");
      layer.pixel = (layer.c_in + STEP - 1) / STEP * STEP;
      layer.repeated = square && layer.repeat == 2 && layer.before == 1 && layer.after == 1;
      if (layer.repeated) layer.repeat = 1;
      return;
    }
    if (asked == "auto")
      layer.algorithm = square ? kernels.best_algorithm(layer.c_in, layer.c_out, height, width)
                               : Algorithm::direct;
    else if (asked == "winograd_2" || asked == "winograd_4")
      layer.algorithm = square ? Algorithm(asked.back() - '0') : Algorithm::direct;
    else if (asked != "direct")
      refuse(layer.name, "algorithm must be 'auto', 'direct', 'winograd_2' or 'winograd_4'; got '" +
                             asked + "'");
    layer.pixel = layer.c_in;
    if (const int64_t m = int64_t(layer.algorithm)) {
      // Whole tiles and whole vectors can be read: what the image lacks is zeros.
      const int64_t vector = kernels.vector_width();
      layer.pixel = (layer.c_in + vector - 1) / vector * vector;
      layer.after += std::max((height + m - 1) / m * m - height, (width + m - 1) / m * m - width);
    }
  }

  void pack(Layer& layer, const float* weight) {
    const int64_t c_in = layer.c_in, c_out = layer.c_out, kernel = layer.kernel;
    layer.weight_floats =
        bf16 ? kernels.packed_weight_size_bf16(c_in, c_out, kernel, layer.repeated) / 2
             : kernels.packed_weight_size(layer.algorithm, c_in, c_out, kernel);
    layer.weight = allocate(layer.weight_floats, true);
    if (bf16)
      kernels.pack_weight_bf16(weight, c_in, c_out, kernel, layer.repeated,
                               reinterpret_cast<BF16*>(layer.weight.get()));
    else
      kernels.pack_weight(layer.algorithm, weight, c_in, c_out, kernel, layer.weight.get());
    weights += layer.weight_floats * int64_t(sizeof(float));
  }

  // First fit, largest first: two activations share memory if no layer needs both.
  void place() {
    std::vector<Activation*> order, placed;
    for (Activation& a : activations) order.push_back(&a);
    std::stable_sort(order.begin(), order.end(), [](const Activation* a, const Activation* b) {
      return a->floats > b->floats;
    });
    for (Activation* a : order) {
      std::vector<Activation*> rivals;
      for (Activation* b : placed)
        if (a->first <= b->last && b->first <= a->last) rivals.push_back(b);
      std::sort(rivals.begin(), rivals.end(),
                [](const Activation* b, const Activation* c) { return b->offset < c->offset; });
      for (const Activation* b : rivals)
        if (a->offset + a->floats > b->offset && b->offset + b->floats > a->offset)
          a->offset = b->offset + b->floats;
      placed.push_back(a);
      arena = std::max(arena, a->offset + a->floats);
    }
  }

  // ---- running ---------------------------------------------------------------------------------

  struct Run {  // of one group of images
    float *arena, *workspace;
    int64_t capacity, images;  // that the arena holds, that are there
    const float* time;
    int threads;
  };

  float* memory(const Run& run, int64_t id) const {
    return run.arena + activations[id].offset * run.capacity;
  }

  Convolution convolution(const Layer& layer, int64_t images) const {
    const Activation &y = activations[layer.y], &x = activations[layer.sources[0]];
    Convolution op{};
    op.algorithm = layer.algorithm;
    op.images = images, op.c_in = layer.c_in, op.c_out = layer.c_out;
    if (layer.prepared < 0 && layer.sources.size() == 2) {
      op.c_in_2 = activations[layer.sources[1]].channels;
      op.c_in -= op.c_in_2;
    }
    op.kernel = layer.kernel, op.stride = layer.stride,
    op.pixel = layer.prepared < 0 ? op.c_in : layer.pixel;
    op.rows = x.height * layer.repeat + layer.before + layer.after;
    op.columns = x.width * layer.repeat + layer.before + layer.after;
    op.height = y.height, op.width = y.width;
    op.weight = layer.weight.get();
    return op;
  }

  ConvolutionBf16 convolution_bf16(const Layer& layer, int64_t images) const {
    const Activation &y = activations[layer.y], &x = activations[layer.sources[0]];
    ConvolutionBf16 op{};
    op.images = images, op.c_in = layer.c_in, op.c_out = layer.c_out;
    op.kernel = layer.kernel, op.stride = layer.stride, op.repeated = layer.repeated;
    op.rows = x.height * layer.repeat + layer.before + layer.after;
    op.columns = x.width * layer.repeat + layer.before + layer.after;
    op.pixel = layer.pixel, op.image = layer.image;
    op.height = y.height, op.width = y.width;
    op.weight = reinterpret_cast<const BF16*>(layer.weight.get());
    return op;
  }

  Attention attention(const Layer& layer, int64_t images) const {
    const Activation& y = activations[layer.y];
    return {images, y.height * y.width, y.channels, layer.heads, nullptr, nullptr};
  }

  // Per thread of an outer loop, or of all threads of an inner one: biases, then what kernels need.
  int64_t workspace(int64_t images, int threads) const {
    int64_t most = 0, bias = 0;
    for (const Layer& layer : layers) {
      bias = std::max(bias, layer.c_out);
      if (layer.kind == Layer::ATTENTION) {
        const auto needs = bf16 ? kernels.attention_workspace_bf16 : kernels.attention_workspace;
        most = std::max(most, needs(attention(layer, images), threads));
      } else if (!bf16) {
        most = std::max(most, kernels.convolution_workspace(convolution(layer, images), threads));
      }
    }
    return (bias + LINE - 1) / LINE * LINE + (most + LINE - 1) / LINE * LINE + LINE;
  }

  void run_statistics(const Run& run, int64_t id) const {
    const Activation& x = activations[id];
    if (x.statistics < 0) return;
    float* mean = memory(run, x.statistics);
    kernels.channel_statistics({run.images, x.height * x.width, x.channels, memory(run, id), mean,
                                mean + run.images * x.channels},
                               run.threads);
  }

  void run_input(const Run& run, const Layer& layer) const {
    const Activation& x = activations[layer.sources[0]];
    PrepareInput op{};
    op.images = run.images, op.height = x.height, op.width = x.width;
    for (size_t s = 0; s < layer.sources.size(); ++s) {
      op.channels[s] = activations[layer.sources[s]].channels;
      op.source[s] = memory(run, layer.sources[s]);
    }
    if (layer.norm.groups) {
      GroupCoefficients norm{};
      norm.images = run.images, norm.pixels = x.height * x.width, norm.groups = layer.norm.groups;
      for (size_t s = 0; s < layer.sources.size(); ++s) {
        norm.channels[s] = op.channels[s];
        norm.mean[s] = memory(run, activations[layer.sources[s]].statistics);
        norm.squares[s] = norm.mean[s] + run.images * op.channels[s];
      }
      norm.eps = layer.norm.eps;
      norm.weight = layer.norm.weight.data(), norm.bias = layer.norm.bias.data();
      norm.centre = memory(run, layer.coefficients);
      norm.scale = norm.centre + run.images * layer.c_in;
      norm.shift = norm.scale + run.images * layer.c_in;
      kernels.group_coefficients(norm, run.threads);
      op.centre = norm.centre, op.scale = norm.scale, op.shift = norm.shift;
    }
    op.silu = layer.norm.silu;
    op.repeat = layer.repeat, op.before = layer.before, op.after = layer.after;
    op.pixel = layer.pixel, op.image = layer.image;
    if (bf16)
      op.out_bf16 = reinterpret_cast<BF16*>(memory(run, layer.prepared));
    else
      op.out = memory(run, layer.prepared);
    kernels.prepare_input(op, run.threads);
  }

  void run_attention(const Run& run, const Layer& layer) const {
    Attention op = attention(layer, run.images);
    op.qkv = memory(run, layer.sources[0]), op.y = memory(run, layer.y);
    (bf16 ? kernels.attention_bf16 : kernels.attention)(op, run.workspace, run.threads);
  }

  void run_convolution(const Run& run, const Layer& layer) const {
    const float* bias = layer.bias.data();
    float* workspace = run.workspace;
    if (layer.time_offset >= 0) {
      for (int64_t c = 0; c < layer.c_out; ++c)
        workspace[c] = layer.bias[c] + run.time[layer.time_offset + c];
      bias = workspace;
      workspace += (layer.c_out + LINE - 1) / LINE * LINE;
    }
    if (layer.prepared >= 0) run_input(run, layer);
    const float* x = memory(run, layer.prepared >= 0 ? layer.prepared : layer.sources[0]);
    const float* residual = layer.residual >= 0 ? memory(run, layer.residual) : nullptr;
    if (bf16) {
      ConvolutionBf16 op = convolution_bf16(layer, run.images);
      op.x = reinterpret_cast<const BF16*>(x);
      op.bias = bias, op.residual = residual, op.y = memory(run, layer.y);
      return kernels.convolution_bf16(op, run.threads);
    }
    Convolution op = convolution(layer, run.images);
    op.x = x, op.bias = bias, op.residual = residual, op.y = memory(run, layer.y);
    if (op.c_in_2) op.x_2 = memory(run, layer.sources[1]);
    kernels.convolution(op, workspace, run.threads);
  }

  void run_layer(const Run& run, const Layer& layer) const {
    if (layer.kind == Layer::ATTENTION)
      run_attention(run, layer);
    else
      run_convolution(run, layer);
    run_statistics(run, layer.y);
  }

  Shape shape(int64_t id, int64_t n) const {
    const Activation& a = activations[id];
    return {n, a.channels, a.height, a.width};
  }

  // Images first .. first + run.images of x into the arena, and of the result out of it.
  void run_load(const Run& run, const Tensor& x, int64_t first) const {
    const int64_t count = numel(shape(0, 1));
    parallel_for(run.images, run.images * count, run.threads, [&](int64_t i, int) {
      load(view(x, shape(0, 1), first + i, Order::hwc), 0, count, memory(run, 0) + i * count);
    });
    run_statistics(run, 0);
  }

  void run_store(const Run& run, const Tensor& out, int64_t first) const {
    const int64_t count = numel(shape(output, 1));
    for (int64_t i = 0; i < run.images; ++i)
      store(view(out, shape(output, 1), first + i, Order::hwc), 0, count,
            memory(run, output) + i * count);
  }

  // Memory for `slots` groups of `capacity` images at once, each on `threads` threads.
  void reserve(int64_t slots, int64_t capacity, int threads) {
    if (output < 0) throw std::invalid_argument("the plan is not finished");
    const auto grow = [&](Buffer& buffer, int64_t& floats, int64_t needed) {
      if (needed <= floats) return;
      buffer.reset();
      floats = 0;
      buffer = allocate(needed, false);
      floats = needed;
    };
    grow(arena_memory, arena_floats, slots * capacity * arena);
    grow(workspace_memory, workspace_floats, slots * workspace(capacity, threads));
    peak = std::max(peak, (arena_floats + workspace_floats) * int64_t(sizeof(float)));
  }

  Run slot(int64_t index, int64_t capacity, const float* time, int threads) const {
    return {arena_memory.get() + index * capacity * arena,
            workspace_memory.get() + index * workspace(capacity, threads),
            capacity,
            0,
            time,
            threads};
  }

  // All n images through the layers, one after the other on all threads; visit(run, index) after
  // layer `index`, stop at the first for which it is false.
  template <class Visit>
  void one_by_one(const Tensor& x, int64_t n, const float* time, int threads, const Visit& visit) {
    reserve(1, n, threads);
    Run run = slot(0, n, time, threads);
    run.images = n;
    run_load(run, x, 0);
    for (size_t i = 0; i < layers.size(); ++i) {
      run_layer(run, layers[i]);
      if (!visit(run, i)) return;
    }
  }
};

Plan::Plan(int64_t height, int64_t width, int64_t channels, bool bf16) : state(new State) {
  state->bf16 = bf16;
  if (height < 1 || width < 1 || channels < 1)
    refuse("input", "height, width and channels must be positive");
  state->add_image(height, width, channels);
}

Plan::~Plan() = default;

int64_t Plan::convolution(const ConvolutionLayer& spec) {
  State& s = *state;
  const std::string& name = spec.name;
  if (spec.sources.empty() || int64_t(spec.sources.size()) > SOURCES)
    refuse(name, "a convolution reads one or two activations");
  Layer layer{};
  layer.kind = Layer::CONVOLUTION;
  layer.name = name, layer.sources = spec.sources, layer.residual = spec.residual;
  const Activation x = s.read(name, spec.sources[0]);
  for (int64_t id : spec.sources) {
    const Activation& source = s.read(name, id);
    if (source.height != x.height || source.width != x.width)
      refuse(name, "its sources differ in height or width");
    layer.c_in += source.channels;
  }
  if (spec.kernel != 1 && spec.kernel != 3) refuse(name, "kernel must be 1 or 3");
  if (spec.stride < 1 || spec.stride > 2 || spec.repeat < 1 || spec.repeat > 2)
    refuse(name, "stride and repeat must be 1 or 2");
  if (spec.before < 0 || spec.before > 1 || spec.after < 0 || spec.after > 1)
    refuse(name, "a border must be 0 or 1");
  if (spec.c_out < 1 || int64_t(spec.bias.size()) != spec.c_out)
    refuse(name, "bias must have a value for each output channel");
  layer.c_out = spec.c_out, layer.kernel = spec.kernel, layer.stride = spec.stride;
  layer.before = spec.before, layer.after = spec.after, layer.repeat = spec.repeat;
  layer.norm = spec.norm, layer.bias = spec.bias, layer.time_offset = spec.time_offset;
  const int64_t rows = x.height * spec.repeat + spec.before + spec.after - spec.kernel;
  const int64_t columns = x.width * spec.repeat + spec.before + spec.after - spec.kernel;
  if (rows < 0 || columns < 0) refuse(name, "the input is smaller than the kernel");
  const int64_t height = rows / spec.stride + 1, width = columns / spec.stride + 1;
  const Norm& norm = spec.norm;
  if (norm.groups < 0 || (norm.groups && layer.c_in % norm.groups))
    refuse(name, "num_groups must divide the " + std::to_string(layer.c_in) + " channels");
  if (norm.groups &&
      (int64_t(norm.weight.size()) != layer.c_in || int64_t(norm.bias.size()) != layer.c_in))
    refuse(name, "the norm must have a weight and a bias for each channel");
  if (!all_finite(spec.weight, spec.c_out * layer.c_in * spec.kernel * spec.kernel) ||
      !all_finite(spec.bias.data(), spec.c_out) ||
      !all_finite(norm.weight.data(), int64_t(norm.weight.size())) ||
      !all_finite(norm.bias.data(), int64_t(norm.bias.size())))
    refuse(name, "its weights hold a NaN or an infinity");
  if (spec.residual >= 0) {
    const Activation& r = s.read(name, spec.residual);
    if (r.height != height || r.width != width || r.channels != spec.c_out)
      refuse(name, "the residual must be like the result");
  }

  s.choose_algorithm(layer, spec.algorithm, height, width);
  s.pack(layer, spec.weight);
  if (norm.groups) {
    for (int64_t id : layer.sources) s.need_statistics(id);
    layer.coefficients = s.add_scratch(3 * layer.c_in);
  }
  const bool as_it_is = !s.bf16 && layer.kernel == 1 && layer.stride == 1 && !norm.groups &&
                        !norm.silu && !layer.before && !layer.after && layer.repeat == 1;
  if (!as_it_is) {
    layer.image = (x.height * layer.repeat + layer.before + layer.after) *
                  (x.width * layer.repeat + layer.before + layer.after) * layer.pixel;
    if (s.bf16) layer.image += OVERREAD * layer.stride * layer.pixel;
    layer.prepared = s.add_scratch(s.bf16 ? layer.image / 2 : layer.image);
  }
  if (layer.time_offset >= 0) s.time_size = std::max(s.time_size, layer.time_offset + layer.c_out);
  layer.y = s.add_image(height, width, layer.c_out);
  s.layers.push_back(std::move(layer));
  return s.layers.back().y;
}

int64_t Plan::attention(const std::string& name, int64_t qkv, int64_t heads) {
  State& s = *state;
  const Activation x = s.read(name, qkv);
  if (heads < 1 || x.channels % (3 * heads))
    refuse(name, "num_heads must divide the channels; got " + std::to_string(heads) + " and " +
                     std::to_string(x.channels / 3));
  Layer layer{};
  layer.kind = Layer::ATTENTION;
  layer.name = name, layer.sources = {qkv}, layer.heads = heads;
  layer.y = s.add_image(x.height, x.width, x.channels / 3);
  s.layers.push_back(std::move(layer));
  return s.layers.back().y;
}

void Plan::finish(int64_t output) {
  state->read("output", output).last = int64_t(state->layers.size());
  state->output = output;
  state->place();
}

void Plan::forward(const Tensor& x, int64_t n, const float* time, const Tensor& out, int threads,
                   int64_t group) {
  State& s = *state;
  if (n == 0) return;
  const bool outer = n >= threads && s.weights <= SHARED_WEIGHT_BYTES;
  if (!outer) {
    s.one_by_one(x, n, time, threads, [&](const State::Run& run, size_t i) {
      if (i + 1 == s.layers.size()) s.run_store(run, out, 0);
      return true;
    });
    return;
  }
  // Images go through all layers in groups that stay in a core's cache, each thread its own.
  const int64_t fit = std::max<int64_t>(1, GROUP_BYTES / image_bytes());
  const int64_t share = (n + threads - 1) / threads;
  const int64_t capacity = std::min(group > 0 ? group : fit, share);
  const int64_t groups = (n + capacity - 1) / capacity;
  s.reserve(threads, capacity, 1);
  const auto body = [&](int64_t job, int thread) {
    State::Run run = s.slot(thread, capacity, time, 1);
    run.images = std::min(capacity, n - job * capacity);
    s.run_load(run, x, job * capacity);
    for (const Layer& layer : s.layers) s.run_layer(run, layer);
    s.run_store(run, out, job * capacity);
  };
  parallel_for(groups, SERIAL_ELEMENTS, threads, body);
}

std::vector<double> Plan::profile(const Tensor& x, int64_t n, const float* time, const Tensor& out,
                                  int threads) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> seconds;
  Clock::time_point last;
  const auto visit = [&](const State::Run& run, size_t i) {
    const Clock::time_point now = Clock::now();
    seconds.push_back(std::chrono::duration<double>(now - last).count());
    if (i + 1 == state->layers.size()) state->run_store(run, out, 0);
    last = Clock::now();
    return true;
  };
  last = Clock::now();
  state->one_by_one(x, n, time, threads, visit);
  return seconds;
}

std::string Plan::not_finite(const Tensor& x, int64_t n, const float* time, int threads) {
  std::string name;
  state->one_by_one(x, n, time, threads, [&](const State::Run& run, size_t i) {
    const Layer& layer = state->layers[i];
    const bool finite =
        all_finite(state->memory(run, layer.y), n * numel(state->shape(layer.y, 1)));
    if (!finite) name = layer.name;
    return finite;
  });
  return name;
}

int64_t Plan::channels(int64_t activation) const {
  const auto& all = state->activations;
  const bool known = activation >= 0 && activation < int64_t(all.size());
  if (!known || !all[size_t(activation)].channels)
    throw std::invalid_argument("there is no activation " + std::to_string(activation));
  return all[size_t(activation)].channels;
}

std::vector<LayerReport> Plan::layers() const {
  static const char* const names[] = {"direct", "", "winograd_2", "", "winograd_4"};
  std::vector<LayerReport> reports;
  for (const Layer& layer : state->layers) {
    const Activation& y = state->activations[layer.y];
    const double pixels = double(y.height * y.width);
    if (layer.kind == Layer::ATTENTION)
      reports.push_back({layer.name, "attention", y.channels, y.channels, y.height, y.width, 0,
                         4.0 * pixels * pixels * double(y.channels)});
    else
      reports.push_back(
          {layer.name, state->bf16 ? "bf16" : names[int(layer.algorithm)], layer.c_in, layer.c_out,
           y.height, y.width, layer.kernel,
           2.0 * pixels * double(layer.c_in * layer.c_out * layer.kernel * layer.kernel)});
  }
  return reports;
}

Shape Plan::input_shape(int64_t n) const { return state->shape(0, n); }

Shape Plan::output_shape(int64_t n) const {
  if (state->output < 0) throw std::invalid_argument("the plan is not finished");
  return state->shape(state->output, n);
}

int64_t Plan::time_size() const { return state->time_size; }

int64_t Plan::weight_bytes() const { return state->weights; }

int64_t Plan::image_bytes() const { return state->arena * int64_t(sizeof(float)); }

int64_t Plan::peak_bytes() const { return state->peak + state->weights; }

const char* Plan::isa() const { return state->kernels.isa; }

}  // namespace cpu
}  // namespace fastddpm
