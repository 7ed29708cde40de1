// Runs plans: memory for the images at hand, which thread takes which of them, and every layer's
// call of its kernels.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <new>
#include <stdexcept>
#include <tuple>

#include "../view.h"
#include "state.h"

namespace fastddpm {
namespace cpu {
namespace {

constexpr int64_t GROUP_BYTES = 2 * 1024 * 1024;  // of the activations of a thread's images, about
constexpr int64_t MAX_ARENA = int64_t(1) << 52;   // floats: what is more would overflow on the way

}  // namespace

Attention Plan::State::attention(const Layer& layer, int64_t images) const {
  const Activation& y = activations[layer.y];
  return {images, y.height * y.width, y.channels, layer.heads, nullptr, nullptr};
}

// The channels of a second source that is read as it is.
int64_t Plan::State::c_in_2(const Layer& layer) const {
  if (layer.prepared >= 0 || layer.sources.size() < 2) return 0;
  return activations[layer.sources[1]].channels;
}

// Per thread of an outer loop, or of all threads of an inner one: biases, of all images or each
// one's, then what kernels need.
int64_t Plan::State::workspace(int64_t images, int threads, bool own_biases) const {
  int64_t most = 0, bias = 0;
  for (const Layer& layer : layers) {
    if (layer.kind == Layer::RESAMPLE) continue;
    bias = std::max(bias, layer.way.is.c_out * (own_biases ? images : 1));
    if (layer.kind == Layer::ATTENTION) {
      const auto needs = bf16 ? kernels.attention_workspace_bf16 : kernels.attention_workspace;
      most = std::max(most, needs(attention(layer, images), threads));
    } else {
      most = std::max(most, cpu::workspace(kernels, layer.way, images, c_in_2(layer), threads));
    }
  }
  return lines(bias) + lines(most) + LINE;
}

// Memory for n images, of which each thread takes `share` at a time where a segment runs by
// image; 0: none does.
void Plan::State::reserve(int64_t n, int64_t share, int threads, bool own_biases) {
  if (output < 0) throw std::invalid_argument("the plan is not finished");
  const auto grow = [&](Buffer& buffer, int64_t& floats, int64_t needed) {
    if (needed <= floats) return;
    buffer.reset();
    floats = 0;
    buffer = allocate(needed, false);
    floats = needed;
  };
  for (const Segment& segment : segments)
    if (n > MAX_ARENA / (arena + segment.arena + 1)) throw std::bad_alloc();
  int64_t local = 0, work = 0;
  const int64_t shares = share ? threads * workspace(share, 1, own_biases) : 0;
  const int64_t all = workspace(n, threads, own_biases);
  for (const Segment& segment : segments) {
    const bool by_image = segment.by_image && share;
    local = std::max(local, (by_image ? threads * share : n) * segment.arena);
    work = std::max(work, by_image ? shares : all);
  }
  grow(arena_memory, arena_floats, n * arena);
  grow(local_memory, local_floats, local);
  grow(workspace_memory, workspace_floats, work);
  peak = std::max(peak, (arena_floats + local_floats + workspace_floats) * int64_t(sizeof(float)));
}

namespace {

// A segment's layers on a group of images.
struct Run {
  const Plan::State& plan;
  const Time time;
  int64_t first, images;  // the group's
  int threads;
  int64_t capacity, local_capacity;  // images that there is memory for
  float *arena, *local, *workspace;

  Run(const Plan::State& plan, int64_t n, Time time, int threads)  // all images
      : plan(plan),
        time(time),
        first(0),
        images(n),
        threads(threads),
        capacity(n),
        local_capacity(n),
        arena(plan.arena_memory.get()),
        local(plan.local_memory.get()),
        workspace(plan.workspace_memory.get()) {}

  // Group `job` of `share` images at most, on one thread; needs: floats of its workspace.
  Run(const Plan::State& plan, int64_t n, Time time, const Segment& segment, int64_t job,
      int64_t share, int64_t needs, int thread)
      : Run(plan, n, time, 1) {
    first = job * share, images = std::min(share, n - first);
    local += thread * share * segment.arena, local_capacity = share;
    workspace += thread * needs;
  }

  float* memory(int64_t id) const {
    const Activation& a = plan.activations[id];
    if (a.segment >= 0) return local + a.offset * local_capacity;
    return arena + a.offset * capacity + first * a.floats;
  }

