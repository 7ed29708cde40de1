// Python module fastddpm._C: the only file that knows Python, and the border that no bad pointer
// passes.
//
// It takes torch tensors without linking torch: by their Python attributes. Before an address is
// used, its tensor's device, storage type and shape are checked here. Outputs are allocated by
// fastddpm/ops/native.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "ops.h"

namespace py = pybind11;
using namespace fastddpm;

namespace {

// ---- tensors -----------------------------------------------------------------------------------

struct Torch {  // names and objects that are looked up once
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* get_device = PyUnicode_InternFromString("get_device");
  PyObject *float32, *bfloat16, *float16, *uint8, *int64, *boolean;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    const auto find = [&](const char* name) {
      return py::object(torch.attr(name)).release().ptr();
    };
    float32 = find("float32"), bfloat16 = find("bfloat16"), float16 = find("float16");
    uint8 = find("uint8"), int64 = find("int64"), boolean = find("bool");
  }
};

const Torch& torch() {
  static const Torch* instance = new Torch();  // lives as long as the interpreter
  return *instance;
}

py::object attribute(py::handle object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

py::object method(py::handle object, PyObject* name) {
  PyObject* value = PyObject_CallMethodNoArgs(object.ptr(), name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// At most 4 numbers of a tuple; `sizes` is their count.
struct Numbers {
  int64_t value[4] = {0, 0, 0, 0};
  int size = 0;

  Numbers(const py::object& tuple, const char* name) {
    if (!PyTuple_Check(tuple.ptr())) throw py::type_error(std::string(name) + " is not a tensor");
    if (PyTuple_GET_SIZE(tuple.ptr()) > 4)
      throw py::value_error(std::string(name) + " must have at most 4 dimensions; got " +
                            std::to_string(PyTuple_GET_SIZE(tuple.ptr())));
    size = int(PyTuple_GET_SIZE(tuple.ptr()));
    for (int i = 0; i < size; ++i) {
      value[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
      if (value[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
    }
  }

  std::string text() const {
    std::string list = "(";
    for (int i = 0; i < size; ++i) list += (i ? ", " : "") + std::to_string(value[i]);
    return list + (size == 1 ? ",)" : ")");
  }
};

enum class Pad { back, front };  // where dimensions of size 1 are added to make 4

// Reads the tensors of one call, all of one device.
class Reader {
 public:
  explicit Reader(bool cuda) : cuda(cuda) {}

  // The shape that the other tensors must have: that of x.
  Shape set_shape(py::handle x, const char* name, Pad pad = Pad::back) {
    this->pad = pad;
    const Numbers sizes(attribute(x, torch().shape), name);
    if (sizes.size == 0 && pad == Pad::back)
      throw py::value_error(std::string(name) + " must have at least 1 dimension");
    dims = sizes.size;
    int64_t padded[4] = {1, 1, 1, 1};
    for (int i = 0; i < dims; ++i) padded[at(i)] = sizes.value[i];
    shape = {padded[0], padded[1], padded[2], padded[3]};
    return shape;
  }

  Tensor tensor(py::handle x, const char* name, bool bytes = false) {
    if (x.is_none()) return {nullptr, DType::f32, {0, 0, 0, 0}};
    const Numbers sizes(attribute(x, torch().shape), name);
    const int64_t expected[4] = {shape.n, shape.c, shape.h, shape.w};
    bool same = sizes.size == dims;
    for (int i = 0; same && i < dims; ++i) same = sizes.value[i] == expected[at(i)];
    if (!same) {
      std::string list;
      for (int i = 0; i < dims; ++i) list += (i ? ", " : "") + std::to_string(expected[at(i)]);
      throw py::value_error(std::string(name) + " must have shape (" + list + "); got " +
                            sizes.text());
    }
    const Numbers strides(method(x, torch().stride), name);
    Tensor tensor{address(x, name), dtype(x, name, bytes), {1, 1, 1, 1}};
    for (int i = 0; i < dims; ++i) tensor.stride[at(i)] = strides.value[i];
    return tensor;
  }

  Matrix matrix(py::handle x, const char* name, bool per_sample) {
    if (x.is_none()) return {nullptr, DType::f32, 0, 0};
    const Numbers strides =
        vector(x, name, per_sample ? shape.n : shape.c, per_sample ? shape.c : -1);
    return {address(x, name), dtype(x, name, false), per_sample ? strides.value[0] : 0,
            strides.value[per_sample ? 1 : 0]};
  }

  // (rows, columns), or without columns (rows,) as a single row.
  Matrix weight(py::handle x, const char* name, int64_t rows, int64_t columns = -1) {
    if (x.is_none()) return {nullptr, DType::f32, 0, 0};
    const Numbers strides = vector(x, name, rows, columns);
    return {address(x, name), dtype(x, name, false), columns < 0 ? 0 : strides.value[0],
            strides.value[columns < 0 ? 0 : 1]};
  }

  // (N,) int64, any stride.
  PerSample per_sample(py::handle x, const char* name) {
    const Numbers strides = vector(x, name, shape.n, -1);
    require_dtype(x, name, torch().int64, "int64");
    return {static_cast<const int64_t*>(address(x, name)), strides.value[0]};
  }

  // (N,) bool, contiguous; null if not given.
  const uint8_t* flags(py::handle x, const char* name) {
    if (x.is_none()) return nullptr;
    const Numbers strides = vector(x, name, shape.n, -1);
    require_dtype(x, name, torch().boolean, "bool");
    if (strides.value[0] != 1 && shape.n > 1)
      throw py::value_error(std::string(name) + " must be contiguous");
    return static_cast<const uint8_t*>(address(x, name));
  }

  // Contiguous float32 that an op writes; null if not wanted.
  float* floats(py::handle x, const char* name, int64_t rows, int64_t columns = -1) {
    if (x.is_none()) return nullptr;
    const Numbers strides = vector(x, name, rows, columns);
    require_dtype(x, name, torch().float32, "float32");
    const bool contiguous = columns < 0 ? strides.value[0] == 1 || rows <= 1
                                        : (strides.value[1] == 1 || columns <= 1) &&
                                              (strides.value[0] == columns || rows <= 1);
    if (!contiguous) throw py::value_error(std::string(name) + " must be contiguous");
    return static_cast<float*>(address(x, name));
  }

  Random random(const py::object& seed, py::handle step, py::handle sample_index) {
    if (seed.is_none()) return {};
    const uint64_t bits = PyLong_AsUnsignedLongLongMask(seed.ptr());  // any int, modulo 2^64
    if (PyErr_Occurred()) throw py::error_already_set();
    return {bits, per_sample(step, "step"), per_sample(sample_index, "sample_index")};
  }

  Table table(py::handle x) {
    const Numbers sizes(attribute(x, torch().shape), "table");
    if (sizes.size != 2) throw py::value_error("table must have shape (T, K); got " + sizes.text());
    return {floats(x, "table", sizes.value[0], COLUMNS), sizes.value[0]};
  }

 private:
  bool cuda;
  int64_t device = -2;
  Shape shape{0, 0, 0, 0};
  int dims = 0;
  Pad pad = Pad::back;

  int at(int i) const { return pad == Pad::front ? 4 - dims + i : i; }

  Numbers vector(py::handle x, const char* name, int64_t rows, int64_t columns) {
    const Numbers sizes(attribute(x, torch().shape), name);
    if (sizes.size != (columns < 0 ? 1 : 2) || sizes.value[0] != rows ||
        (columns >= 0 && sizes.value[1] != columns))
      throw py::value_error(std::string(name) + " must have shape (" + std::to_string(rows) + "," +
                            (columns < 0 ? "" : " " + std::to_string(columns)) + "); got " +
                            sizes.text());
    return Numbers(method(x, torch().stride), name);
  }

  void* address(py::handle x, const char* name) {
    const int64_t index = PyLong_AsLongLong(method(x, torch().get_device).ptr());  // -1 on the CPU
    if (index == -1 && PyErr_Occurred()) throw py::error_already_set();
    if ((index >= 0) != cuda)
      throw py::value_error(std::string(name) + " must be on " +
                            (cuda ? "a CUDA device" : "the CPU"));
    if (device != -2 && device != index)
      throw py::value_error(std::string(name) + " is not on the device of the tensors before it");
    device = index;
    void* pointer = PyLong_AsVoidPtr(method(x, torch().data_ptr).ptr());
    if (!pointer && PyErr_Occurred()) throw py::error_already_set();
    return pointer;
  }

  DType dtype(py::handle x, const char* name, bool bytes) {
    const py::object type = attribute(x, torch().dtype);
    if (type.ptr() == torch().float32) return DType::f32;
    if (type.ptr() == torch().bfloat16) return DType::bf16;
    if (type.ptr() == torch().float16) return DType::f16;
    if (type.ptr() == torch().uint8 && bytes) return DType::u8;
    throw py::value_error(std::string(name) + " must be float32, bfloat16" +
                          (bytes ? ", float16 or uint8" : " or float16") + "; got " +
                          std::string(py::str(type)));
  }

  void require_dtype(py::handle x, const char* name, PyObject* wanted, const char* text) {
    const py::object type = attribute(x, torch().dtype);
    if (type.ptr() != wanted)
      throw py::value_error(std::string(name) + " must be " + text + "; got " +
                            std::string(py::str(type)));
  }
};

Prediction prediction_of(const std::string& name) {
  if (name == "eps") return Prediction::eps;
  if (name == "x0") return Prediction::x0;
  if (name == "mean") return Prediction::mean;
  throw py::value_error("prediction must be one of 'eps', 'x0', 'mean'; got '" + name + "'");
}

// ---- the ops -----------------------------------------------------------------------------------
// `where` is the thread count on the CPU and the stream's handle on CUDA.

template <class Op>
void launch(void (*run)(const Op&, int), const Op& op, int64_t where) {
  py::gil_scoped_release nogil;
  run(op, where > 1 ? int(where) : 1);
}

template <class Op>
void launch(void (*run)(const Op&, void*), const Op& op, int64_t where) {
  py::gil_scoped_release nogil;
  run(op, reinterpret_cast<void*>(where));
}

template <class Op>
constexpr bool is_cuda(void (*)(const Op&, void*)) {
#if defined(FASTDDPM_CUDA_ON_CPU)  // a build of the tests, which runs the kernels on the CPU
  return false;
#else
  return true;
#endif
}

template <class Op>
constexpr bool is_cuda(void (*)(const Op&, int)) {
  return false;
}

template <auto run>
void def_randn(py::module_& m) {
  m.def("randn", [](py::handle out, const py::object& seed, py::handle step,
                    py::handle sample_index, int64_t where) {
    Reader read(is_cuda(run));
    const Shape shape = read.set_shape(out, "out");
    const Tensor tensor = read.tensor(out, "out");
    launch(run,
           Randn{shape.n, shape.c * shape.h * shape.w, tensor.data, tensor.dtype,
                 read.random(seed, step, sample_index)},
           where);
  });
}

template <auto run>
void def_noise(py::module_& m) {
  m.def("noise", [](py::handle x0, py::handle eps, py::handle xt, const py::object& seed,
                    py::handle step, py::handle sample_index, py::handle t, py::handle flip,
                    py::handle table, int64_t where) {
    Reader read(is_cuda(run));
    const Shape shape = read.set_shape(x0, "x0");
    launch(run,
           Noise{shape, read.tensor(x0, "x0", true), read.tensor(eps, "eps"), read.tensor(xt, "xt"),
                 !seed.is_none(), read.random(seed, step, sample_index), read.per_sample(t, "t"),
                 read.flags(flip, "flip"), read.table(table)},
           where);
  });
}

PosteriorStep posterior_step_of(bool cuda, py::handle xt, py::handle model_output, py::handle z,
                                py::handle log_variance, py::handle out, const py::object& seed,
                                py::handle step, py::handle sample_index, py::handle t,
                                py::handle table, const std::string& prediction, bool clip) {
  if (z.is_none() && seed.is_none()) throw py::value_error("posterior_step needs z or a seed");
  Reader read(cuda);
  const Shape shape = read.set_shape(xt, "xt");
  return {shape,
          read.tensor(xt, "xt"),
          read.tensor(model_output, "model_output"),
          read.tensor(z, "z"),
          read.tensor(log_variance, "log_variance"),
          read.tensor(out, "out"),
          read.random(seed, step, sample_index),
          read.per_sample(t, "t"),
          prediction_of(prediction),
          clip,
          read.table(table)};
}

template <auto run>
void def_posterior_step(py::module_& m) {
  m.def(
      "posterior_step",
      [](py::handle xt, py::handle model_output, py::handle z, py::handle log_variance,
         py::handle out, const py::object& seed, py::handle step, py::handle sample_index,
         py::handle t, py::handle table, const std::string& prediction, bool clip, int64_t where) {
        launch(run,
               posterior_step_of(is_cuda(run), xt, model_output, z, log_variance, out, seed, step,
                                 sample_index, t, table, prediction, clip),
               where);
      });
}

template <auto run>
void def_group_norm_silu(py::module_& m) {
  m.def("group_norm_silu", [](py::handle x, py::handle y, int64_t groups, py::handle weight,
                              py::handle bias, double eps, py::handle scale, py::handle shift,
                              bool silu, py::handle mean, py::handle rstd, py::handle workspace,
                              int64_t where) {
    Reader read(is_cuda(run));
    const Shape shape = read.set_shape(x, "x");
    launch(
        run,
        GroupNormSilu{
            shape, groups, float(eps), silu, read.tensor(x, "x"), read.tensor(y, "y"),
            read.matrix(weight, "weight", false), read.matrix(bias, "bias", false),
            read.matrix(scale, "scale", true), read.matrix(shift, "shift", true),
            read.floats(mean, "mean", shape.n, groups), read.floats(rstd, "rstd", shape.n, groups),
            read.floats(workspace, "workspace", group_norm_workspace(shape, groups, false))},
        where);
  });
}

template <auto run>
void def_group_norm_silu_backward(py::module_& m) {
  m.def("group_norm_silu_backward",
        [](py::handle grad, py::handle x, int64_t groups, py::handle weight, py::handle bias,
           double eps, py::handle scale, py::handle shift, bool silu, py::handle dx,
           py::handle dweight, py::handle dbias, py::handle dscale, py::handle dshift,
           py::handle workspace, int64_t where) {
          Reader read(is_cuda(run));
          const Shape shape = read.set_shape(x, "x");
          const GroupNormSilu forward{
              shape,
              groups,
              float(eps),
              silu,
              read.tensor(x, "x"),
              read.tensor(py::none(), "y"),
              read.matrix(weight, "weight", false),
              read.matrix(bias, "bias", false),
              read.matrix(scale, "scale", true),
              read.matrix(shift, "shift", true),
              nullptr,
              nullptr,
              read.floats(workspace, "workspace", group_norm_workspace(shape, groups, true))};
          launch(run,
                 GroupNormSiluBackward{forward, read.tensor(grad, "grad"), read.tensor(dx, "dx"),
                                       read.floats(dweight, "dweight", shape.c),
                                       read.floats(dbias, "dbias", shape.c),
                                       read.floats(dscale, "dscale", shape.n, shape.c),
                                       read.floats(dshift, "dshift", shape.n, shape.c)},
                 where);
        });
}

template <auto run>
void def_attention_block(py::module_& m) {
  m.def("attention_block", [](py::handle x, py::handle y, int64_t groups, py::handle norm_weight,
                              py::handle norm_bias, py::handle qkv_weight, py::handle qkv_bias,
                              py::handle proj_weight, py::handle proj_bias, int64_t heads,
                              double eps, int64_t where) {
    if (qkv_weight.is_none() || proj_weight.is_none())
      throw py::value_error("attention_block needs qkv_weight and proj_weight");
    Reader read(is_cuda(run));
    const Shape shape = read.set_shape(x, "x");
    launch(run,
           AttentionBlock{shape, groups, heads, float(eps), read.tensor(x, "x"),
                          read.tensor(y, "y"), read.weight(norm_weight, "norm_weight", shape.c),
                          read.weight(norm_bias, "norm_bias", shape.c),
                          read.weight(qkv_weight, "qkv_weight", 3 * shape.c, shape.c),
                          read.weight(qkv_bias, "qkv_bias", 3 * shape.c),
                          read.weight(proj_weight, "proj_weight", shape.c, shape.c),
                          read.weight(proj_bias, "proj_bias", shape.c)},
           where);
  });
}

void def_attention_block_backward(py::module_& m) {
  m.def("attention_block_backward",
        [](py::handle grad, py::handle x, int64_t groups, py::handle norm_weight,
           py::handle norm_bias, py::handle qkv_weight, py::handle qkv_bias, py::handle proj_weight,
           py::handle proj_bias, int64_t heads, double eps, py::handle dx, py::handle dnorm_weight,
           py::handle dnorm_bias, py::handle dqkv_weight, py::handle dqkv_bias,
           py::handle dproj_weight, py::handle dproj_bias, int64_t threads) {
          for (py::handle weight : {qkv_weight, proj_weight, dqkv_weight, dproj_weight})
            if (weight.is_none())
              throw py::value_error("attention_block_backward needs both weights and gradients");
          Reader read(false);
          const Shape shape = read.set_shape(x, "x");
          const int64_t c = shape.c;
          const Tensor none = read.tensor(py::none(), "y");
          const AttentionBlock forward{shape,
                                       groups,
                                       heads,
                                       float(eps),
                                       read.tensor(x, "x"),
                                       none,
                                       read.weight(norm_weight, "norm_weight", c),
                                       read.weight(norm_bias, "norm_bias", c),
                                       read.weight(qkv_weight, "qkv_weight", 3 * c, c),
                                       read.weight(qkv_bias, "qkv_bias", 3 * c),
                                       read.weight(proj_weight, "proj_weight", c, c),
                                       read.weight(proj_bias, "proj_bias", c)};
          launch(cpu::attention_block_backward,
                 AttentionBlockBackward{forward, read.tensor(grad, "grad"), read.tensor(dx, "dx"),
                                        read.floats(dnorm_weight, "dnorm_weight", c),
                                        read.floats(dnorm_bias, "dnorm_bias", c),
                                        read.floats(dqkv_weight, "dqkv_weight", 3 * c, c),
                                        read.floats(dqkv_bias, "dqkv_bias", 3 * c),
                                        read.floats(dproj_weight, "dproj_weight", c, c),
                                        read.floats(dproj_bias, "dproj_bias", c)},
                 threads);
        });
}

template <auto run>
void def_discretized_log_likelihood(py::module_& m) {
  m.def("discretized_log_likelihood", [](py::handle x, py::handle mean, py::handle log_scale,
                                         py::handle out, int64_t where) {
    Reader read(is_cuda(run));
    // Samples mean nothing here: missing dimensions go in front, where they cost nothing.
    const Shape shape = read.set_shape(x, "x", Pad::front);
    launch(run,
           DiscretizedLogLikelihood{shape, read.tensor(x, "x"), read.tensor(mean, "mean"),
                                    read.tensor(log_scale, "log_scale"), read.tensor(out, "out")},
           where);
  });
}

// ---- plans -------------------------------------------------------------------------------------

int64_t add_convolution(cpu::Plan& plan, const std::string& name,
                        const std::vector<int64_t>& sources, py::handle weight,
                        const std::vector<float>& bias, int64_t kernel, int64_t time_offset,
                        const py::object& norm, int64_t residual, int64_t stride, int64_t before,
                        int64_t after, int64_t repeat, const std::string& algorithm) {
  Reader read(false);
  int64_t c_in = 0;
  for (int64_t id : sources) c_in += plan.channels(id);
  cpu::ConvolutionLayer layer;
  layer.name = name, layer.sources = sources, layer.bias = bias, layer.kernel = kernel;
  layer.c_out = int64_t(bias.size()), layer.time_offset = time_offset, layer.residual = residual;
  layer.stride = stride, layer.before = before, layer.after = after, layer.repeat = repeat;
  layer.algorithm = algorithm;
  if (weight.is_none()) throw py::value_error("weight must be a tensor");
  layer.weight = read.floats(weight, "weight", layer.c_out, c_in * kernel * kernel);
  if (!norm.is_none()) {
    using Values = std::vector<float>;
    const auto [groups, eps, scale, shift, silu] =
        norm.cast<std::tuple<int64_t, float, Values, Values, bool>>();
    layer.norm = {groups, eps, scale, shift, silu};
  }
  return plan.convolution(layer);
}

struct PlanCall {  // the arguments of one run, checked
  Tensor x{}, out{};
  int64_t n;
  const float* time;

  PlanCall(const cpu::Plan& plan, py::handle x_, py::handle time_, py::handle out_) {
    Reader read(false);
    const Shape shape = read.set_shape(x_, "x"), wanted = plan.input_shape(shape.n);
    if (shape.c != wanted.c || shape.h != wanted.h || shape.w != wanted.w)
      throw py::value_error("x must have shape (N, " + std::to_string(wanted.c) + ", " +
                            std::to_string(wanted.h) + ", " + std::to_string(wanted.w) + ")");
    n = shape.n;
    x = read.tensor(x_, "x");
    time = read.floats(time_, "time", plan.time_size());
    if (!time && plan.time_size()) throw py::value_error("time must be a tensor");
    if (out_.is_none()) return;
    const Shape result = plan.output_shape(n);
    const Shape given = read.set_shape(out_, "out");
    if (given.n != n || given.c != result.c || given.h != result.h || given.w != result.w)
      throw py::value_error("out must have shape (" + std::to_string(n) + ", " +
                            std::to_string(result.c) + ", " + std::to_string(result.h) + ", " +
                            std::to_string(result.w) + ")");
    out = read.tensor(out_, "out");
  }
};

void check_threads(int threads) {
  if (threads < 1) throw py::value_error("threads must be at least 1");
}

void def_plan(py::module_& m) {
  using cpu::Plan;
  using namespace py::literals;
  py::class_<Plan>(m, "Plan", "A network as a list of native calls; see csrc/cpu/plan.h.")
      .def(py::init<int64_t, int64_t, int64_t, bool>(), "height"_a, "width"_a, "channels"_a,
           "bf16"_a = false)
      .def("convolution", add_convolution, "name"_a, "sources"_a, "weight"_a, "bias"_a, "kernel"_a,
           py::kw_only(), "time_offset"_a = -1, "norm"_a = py::none(), "residual"_a = -1,
           "stride"_a = 1, "before"_a = 0, "after"_a = 0, "repeat"_a = 1, "algorithm"_a = "auto")
      .def("attention", &Plan::attention, "name"_a, "qkv"_a, "heads"_a)
      .def("channels", &Plan::channels, "activation"_a)
      .def("finish", &Plan::finish, "output"_a)
      .def(
          "forward",
          [](Plan& plan, py::handle x, py::handle time, py::handle out, int threads,
             int64_t group) {
            check_threads(threads);
            if (out.is_none()) throw py::value_error("out must be a tensor");
            const PlanCall call(plan, x, time, out);
            const py::gil_scoped_release release;
            return plan.forward(call.x, call.n, call.time, call.out, threads, group);
          },
          "x"_a, "time"_a, "out"_a, "threads"_a, "group"_a = 0)
      .def(
          "step",
          [](Plan& plan, py::handle xt, py::handle time, py::handle out, int threads,
             py::handle model_output, py::handle log_variance, py::handle x, const py::object& seed,
             py::handle step, py::handle sample_index, py::handle t, py::handle table,
             const std::string& prediction, bool clip) {
            check_threads(threads);
            if (out.is_none() || model_output.is_none() || x.is_none() || seed.is_none())
              throw py::value_error("out, model_output, x and seed must be given");
            const PlanCall call(plan, xt, time, out);
            const PosteriorStep op =
                posterior_step_of(false, xt, model_output, py::none(), log_variance, x, seed, step,
                                  sample_index, t, table, prediction, clip);
            cpu::check(op);
            const py::gil_scoped_release release;
            return plan.forward(call.x, call.n, call.time, call.out, threads, 0, &op);
          },
          "xt"_a, "time"_a, "out"_a, "threads"_a, py::kw_only(), "model_output"_a, "log_variance"_a,
          "x"_a, "seed"_a, "step"_a, "sample_index"_a, "t"_a, "table"_a, "prediction"_a, "clip"_a)
      .def(
          "profile",
          [](Plan& plan, py::handle x, py::handle time, py::handle out, int threads) {
            check_threads(threads);
            if (out.is_none()) throw py::value_error("out must be a tensor");
            const PlanCall call(plan, x, time, out);
            const py::gil_scoped_release release;
            return plan.profile(call.x, call.n, call.time, call.out, threads);
          },
          "x"_a, "time"_a, "out"_a, "threads"_a)
      .def(
          "not_finite",
          [](Plan& plan, py::handle x, py::handle time, int threads) {
            check_threads(threads);
            const PlanCall call(plan, x, time, py::none());
            const py::gil_scoped_release release;
            return plan.not_finite(call.x, call.n, call.time, threads);
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

// ---- what was built ----------------------------------------------------------------------------

std::vector<std::string> isas(bool available) {
  const char* names[cpu::MAX_ISAS];
  cpu::isas(available, names);
  std::vector<std::string> list;
  for (const char** name = names; *name; ++name) list.emplace_back(*name);
  return list;
}

py::dict build_info() {
  py::dict info;
  info["version"] = FASTDDPM_VERSION;
  info["compiler"] = FASTDDPM_COMPILER;
  info["isas"] = isas(false);
  info["threading"] = cpu::threading();
#if defined(FASTDDPM_CUDA)
  info["cuda"] = FASTDDPM_CUDA;
  info["cuda_architectures"] = FASTDDPM_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = "";
#endif
  return info;
}

#if defined(FASTDDPM_CUDA)
void def_cuda(py::module_& m) {
  def_randn<cuda::randn>(m);
  def_noise<cuda::noise>(m);
  def_posterior_step<cuda::posterior_step>(m);
  def_group_norm_silu<cuda::group_norm_silu>(m);
  def_group_norm_silu_backward<cuda::group_norm_silu_backward>(m);
  def_discretized_log_likelihood<cuda::discretized_log_likelihood>(m);
  m.def("group_norm_workspace", [](int64_t n, int64_t c, int64_t groups, bool backward) {
    return group_norm_workspace({n, c, 1, 1}, groups, backward);
  });
}
#endif

}  // namespace

#if !defined(FASTDDPM_CUDA_ON_CPU)
PYBIND11_MODULE(_C, m) {
  m.doc() = "fastddpm's native ops; see csrc/ops.h";

  py::module_ on_cpu = m.def_submodule("cpu");
  def_randn<cpu::randn>(on_cpu);
  def_noise<cpu::noise>(on_cpu);
  def_posterior_step<cpu::posterior_step>(on_cpu);
  def_group_norm_silu<cpu::group_norm_silu>(on_cpu);
  def_group_norm_silu_backward<cpu::group_norm_silu_backward>(on_cpu);
  def_attention_block<cpu::attention_block>(on_cpu);
  def_attention_block_backward(on_cpu);
  def_discretized_log_likelihood<cpu::discretized_log_likelihood>(on_cpu);
  def_plan(on_cpu);
  on_cpu.def("multiplies_bf16", &cpu::multiplies_bf16,
             "Whether the instruction set in use multiplies bfloat16.");
  on_cpu.def("peak_flops", &cpu::peak_flops, py::arg("threads"), py::arg("seconds") = 0.3,
             py::arg("precision") = "fp32", py::call_guard<py::gil_scoped_release>(),
             "FLOP/s of multiply-adds from registers, the best of several repeats.");
#if defined(FASTDDPM_CUDA)
  py::module_ on_cuda = m.def_submodule("cuda");
  def_cuda(on_cuda);
#endif

  m.def("build_info", &build_info, "Compiler, instruction sets, threading and CUDA of this build.");
  m.def("isa", &cpu::isa, "The instruction set in use.");
  m.def("use_isa", &cpu::use_isa, "Use another instruction set from here on.");
  m.def("isas_available", [] { return isas(true); }, "The instruction sets that this machine has.");
}
#endif
