// Plans for Python: building and running a network as native calls; see ../cpu/plan/plan.h.
#include "../cpu/plan/plan.h"

#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/layers/kernels.h"
#include "reader.h"

namespace fastddpm {
namespace {

// Groups, eps, weight, bias and whether silu follows.
using NormValues = std::tuple<int64_t, float, std::vector<float>, std::vector<float>, bool>;

int64_t add_convolution(cpu::Plan& plan, const std::string& name,
                        const std::vector<int64_t>& sources, py::handle weight,
                        const std::vector<float>& bias, int64_t kernel, int64_t time_offset,
                        const std::optional<NormValues>& norm, int64_t modulation_offset,
                        int64_t residual, int64_t stride, int64_t before, int64_t after,
                        int64_t repeat, bool halve, const std::string& algorithm, int64_t threads) {
  if (kernel != 1 && kernel != 3) throw py::value_error(name + ": kernel must be 1 or 3");
  if (sources.empty() || int64_t(sources.size()) > SOURCES)
    throw py::value_error(name + ": a convolution reads one or two activations");
  Reader read(false);
  int64_t c_in = 0;
  for (int64_t id : sources) c_in += plan.channels(id);
  cpu::ConvolutionLayer layer;
  layer.name = name, layer.sources = sources, layer.bias = bias, layer.kernel = kernel;
  layer.c_out = int64_t(bias.size()), layer.time_offset = time_offset, layer.residual = residual;
  layer.stride = stride, layer.before = before, layer.after = after, layer.repeat = repeat;
  layer.modulation_offset = modulation_offset, layer.halve = halve;
  layer.algorithm = algorithm, layer.threads = thread_count(threads);
  if (weight.is_none()) throw py::value_error("weight must be a tensor");
  layer.weight = read.floats(weight, "weight", layer.c_out, c_in * kernel * kernel);
  if (norm) {
    const auto& [groups, eps, scale, shift, silu] = *norm;
    layer.norm = {groups, eps, scale, shift, silu};
  }
  return plan.convolution(layer);
}

struct PlanCall {  // the arguments of one run, checked
  Tensor x{}, out{};
  int64_t n;
  cpu::Time time{};
  int threads;