  // Means of the group's images, then from the second pointer on their sums of squares.
  std::pair<float*, float*> statistics(int64_t id) const {
    const Activation& a = plan.activations[plan.activations[id].statistics];
    const int64_t channels = plan.activations[id].channels;
    if (a.segment >= 0) {
      float* mean = local + a.offset * local_capacity;
      return {mean, mean + local_capacity * channels};
    }
    float* mean = arena + a.offset * capacity + first * channels;
    return {mean, mean + capacity * channels};
  }

  void write_statistics(int64_t id) const {
    const Activation& x = plan.activations[id];
    if (x.statistics < 0) return;
    const auto [mean, squares] = statistics(id);
    plan.kernels.channel_statistics(
        {images, x.height * x.width, x.channels, memory(id), mean, squares}, threads);
  }

  void run_input(const Layer& layer) const {
    const Activation& x = plan.activations[layer.sources[0]];
    PrepareInput op = preparation(layer.way, images);
    op.halve = layer.halve, op.height = x.height, op.width = x.width;
    for (size_t s = 0; s < layer.sources.size(); ++s) {
      op.channels[s] = plan.activations[layer.sources[s]].channels;
      op.source[s] = memory(layer.sources[s]);
    }
    if (layer.norm.groups) {
      GroupCoefficients norm{};
      norm.images = images, norm.pixels = x.height * x.width, norm.groups = layer.norm.groups;
      for (size_t s = 0; s < layer.sources.size(); ++s) {
        norm.channels[s] = op.channels[s];
        std::tie(norm.mean[s], norm.squares[s]) = statistics(layer.sources[s]);
      }
      norm.eps = layer.norm.eps;
      norm.weight = layer.norm.weight.data(), norm.bias = layer.norm.bias.data();
      norm.centre = memory(layer.coefficients);
      norm.scale = norm.centre + images * layer.way.is.c_in;
      norm.shift = norm.scale + images * layer.way.is.c_in;
      if (layer.modulation_offset >= 0) {
        norm.gain = row(0) + layer.modulation_offset, norm.addend = norm.gain + layer.way.is.c_in;
        norm.modulation = time.image;
      }
      plan.kernels.group_coefficients(norm, threads);
      op.centre = norm.centre, op.scale = norm.scale, op.shift = norm.shift;
    }
    op.silu = layer.norm.silu;
    prepare(plan.kernels, layer.way, op, memory(layer.prepared), threads);
  }

  // The row of the time of one of the group's images.
  const float* row(int64_t image) const { return time.row + (first + image) * time.image; }

  void run_resample(const Layer& layer) const {
    const Activation &x = plan.activations[layer.sources[0]], &y = plan.activations[layer.y];
    PrepareInput op{};
    op.images = images, op.height = x.height, op.width = x.width;
    op.channels[0] = op.pixel = x.channels, op.source[0] = memory(layer.sources[0]);
    op.halve = layer.halve, op.repeat = layer.halve ? 1 : 2;
    op.image = y.floats, op.out = memory(layer.y);
    plan.kernels.prepare_input(op, threads);
  }

  void run_attention(const Layer& layer) const {
    Attention op = plan.attention(layer, images);
    op.qkv = memory(layer.sources[0]), op.y = memory(layer.y);
    (plan.bf16 ? plan.kernels.attention_bf16 : plan.kernels.attention)(op, workspace, threads);
  }

  void run_convolution(const Layer& layer) const {
    Operands operands{};
    operands.bias = layer.bias.data();
    float* scratch = workspace;
    if (layer.time_offset >= 0) {
      const int64_t c_out = layer.way.is.c_out, rows = time.image ? images : 1;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < c_out; ++c)
          scratch[i * c_out + c] = layer.bias[c] + row(i)[layer.time_offset + c];
      operands.bias = scratch, operands.bias_image = time.image ? c_out : 0;
      scratch += lines(rows * c_out);
    }
    if (layer.prepared >= 0) run_input(layer);
    operands.x = memory(layer.prepared >= 0 ? layer.prepared : layer.sources[0]);
    operands.c_in_2 = plan.c_in_2(layer);
    if (operands.c_in_2) operands.x_2 = memory(layer.sources[1]);
    operands.weight = layer.weight.get();
    if (layer.residual >= 0) operands.residual = memory(layer.residual);
    operands.y = memory(layer.y);
    convolve(plan.kernels, layer.way, images, operands, scratch, threads);
  }

  void run_layer(const Layer& layer) const {
    if (layer.kind == Layer::RESAMPLE)
      run_resample(layer);
    else if (layer.kind == Layer::ATTENTION)
      run_attention(layer);
    else
      run_convolution(layer);
    write_statistics(layer.y);
  }

