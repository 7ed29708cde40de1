// Builds plans: what each layer becomes, which layers run together, lifetimes and the arena. No
// kernels, and nothing that runs them.
#include "plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "state.h"

namespace fastddpm {
namespace cpu {
namespace {

constexpr int64_t STREAMS = 2;                      // that an activation is read and written, about
constexpr int64_t MAX_CHANNELS = int64_t(1) << 24;  // of one activation, or time embeddings in all
constexpr int64_t MAX_FLOATS = int64_t(1) << 40;    // of one image: no product of sizes overflows
constexpr int64_t SHARED_WEIGHT_BYTES = 16 * 1024 * 1024;  // more do not stay in a shared cache

[[noreturn]] void refuse(const std::string& name, const std::string& what) {
  throw std::invalid_argument(name + ": " + what);
}

void check_size(const std::string& name, int64_t height, int64_t width, int64_t channels) {
  if (channels > MAX_CHANNELS || height > MAX_FLOATS || width > MAX_FLOATS / height ||
      channels > MAX_FLOATS / (height * width))
    refuse(name, "an image of " + std::to_string(channels) + "x" + std::to_string(height) + "x" +
                     std::to_string(width) + " is too large");
}

}  // namespace

// ---- the state's own ---------------------------------------------------------------------------

int64_t Plan::State::add(int64_t height, int64_t width, int64_t channels, int64_t floats,
                         int64_t first) {
  activations.push_back({height, width, channels, floats, first, first});
  return int64_t(activations.size()) - 1;
}

int64_t Plan::State::add_image(int64_t height, int64_t width, int64_t channels) {
  return add(height, width, channels, height * width * channels, int64_t(layers.size()));
}

int64_t Plan::State::add_scratch(int64_t floats) {
  return add(0, 0, 0, floats, int64_t(layers.size()));
}

Activation& Plan::State::read(const std::string& name, int64_t id) {
  if (output >= 0) refuse(name, "the plan is finished: no layer can follow");
  if (id < 0 || id >= int64_t(activations.size()) || !activations[id].channels)
    refuse(name, "there is no activation " + std::to_string(id));
  Activation& activation = activations[id];
  activation.last = int64_t(layers.size());
  return activation;
}

void Plan::State::need_statistics(int64_t id) {
  if (activations[id].statistics < 0) {
    const int64_t statistics = add(0, 0, 0, 2 * activations[id].channels, activations[id].first);
    activations[id].statistics = statistics;
  }
  activations[activations[id].statistics].last = int64_t(layers.size());
}

Asked Plan::State::asked(const Layer& layer, const std::string& algorithm) const {
  if (bf16 && algorithm != "auto" && algorithm != "bf16")
    refuse(layer.name, "algorithm must be 'auto' or 'bf16' in bfloat16; got '" + algorithm + "'");
  if (algorithm == "auto") return Asked::automatic;
  if (algorithm == "bf16" && bf16) return Asked::bf16;
  if (algorithm == "direct") return Asked::direct;
  if (algorithm == "winograd_2") return Asked::winograd_2;
  if (algorithm == "winograd_4") return Asked::winograd_4;
  refuse(layer.name, "algorithm must be 'auto', 'direct', 'winograd_2' or 'winograd_4'; got '" +
                         algorithm + "'");
}

void Plan::State::pack(Layer& layer, const float* weight, int threads) {
  const Geometry& is = layer.way.is;
  const int64_t taps = is.kernel * is.kernel;
  layer.weight = allocate(layer.way.weight_floats, false);
  const Weight given{weight,  DType::f32, is.c_out,
                     is.c_in, is.kernel,  {is.c_in * taps, taps, is.kernel, 1}};
  cpu::pack(kernels, layer.way, given, layer.weight.get(), threads);
  weights += layer.way.weight_floats * int64_t(sizeof(float));
}

int64_t Plan::State::layer_floats(
    const Layer& layer) const {  // of an image, that it reads and writes
  int64_t sum = activations[layer.y].floats;
  for (int64_t id : layer.sources) sum += activations[id].floats;
  for (int64_t id : {layer.prepared, layer.residual}) sum += id >= 0 ? activations[id].floats : 0;
  return sum;
}

// Runs of layers of one size: by image if that streams fewer bytes of weights than the other way
// streams activations.
void Plan::State::divide() {
  const int64_t count = int64_t(layers.size());
  if (weights <= SHARED_WEIGHT_BYTES) {
    segments.push_back({0, count, true});
    return;
  }
  for (int64_t first = 0, last; first < count; first = last) {
    int64_t streamed = 0, touched = 0;
    for (last = first; last < count; ++last) {
      if (activations[layers[last].y].height != activations[layers[first].y].height) break;
      streamed += layers[last].way.weight_floats, touched += layer_floats(layers[last]);
    }
    const bool by_image = streamed <= STREAMS * touched;
    if (segments.empty() || segments.back().by_image != by_image)
      segments.push_back({first, last, by_image});
    else
      segments.back().last = last;
  }
}

// The segment of a layer; what loads the input belongs to the first, what stores the output to
// the last.
int64_t Plan::State::segment_of(int64_t layer) const {
  int64_t i = 0;
  while (i + 1 < int64_t(segments.size()) && layer >= segments[i].last) ++i;
  return i;
}

// First fit, largest first: two activations share memory if no layer needs both. Returns the
// floats an image that those of a segment, or those that cross segments (-1), need.
int64_t Plan::State::place(int64_t segment) {
  std::vector<Activation*> order, placed;
  for (Activation& a : activations)
    if (a.segment == segment) order.push_back(&a);
  std::stable_sort(order.begin(), order.end(),
                   [](const Activation* a, const Activation* b) { return a->floats > b->floats; });
  int64_t end = 0;
  for (Activation* a : order) {
    std::vector<Activation*> rivals;
    for (Activation* b : placed)
      if (a->first <= b->last && b->first <= a->last) rivals.push_back(b);
    std::sort(rivals.begin(), rivals.end(),
              [](const Activation* b, const Activation* c) { return b->offset < c->offset; });
    for (const Activation* b : rivals)
      if (a->offset + lines(a->floats) > b->offset && b->offset + lines(b->floats) > a->offset)
        a->offset = b->offset + lines(b->floats);
    placed.push_back(a);
    end = std::max(end, a->offset + lines(a->floats));
  }
  return end;
}

void Plan::State::place_all() {
  divide();
  for (Activation& a : activations)
    if (segment_of(a.first) == segment_of(a.last)) a.segment = segment_of(a.first);
  arena = place(-1);
  for (size_t i = 0; i < segments.size(); ++i) segments[i].arena = place(int64_t(i));
}

// ---- the layers --------------------------------------------------------------------------------

Plan::Plan(int64_t height, int64_t width, int64_t channels, bool bf16) : state(new State) {
  state->bf16 = bf16;
  if (height < 1 || width < 1 || channels < 1)
    refuse("input", "height, width and channels must be positive");
  check_size("input", height, width, channels);
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
  int64_t c_in = 0;
  for (int64_t id : spec.sources) {
    const Activation& source = s.read(name, id);
    if (source.height != x.height || source.width != x.width)
      refuse(name, "its sources differ in height or width");
    c_in += source.channels;
  }
  if (spec.kernel != 1 && spec.kernel != 3) refuse(name, "kernel must be 1 or 3");
  if (spec.stride < 1 || spec.stride > 2 || spec.repeat < 1 || spec.repeat > 2)
    refuse(name, "stride and repeat must be 1 or 2");
  if (spec.before < 0 || spec.before > 1 || spec.after < 0 || spec.after > 1)
    refuse(name, "a border must be 0 or 1");
  if (spec.c_out < 1 || int64_t(spec.bias.size()) != spec.c_out)
    refuse(name, "bias must have a value for each output channel");
  layer.norm = spec.norm, layer.bias = spec.bias, layer.time_offset = spec.time_offset;
  layer.modulation_offset = spec.modulation_offset, layer.halve = spec.halve;
  if (spec.halve && (spec.repeat != 1 || x.height % 2 || x.width % 2))
    refuse(name, "halve needs an even height and width, and repeat 1");
  const int64_t share = spec.halve ? 2 : 1;
  const Geometry is{x.height / share, x.width / share, c_in,       spec.c_out, spec.kernel,
                    spec.stride,      spec.before,     spec.after, spec.repeat};
  const int64_t height = is.rows(), width = is.columns();
  if (height < 1 || width < 1) refuse(name, "the input is smaller than the kernel");
  check_size(name, height, width, spec.c_out);
  if (spec.time_offset < -1 || spec.time_offset > MAX_CHANNELS)
    refuse(name, "time_offset must be -1 or lie in 0 .. 2^24");
  if (spec.modulation_offset < -1 || spec.modulation_offset > MAX_CHANNELS)
    refuse(name, "modulation_offset must be -1 or lie in 0 .. 2^24");
  const Norm& norm = spec.norm;
  if (spec.modulation_offset >= 0 && !norm.groups) refuse(name, "modulation_offset needs a norm");
  if (!(norm.eps >= 0.0f)) refuse(name, "eps must be a number of at least 0");
  if (norm.groups < 0 || (norm.groups && c_in % norm.groups))
    refuse(name, "num_groups must divide the " + std::to_string(c_in) + " channels");
  if (norm.groups && (int64_t(norm.weight.size()) != c_in || int64_t(norm.bias.size()) != c_in))
    refuse(name, "the norm must have a weight and a bias for each channel");
  if (!all_finite(spec.weight, spec.c_out * c_in * spec.kernel * spec.kernel) ||
      !all_finite(spec.bias.data(), spec.c_out) ||
      !all_finite(norm.weight.data(), int64_t(norm.weight.size())) ||
      !all_finite(norm.bias.data(), int64_t(norm.bias.size())))
    refuse(name, "its weights hold a NaN or an infinity");
  if (spec.residual >= 0) {
    const Activation& r = s.read(name, spec.residual);
    if (r.height != height || r.width != width || r.channels != spec.c_out)
      refuse(name, "the residual must be like the result");
  }

  layer.way = way_of(s.kernels, is, s.bf16, s.asked(layer, spec.algorithm));
  s.pack(layer, spec.weight, spec.threads);
  if (norm.groups) {
    for (int64_t id : layer.sources) s.need_statistics(id);
    layer.coefficients = s.add_scratch(3 * c_in);
  }
  if (!layer.way.reads_sources() || norm.groups || norm.silu || layer.halve)
    layer.prepared = s.add_scratch(layer.way.prepared_floats());
  if (layer.time_offset >= 0) s.time_size = std::max(s.time_size, layer.time_offset + spec.c_out);
  if (layer.modulation_offset >= 0)
    s.time_size = std::max(s.time_size, layer.modulation_offset + 2 * c_in);
  layer.y = s.add_image(height, width, spec.c_out);
  s.layers.push_back(std::move(layer));
  return s.layers.back().y;
}

int64_t Plan::attention(const std::string& name, int64_t qkv, int64_t heads) {
  State& s = *state;
  const Activation x = s.read(name, qkv);
  if (heads < 1 || heads > x.channels || x.channels % (3 * heads))
    refuse(name, "num_heads must divide the channels; got " + std::to_string(heads) + " and " +
                     std::to_string(x.channels / 3));
  Layer layer{};
  layer.kind = Layer::ATTENTION;
  layer.name = name, layer.sources = {qkv}, layer.heads = heads;
  layer.y = s.add_image(x.height, x.width, x.channels / 3);
  s.layers.push_back(std::move(layer));
  return s.layers.back().y;
}

int64_t Plan::resample(const std::string& name, int64_t x, bool doubles) {
  State& s = *state;
  const Activation source = s.read(name, x);
  if (!doubles && (source.height % 2 || source.width % 2))
    refuse(name, "an odd height or width can't be halved");
  Layer layer{};
  layer.kind = Layer::RESAMPLE;
  layer.name = name, layer.sources = {x}, layer.halve = !doubles;
  const auto moved = [&](int64_t size) { return doubles ? 2 * size : size / 2; };
  check_size(name, moved(source.height), moved(source.width), source.channels);
  layer.y = s.add_image(moved(source.height), moved(source.width), source.channels);
  s.layers.push_back(std::move(layer));
  return s.layers.back().y;
}

void Plan::finish(int64_t output) {
  state->read("output", output).last = int64_t(state->layers.size());
  if (state->layers.empty()) refuse("output", "the plan has no layers");
  state->output = output;
  state->place_all();
}

int64_t Plan::channels(int64_t activation) const {
  const auto& all = state->activations;
  const bool known = activation >= 0 && activation < int64_t(all.size());
  if (!known || !all[size_t(activation)].channels)
    throw std::invalid_argument("there is no activation " + std::to_string(activation));
  return all[size_t(activation)].channels;
}

std::vector<LayerReport> Plan::layers() const {
  static const char* const names[] = {"direct", "bf16", "winograd_2", "", "winograd_4"};
  std::vector<LayerReport> reports;
  for (const Layer& layer : state->layers) {
    const Activation& y = state->activations[layer.y];
    const Geometry& is = layer.way.is;
    const double pixels = double(y.height * y.width);
    if (layer.kind == Layer::RESAMPLE)
      reports.push_back(
          {layer.name, "resample", y.channels, y.channels, y.height, y.width, 0, 0.0});
    else if (layer.kind == Layer::ATTENTION)
      reports.push_back({layer.name, "attention", y.channels, y.channels, y.height, y.width, 0,
                         4.0 * pixels * pixels * double(y.channels)});
    else
      reports.push_back({layer.name, names[int(layer.way.algorithm)], is.c_in, is.c_out, y.height,
                         y.width, is.kernel,
                         2.0 * pixels * double(is.c_in * is.c_out * is.kernel * is.kernel)});
  }
  return reports;
}

const std::vector<Segment>& Plan::segments() const { return state->segments; }

Shape Plan::input_shape(int64_t n) const { return state->shape(0, n); }

Shape Plan::output_shape(int64_t n) const {
  if (state->output < 0) throw std::invalid_argument("the plan is not finished");
  return state->shape(state->output, n);
}

int64_t Plan::time_size() const { return state->time_size; }

int64_t Plan::weight_bytes() const { return state->weights; }

int64_t Plan::image_bytes() const {
  int64_t most = 0;
  for (const Segment& segment : state->segments) most = std::max(most, segment.arena);
  return (state->arena + most) * int64_t(sizeof(float));
}

int64_t Plan::peak_bytes() const { return state->peak + state->weights; }

const char* Plan::isa() const { return state->kernels.isa; }

}  // namespace cpu
}  // namespace fastddpm