  PlanCall(const cpu::Plan& plan, py::handle x_, py::handle time_, py::handle out_,
           int64_t threads_)
      : threads(thread_count(threads_)) {
    Reader read(false);
    const Shape shape = read.set_shape(x_, "x"), wanted = plan.input_shape(shape.n);
    if (shape.c != wanted.c || shape.h != wanted.h || shape.w != wanted.w)
      throw py::value_error("x must have shape (N, " + std::to_string(wanted.c) + ", " +
                            std::to_string(wanted.h) + ", " + std::to_string(wanted.w) + ")");
    n = shape.n;
    x = read.tensor(x_, "x");
    if (time_.is_none()) {
      if (plan.time_size()) throw py::value_error("time must be a tensor");
    } else if (read.is_vector(time_, "time")) {
      time.row = read.floats(time_, "time", plan.time_size());
    } else {
      time = {read.floats(time_, "time", n, plan.time_size()), plan.time_size()};
    }
    if (out_.is_none()) return;
    const Shape result = plan.output_shape(n);
    const Shape given = read.set_shape(out_, "out");
    if (given.n != n || given.c != result.c || given.h != result.h || given.w != result.w)
      throw py::value_error("out must have shape (" + std::to_string(n) + ", " +
                            std::to_string(result.c) + ", " + std::to_string(result.h) + ", " +
                            std::to_string(result.w) + ")");
    out = read.output(out_, "out");
  }
};

// Of the values of dense float32 tensors, each in the order of its memory.
py::bytes digest_of(const py::sequence& tensors, int64_t threads) {
  std::vector<Bytes> spans;
  spans.reserve(tensors.size());
  Reader read(false);
  for (const py::handle tensor : tensors) {
    const Flat flat = read.flat(tensor, "each tensor");
    if (flat.dtype != DType::f32) Reader::refuse("each tensor", "must be float32");
    spans.push_back({flat.data, flat.size * 4});
  }
  uint32_t lanes[DIGEST];
  const int team = thread_count(threads);
  {
    const py::gil_scoped_release release;
    cpu::kernels_in_use().digest(spans.data(), int64_t(spans.size()), lanes, team);
  }
  return {reinterpret_cast<const char*>(lanes), sizeof lanes};
}

}  // namespace

void def_plan(py::module_& m) {
  using cpu::Plan;
  using namespace py::literals;
  m.def("digest", digest_of, "tensors"_a, "threads"_a,
        "Bytes that are others where a value of these tensors is another one.");
  py::class_<Plan>(m, "Plan", "A network as a list of native calls; see csrc/cpu/plan/plan.h.")
      .def(py::init<int64_t, int64_t, int64_t, bool>(), "height"_a, "width"_a, "channels"_a,
           "bf16"_a = false)
      .def("convolution", add_convolution, "name"_a, "sources"_a, "weight"_a, "bias"_a, "kernel"_a,
           py::kw_only(), "time_offset"_a = -1, "norm"_a = py::none(), "modulation_offset"_a = -1,
           "residual"_a = -1, "stride"_a = 1, "before"_a = 0, "after"_a = 0, "repeat"_a = 1,
           "halve"_a = false, "algorithm"_a = "auto", "threads"_a = 1)
      .def("attention", &Plan::attention, "name"_a, "qkv"_a, "heads"_a)
      .def("resample", &Plan::resample, "name"_a, "source"_a, "doubles"_a)
      .def("channels", &Plan::channels, "activation"_a)
      .def("finish", &Plan::finish, "output"_a)
      .def(
          "forward",
          [](Plan& plan, py::handle x, py::handle time, py::handle out, int64_t threads,
             int64_t group) {
            if (out.is_none()) throw py::value_error("out must be a tensor");
            const PlanCall call(plan, x, time, out, threads);
            const py::gil_scoped_release release;
            return plan.forward(call.x, call.n, call.time, call.out, call.threads, group);
          },
          "x"_a, "time"_a, "out"_a, "threads"_a, "group"_a = 0)
      .def(
          "step",
          [](Plan& plan, py::handle xt, py::handle time, py::handle out, int64_t threads,
             py::handle model_output, py::handle log_variance, py::handle x, py::handle seed,
             py::handle step, py::handle sample_index, py::handle t, py::handle table,
             const std::string& prediction, bool clip, bool learned_range) {
            if (out.is_none() || model_output.is_none() || x.is_none() || seed.is_none())
              throw py::value_error("out, model_output, x and seed must be given");
            const PlanCall call(plan, xt, time, out, threads);
            const PosteriorStep op =
                posterior_step_of(false, xt, model_output, py::none(), log_variance, x, seed, step,
                                  sample_index, t, table, prediction, clip, learned_range);
            cpu::check(op);
            const py::gil_scoped_release release;
            return plan.forward(call.x, call.n, call.time, call.out, call.threads, 0, &op);
          },
          "xt"_a, "time"_a, "out"_a, "threads"_a, py::kw_only(), "model_output"_a, "log_variance"_a,
          "x"_a, "seed"_a, "step"_a, "sample_index"_a, "t"_a, "table"_a, "prediction"_a, "clip"_a,
          "learned_range"_a)
      .def(
          "profile",
          [](Plan& plan, py::handle x, py::handle time, py::handle out, int64_t threads) {
            if (out.is_none()) throw py::value_error("out must be a tensor");
            const PlanCall call(plan, x, time, out, threads);
            const py::gil_scoped_release release;
            return plan.profile(call.x, call.n, call.time, call.out, call.threads);
          },
          "x"_a, "time"_a, "out"_a, "threads"_a)
      .def(
          "not_finite",
          [](Plan& plan, py::handle x, py::handle time, int64_t threads) {
            const PlanCall call(plan, x, time, py::none(), threads);
            const py::gil_scoped_release release;
            return plan.not_finite(call.x, call.n, call.time, call.threads);
          },
          "x"_a, "time"_a, "threads"_a)
      .def("layers",
           [](const Plan& plan) {
             py::list list;
             for (const cpu::LayerReport& r : plan.layers())
               list.append(py::make_tuple(r.name, r.algorithm, r.c_in, r.c_out, r.height, r.width,
                                          r.kernel, r.flop));
             return list;
           })
      .def("segments",
           [](const Plan& plan) {
             py::list list;
             for (const cpu::Segment& s : plan.segments())
               list.append(py::make_tuple(s.first, s.last, s.by_image));
             return list;
           })
      .def_property_readonly("weight_bytes", &Plan::weight_bytes)
      .def_property_readonly("image_bytes", &Plan::image_bytes)
      .def_property_readonly("peak_bytes", &Plan::peak_bytes)
      .def_property_readonly("isa", &Plan::isa);
}

}  // namespace fastddpm