  // The group's images of x into the arena, and of the result out of it.
  void run_load(const Tensor& x) const {
    const int64_t count = numel(plan.shape(0, 1));
    parallel_for(images, images * count, threads, [&](int64_t i, int) {
      load(view(x, plan.shape(0, 1), first + i, Order::hwc), 0, count, memory(0) + i * count);
    });
    write_statistics(0);
  }

  // Returns whether all of it is finite.
  bool run_store(const Tensor& out) const {
    const int64_t count = numel(plan.shape(plan.output, 1));
    for (int64_t i = 0; i < images; ++i)
      store(view(out, plan.shape(plan.output, 1), first + i, Order::hwc), 0, count,
            memory(plan.output) + i * count);
    return all_finite(memory(plan.output), images * count);
  }

  // The group's samples of a step of all.
  void run_step(PosteriorStep op) const {
    op.shape.n = images;
    for (Tensor* x : {&op.xt, &op.model_output, &op.z, &op.log_variance, &op.out})
      *x = samples_from(*x, first);
    for (PerSample* x : {&op.t, &op.random.step, &op.random.sample_index})
      *x = samples_from(*x, first);
    plan.kernels.posterior_step(op, threads);
  }
};

// All n images through the layers, one after the other on all threads; visit(run, index) after
// layer `index`, stop at the first for which it is false.
template <class Visit>
void one_by_one(Plan::State& plan, const Tensor& x, int64_t n, Time time, int threads,
                const Visit& visit) {
  if (n == 0 && plan.output >= 0) return;  // kernels count on an image
  plan.reserve(n, 0, threads, time.image);
  const Run run(plan, n, time, threads);
  run.run_load(x);
  for (size_t i = 0; i < plan.layers.size(); ++i) {
    run.run_layer(plan.layers[i]);
    if (!visit(run, i)) return;
  }
}

}  // namespace

bool Plan::forward(const Tensor& x, int64_t n, Time time, const Tensor& out, int threads,
                   int64_t group, const PosteriorStep* step) {
  State& s = *state;
  const std::lock_guard<std::mutex> turn(s.running);
  if (n == 0) return true;
  std::atomic<bool> finite{true};
  int64_t share = 0;
  if (n >= threads) {
    int64_t bytes = 1;
    for (const Segment& segment : s.segments)
      if (segment.by_image) bytes = std::max(bytes, segment.arena * int64_t(sizeof(float)));
    const int64_t fit = std::max<int64_t>(1, GROUP_BYTES / bytes);
    share = std::min(group > 0 ? group : fit, (n + threads - 1) / threads);
  }
  s.reserve(n, share, threads, time.image);
  const int64_t needs = share ? s.workspace(share, 1, time.image) : 0;
  for (const Segment& segment : s.segments) {
    const auto run_layers = [&](const Run& run) {
      if (segment.first == 0) run.run_load(x);
      for (int64_t i = segment.first; i < segment.last; ++i) run.run_layer(s.layers[size_t(i)]);
      if (segment.last < int64_t(s.layers.size())) return;
      if (!run.run_store(out)) finite = false;
      if (step) run.run_step(*step);
    };
    if (!segment.by_image || !share) {
      run_layers(Run(s, n, time, threads));
      continue;
    }
    parallel_for((n + share - 1) / share, SERIAL_ELEMENTS, threads, [&](int64_t job, int thread) {
      run_layers(Run(s, n, time, segment, job, share, needs, thread));
    });
  }
  return finite;
}

std::vector<double> Plan::profile(const Tensor& x, int64_t n, Time time, const Tensor& out,
                                  int threads) {
  using Clock = std::chrono::steady_clock;
  const std::lock_guard<std::mutex> turn(state->running);
  std::vector<double> seconds;
  Clock::time_point last = Clock::now();
  one_by_one(*state, x, n, time, threads, [&](const Run& run, size_t i) {
    const Clock::time_point now = Clock::now();
    seconds.push_back(std::chrono::duration<double>(now - last).count());
    if (i + 1 == state->layers.size()) run.run_store(out);
    last = Clock::now();
    return true;
  });
  return seconds;
}

std::string Plan::not_finite(const Tensor& x, int64_t n, Time time, int threads) {
  const std::lock_guard<std::mutex> turn(state->running);
  std::string name;
  one_by_one(*state, x, n, time, threads, [&](const Run& run, size_t i) {
    const Layer& layer = state->layers[i];
    const bool finite = all_finite(run.memory(layer.y), n * numel(state->shape(layer.y, 1)));
    if (!finite) name = layer.name;
    return finite;
  });
  return name;
}

}  // namespace cpu
}  // namespace fastddpm
