// The border that no bad pointer passes: torch tensors as what ops.h takes, without linking torch.
//
// A tensor is asked by the functions of torch's own base class, whatever its type makes of them.
// Before an address is used it is certain that the tensor is a plain one on the right device, of
// the storage type and shape that the op expects, that its storage holds every element that its
// strides lead to, and, where the op writes, that no two elements of a dimension share memory.
// Everything else is a TypeError or a ValueError that names the argument.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <thread>

#include "../ops.h"

namespace fastddpm {

namespace py = pybind11;

constexpr int64_t MAX_ELEMENTS = int64_t(1) << 48;  // of a tensor: no product of sizes overflows
constexpr int MAX_DIMS = 64;                        // of a tensor that is only walked as it lies
constexpr int64_t MAX_SIZE = int64_t(1) << 24;      // of an argument that stands for a size alone

struct Torch {                                    // looked up once
  PyObject *base, *tensor, *parameter, *disable;  // types
  PyObject *float32, *bfloat16, *float16, *float64, *uint8, *int64, *boolean;
  // Functions of the base class and of storages; properties are asked by getter_of().
  PyObject *shape, *dtype, *stride, *get_device, *is_cpu, *is_neg, *is_inference, *data_ptr;
  PyObject* storage;
  PyObject *storage_bytes, *storage_ptr;

  Torch() {
    const py::module_ module = py::module_::import("torch");
    const auto find = [](const py::handle& object, const char* name) {
      return py::object(object.attr(name)).release().ptr();
    };
    base = find(module.attr("_C"), "TensorBase"), tensor = find(module, "Tensor");
    parameter = find(module.attr("nn"), "Parameter");
    disable = find(module.attr("_C"), "DisableTorchFunctionSubclass");
    float32 = find(module, "float32"), bfloat16 = find(module, "bfloat16");
    float16 = find(module, "float16"), uint8 = find(module, "uint8");
    float64 = find(module, "float64");
    int64 = find(module, "int64"), boolean = find(module, "bool");
    shape = find(base, "shape"), dtype = find(base, "dtype"), is_cpu = find(base, "is_cpu");
    stride = find(base, "stride"), get_device = find(base, "get_device");
    is_neg = find(base, "is_neg"), data_ptr = find(base, "data_ptr");
    is_inference = find(base, "is_inference");
    storage = find(base, "untyped_storage");
    const py::object untyped = module.attr("UntypedStorage");
    storage_bytes = find(untyped, "nbytes"), storage_ptr = find(untyped, "data_ptr");
  }
};

inline const Torch& torch() {
  static const Torch* instance = new Torch();  // lives as long as the interpreter
  return *instance;
}

// At most 4 numbers of a tuple; `size` is their count.
struct Numbers {
  int64_t value[4] = {0, 0, 0, 0};
  int size = 0;

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
    require(x, name);
    this->pad = pad;
    const Numbers sizes = shape_of(x, name);
    if (sizes.size == 0 && pad == Pad::back)
      throw py::value_error(std::string(name) + " must have at least 1 dimension");
    dims = sizes.size;
    int64_t padded[4] = {1, 1, 1, 1}, elements = 1;
    for (int i = 0; i < dims; ++i) {
      const int64_t size = sizes.value[i];
      padded[at(i)] = size;
      if (size > MAX_ELEMENTS / elements)
        throw py::value_error(std::string(name) + " is too large: " + sizes.text());
      elements *= size > 1 ? size : 1;
    }
    shape = {padded[0], padded[1], padded[2], padded[3]};
    return shape;
  }

  // The same for images, (N, C, H, W).
  Shape set_images(py::handle x, const char* name) {
    const Shape images = set_shape(x, name);
    if (dims != 4) refuse(name, "must be (N, C, H, W)");
    return images;
  }

  Tensor tensor(py::handle x, const char* name, bool bytes = false) {
    require(x, name);
    const Numbers sizes = shape_of(x, name);
    const int64_t expected[4] = {shape.n, shape.c, shape.h, shape.w};
    bool same = sizes.size == dims;
    for (int i = 0; same && i < dims; ++i) same = sizes.value[i] == expected[at(i)];
    if (!same) {
      Numbers wanted;
      wanted.size = dims;
      for (int i = 0; i < dims; ++i) wanted.value[i] = expected[at(i)];
      refuse(name, "must have shape " + wanted.text() + "; got " + sizes.text());
    }
    const DType type = dtype(x, name, bytes);
    const Numbers strides = strides_of(x, name);
    Tensor tensor{address(x, name, sizes, strides, bytes_of(type)), type, {1, 1, 1, 1}};
    for (int i = 0; i < dims; ++i) tensor.stride[at(i)] = strides.value[i];
    return tensor;
  }

  // One that may not be given: null.
  Tensor optional(py::handle x, const char* name) {
    return x.is_none() ? Tensor{nullptr, DType::f32, {0, 0, 0, 0}} : tensor(x, name);
  }

  // One that the op writes.
  Tensor output(py::handle x, const char* name) {
    const Tensor out = tensor(x, name);
    const int64_t size[4] = {shape.n, shape.c, shape.h, shape.w};
    for (int i = 0; i < 4; ++i)
      if (out.data && size[i] > 1 && out.stride[i] == 0)
        refuse(name, "must not be an expanded tensor: its elements share memory");
    return out;
  }

  Matrix matrix(py::handle x, const char* name, bool per_sample) {
    return per_sample ? weight(x, name, shape.n, shape.c) : weight(x, name, shape.c);
  }

  // Whether x has one dimension.
  bool is_vector(py::handle x, const char* name) {
    require(x, name);
    return shape_of(x, name).size == 1;
  }

  int64_t channels_of(py::handle x, const char* name) {
    require(x, name);
    const Numbers sizes = shape_of(x, name);
    if (sizes.size < 2) refuse(name, "must be (N, C, ...); got " + sizes.text());
    return sizes.value[1];
  }

  // (rows, columns), or without columns (rows,) as a single row; null if not given.
  Matrix weight(py::handle x, const char* name, int64_t rows, int64_t columns = -1) {
    if (x.is_none()) return {nullptr, DType::f32, 0, 0};
    const Numbers sizes = vector(x, name, rows, columns), strides = strides_of(x, name);
    const DType type = dtype(x, name, false);
    void* data = address(x, name, sizes, strides, bytes_of(type));
    if (columns < 0) return {data, type, 0, strides.value[0]};
    return {data, type, strides.value[0], strides.value[1]};
  }

  // (N,) int64, any stride.
  PerSample per_sample(py::handle x, const char* name) {
    require(x, name);
    const Numbers sizes = vector(x, name, shape.n, -1), strides = strides_of(x, name);
    require_dtype(x, name, torch().int64, "int64");
    return {static_cast<const int64_t*>(address(x, name, sizes, strides, 8)), strides.value[0]};
  }

  // (N,) bool, contiguous; null if not given.
  const uint8_t* flags(py::handle x, const char* name) {
    if (x.is_none()) return nullptr;
    const Numbers sizes = vector(x, name, shape.n, -1), strides = strides_of(x, name);
    require_dtype(x, name, torch().boolean, "bool");
    if (strides.value[0] != 1 && shape.n > 1) refuse(name, "must be contiguous");
    return static_cast<const uint8_t*>(address(x, name, sizes, strides, 1));
  }

  // (N,) int64, contiguous, that the op writes.
  int64_t* words_out(py::handle x, const char* name) {
    const PerSample words = per_sample(x, name);
    if (words.stride != 1 && shape.n > 1) refuse(name, "must be contiguous");
    return const_cast<int64_t*>(words.data);
  }

  // (N,) bool, contiguous, that the op writes.
  uint8_t* flags_out(py::handle x, const char* name) {
    require(x, name);
    return const_cast<uint8_t*>(flags(x, name));
  }

  // Contiguous float32; null if not given.
  float* floats(py::handle x, const char* name, int64_t rows, int64_t columns = -1) {
    if (x.is_none()) return nullptr;
    const Numbers sizes = vector(x, name, rows, columns), strides = strides_of(x, name);
    require_dtype(x, name, torch().float32, "float32");
    const bool contiguous = columns < 0 ? strides.value[0] == 1 || rows <= 1
                                        : (strides.value[1] == 1 || columns <= 1) &&
                                              (strides.value[0] == columns || rows <= 1);
    if (!contiguous && rows && columns) refuse(name, "must be contiguous");
    return static_cast<float*>(address(x, name, sizes, strides, 4));
  }

  // (count,) contiguous float64 that the op writes.
  double* doubles(py::handle x, const char* name, int64_t count) {
    const Numbers sizes = vector(x, name, count, -1), strides = strides_of(x, name);
    require_dtype(x, name, torch().float64, "float64");
    if (strides.value[0] != 1 && count > 1) refuse(name, "must be contiguous");
    return static_cast<double*>(address(x, name, sizes, strides, 8));
  }

  // The elements of a dense tensor of any shape, in the order of its memory.
  Flat flat(py::handle x, const char* name) {
    require(x, name);
    const py::object shape = get(torch().shape, x, name);
    int64_t sizes[MAX_DIMS], strides[MAX_DIMS], elements = 1;
    const int dims = values(shape, sizes, name);
    {
      const Plainly plainly(x);
      values(ask(torch().stride, x, name), strides, name);
    }
    int left = 0;  // dimensions of more than one place
    for (int i = 0; i < dims; ++i) {
      if (sizes[i] == 0) return {nullptr, dtype(x, name, false), 0};
      if (sizes[i] > 1) sizes[left] = sizes[i], strides[left++] = strides[i];
    }
    for (int i = 0; i < left; ++i) {
      int next = i;  // that runs fastest of those left
      while (next < left && strides[next] != elements) ++next;
      if (next == left) refuse(name, "must be dense: contiguous in some order of its dimensions");
      if (sizes[next] > MAX_ELEMENTS / elements) refuse(name, "is too large");
      elements *= sizes[next];
      sizes[next] = sizes[i], strides[next] = strides[i];
    }
    const DType type = dtype(x, name, false);
    Numbers size, step;
    size.size = step.size = 1, size.value[0] = elements, step.value[0] = 1;
    return {address(x, name, size, step, bytes_of(type)), type, elements};
  }

  // Shape and strides, as torch gives them.
  struct Layout {
    py::object shape, strides;

    bool operator==(const Layout& other) const {
      return shape.equal(other.shape) && strides.equal(other.strides);
    }
  };

  Layout layout_of(py::handle x, const char* name) {
    const Plainly plainly(x);
    return {get(torch().shape, x, name), ask(torch().stride, x, name)};
  }

  // `count` float32 numbers of a dense tensor that lies as `layout` says.
  float* laid_out(py::handle x, const char* name, const Layout& layout, int64_t count) {
    if (!(layout_of(x, name) == layout)) refuse(name, "lies in another order");
    require_dtype(x, name, torch().float32, "float32");
    Numbers size, step;
    size.size = step.size = 1, size.value[0] = count, step.value[0] = 1;
    return static_cast<float*>(address(x, name, size, step, 4));
  }

  // Whether x is of torch's own types, no subclass.
  static bool is_plain(py::handle x) {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(x.ptr()));
    return type == torch().tensor || type == torch().parameter;
  }

  // Whether only inference mode may write x.
  static bool is_inference(py::handle x, const char* name) {
    return ask(torch().is_inference, x, name).ptr() != Py_False;
  }

  // The one float32 number of a tensor without dimensions; null if not given.
  float* number_of(py::handle x, const char* name) {
    if (x.is_none()) return nullptr;
    require(x, name);
    if (shape_of(x, name).size) refuse(name, "must have no dimensions");
    require_dtype(x, name, torch().float32, "float32");
    return static_cast<float*>(address(x, name, {}, {}, 4));
  }

  // The shape of the tensors to come has so many channels.
  void set_channels(int64_t channels) { shape.c = channels; }

  // seed: an int, or a (1,) int64 tensor of the same bits, which CUDA reads when a kernel runs.
  Random random(py::handle seed, py::handle step, py::handle sample_index) {
    if (seed.is_none()) return {};
    if (PyObject_TypeCheck(seed.ptr(), reinterpret_cast<PyTypeObject*>(torch().base))) {
      const Numbers sizes = vector(seed, "seed", 1, -1), strides = strides_of(seed, "seed");
      require_dtype(seed, "seed", torch().int64, "int64");
      const auto* at = static_cast<const int64_t*>(address(seed, "seed", sizes, strides, 8));
#if defined(FASTDDPM_CUDA_ON_CPU)
      const bool later = true;
#else
      const bool later = cuda;
#endif
      return {later ? 0 : uint64_t(*at), per_sample(step, "step"),
              per_sample(sample_index, "sample_index"), later ? at : nullptr};
    }
    const uint64_t bits = PyLong_AsUnsignedLongLongMask(seed.ptr());  // any int, modulo 2^64
    if (PyErr_Occurred()) throw py::error_already_set();
    return {bits, per_sample(step, "step"), per_sample(sample_index, "sample_index"), nullptr};
  }

  // p in [0, 1); without a p nothing is read.
  Dropout dropout(double p, py::handle seed, py::handle step, py::handle sample_index) {
    if (!(p >= 0.0 && p < 1.0))
      throw py::value_error("dropout must be in [0, 1); got " + std::to_string(p));
    const auto threshold = uint32_t(p * 4294967296.0);
    if (!threshold) return {1.0f, 0, {}};
    if (seed.is_none()) throw py::value_error("dropout needs a seed");
    return {float(1.0 / (1.0 - p)), threshold, random(seed, step, sample_index)};
  }

  Table table(py::handle x) {
    require(x, "table");
    const Numbers sizes = shape_of(x, "table");
    // CUDA takes the nearest row for a t outside the table: there must be one.
    if (sizes.size != 2 || sizes.value[0] < 1)
      refuse("table", "must have shape (T, K), T >= 1; got " + sizes.text());
    return {floats(x, "table", sizes.value[0], COLUMNS), sizes.value[0]};
  }

  [[noreturn]] static void refuse(const char* name, const std::string& what) {
    throw py::value_error(std::string(name) + " " + what);
  }

 private:
  // Lets the base class answer for a subclass that has a __torch_function__.
  class Plainly {
   public:
    explicit Plainly(py::handle x) {
      if (is_plain(x)) return;
      guard = py::reinterpret_borrow<py::object>(torch().disable)();
      guard.attr("__enter__")();
    }
    ~Plainly() noexcept(false) {
      if (guard) guard.attr("__exit__")(py::none(), py::none(), py::none());
    }
    Plainly(const Plainly&) = delete;
    Plainly& operator=(const Plainly&) = delete;

   private:
    py::object guard;
  };

  const bool cuda;
  int64_t device = -2;
  Shape shape{0, 0, 0, 0};
  int dims = 0;
  Pad pad = Pad::back;

  int at(int i) const { return pad == Pad::front ? 4 - dims + i : i; }

  static void require(py::handle x, const char* name) {
    if (!PyObject_TypeCheck(x.ptr(), reinterpret_cast<PyTypeObject*>(torch().base)))
      throw py::type_error(std::string(name) + " must be a tensor; got " +
                           Py_TYPE(x.ptr())->tp_name);
  }

  // What torch answers; its errors (a tensor without strides or without memory) become ours.
  static py::object answer(PyObject* value, const char* name) {
    if (value) return py::reinterpret_steal<py::object>(value);
    const py::error_already_set error;
    if (!error.matches(PyExc_Exception)) throw error;
    const std::string text = py::str(error.value());
    refuse(name, "is not a plain tensor in memory: " + text.substr(0, text.find('\n')));
  }

  static py::object get(PyObject* property, py::handle x, const char* name) {
    require(x, name);
    const Plainly plainly(x);
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(x.ptr()));
    return answer(Py_TYPE(property)->tp_descr_get(property, x.ptr(), type), name);
  }

  static py::object ask(PyObject* method, py::handle x, const char* name) {
    return answer(PyObject_CallOneArg(method, x.ptr()), name);
  }

  static Numbers numbers(const py::object& tuple, const char* name) {
    Numbers numbers;
    const int64_t size = PyTuple_Check(tuple.ptr()) ? PyTuple_GET_SIZE(tuple.ptr()) : 5;
    if (size > 4) refuse(name, "must have at most 4 dimensions; got " + std::to_string(size));
    numbers.size = int(size);
    for (int i = 0; i < numbers.size; ++i) {
      numbers.value[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
      if (numbers.value[i] < 0) {
        if (PyErr_Occurred()) throw py::error_already_set();
        refuse(name, "has a negative size or stride");
      }
    }
    return numbers;
  }

  static int values(const py::object& tuple, int64_t (&to)[MAX_DIMS], const char* name) {
    const int64_t size = PyTuple_Check(tuple.ptr()) ? PyTuple_GET_SIZE(tuple.ptr()) : MAX_DIMS + 1;
    if (size > MAX_DIMS) refuse(name, "has too many dimensions");
    for (int i = 0; i < int(size); ++i)
      to[i] = number(py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(tuple.ptr(), i)));
    return int(size);
  }

  static Numbers shape_of(py::handle x, const char* name) {
    return numbers(get(torch().shape, x, name), name);
  }

  static Numbers strides_of(py::handle x, const char* name) {
    const Plainly plainly(x);
    return numbers(ask(torch().stride, x, name), name);
  }

  static Numbers vector(py::handle x, const char* name, int64_t rows, int64_t columns) {
    const Numbers sizes = shape_of(x, name);
    if (sizes.size != (columns < 0 ? 1 : 2) || sizes.value[0] != rows ||
        (columns >= 0 && sizes.value[1] != columns))
      refuse(name, "must have shape (" + std::to_string(rows) + "," +
                       (columns < 0 ? "" : " " + std::to_string(columns)) + "); got " +
                       sizes.text());
    return sizes;
  }

  static int64_t number(const py::object& value) {
    const int64_t number = PyLong_AsLongLong(value.ptr());
    if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
    return number;
  }

  // Bytes from the first element to the end of the last; -1 if no storage is so long.
  static int64_t extent(const Numbers& sizes, const Numbers& strides, int64_t element) {
    int64_t last = 0;
    for (int i = 0; i < sizes.size; ++i) {
      if (sizes.value[i] == 0) return 0;
      const int64_t steps = sizes.value[i] - 1, stride = strides.value[i];
      if (steps && stride > MAX_ELEMENTS / steps) return -1;
      last += steps * stride;
    }
    return (last + 1) * element;
  }

  void* address(py::handle x, const char* name, const Numbers& sizes, const Numbers& strides,
                int64_t element) {
    const Plainly plainly(x);
    if (!cuda) {
      if (get(torch().is_cpu, x, name).ptr() != Py_True) refuse(name, "must be on the CPU");
    } else {
      const int64_t index = number(ask(torch().get_device, x, name));  // -1: not on a GPU
      if (index < 0) refuse(name, "must be on a CUDA device");
      if (device != -2 && device != index)
        refuse(name, "is not on the device of the tensors before it");
      device = index;
    }
    if (ask(torch().is_neg, x, name).ptr() != Py_False)
      refuse(name, "is a lazily negated view: call its resolve_neg() first");
    const int64_t bytes = extent(sizes, strides, element);
    if (bytes == 0) return nullptr;
    const py::object storage = ask(torch().storage, x, name);
    const uint64_t begin = uint64_t(number(ask(torch().storage_ptr, storage, name)));
    const uint64_t length = uint64_t(number(ask(torch().storage_bytes, storage, name)));
    const uint64_t first = uint64_t(number(ask(torch().data_ptr, x, name)));
    if (!begin) refuse(name, "is not a plain tensor in memory: its storage is empty");
    if (bytes < 0 || first < begin || first - begin > length ||
        uint64_t(bytes) > length - (first - begin))
      refuse(name, "reaches outside its storage of " + std::to_string(length) + " bytes");
    return reinterpret_cast<void*>(uintptr_t(first));
  }

  static int64_t bytes_of(DType type) { return type == DType::f32 ? 4 : type == DType::u8 ? 1 : 2; }

  static DType dtype(py::handle x, const char* name, bool bytes) {
    const py::object type = get(torch().dtype, x, name);
    if (type.ptr() == torch().float32) return DType::f32;
    if (type.ptr() == torch().bfloat16) return DType::bf16;
    if (type.ptr() == torch().float16) return DType::f16;
    if (type.ptr() == torch().uint8 && bytes) return DType::u8;
    refuse(name, std::string("must be float32, bfloat16") +
                     (bytes ? ", float16 or uint8" : " or float16") + "; got " +
                     std::string(py::str(type)));
  }

  static void require_dtype(py::handle x, const char* name, PyObject* wanted, const char* text) {
    const py::object type = get(torch().dtype, x, name);
    if (type.ptr() != wanted)
      refuse(name, std::string("must be ") + text + "; got " + std::string(py::str(type)));
  }
};

// How many threads an op runs on. Results do not depend on it: what is too many is cut, as a system
// that can't give so many makes OpenMP end the process.
inline int thread_count(int64_t threads) {
  static const int64_t most = std::max<int64_t>(64, 4 * std::thread::hardware_concurrency());
  if (threads < 1)
    throw py::value_error("threads must be at least 1; got " + std::to_string(threads));
  return int(std::min(threads, most));
}

// `parts` of the channels, all of one size.
inline int64_t divisor(const char* name, int64_t parts, int64_t channels) {
  if (parts < 1 || channels < 1 || channels % parts)
    throw py::value_error(std::string(name) + " must divide the channels; got " +
                          std::to_string(parts) + " and " + std::to_string(channels));
  return parts;
}

// eps of a norm: a number of at least 0.
inline float norm_eps(double eps) {
  if (!(eps >= 0.0))
    throw py::value_error("eps must be a number of at least 0; got " + std::to_string(eps));
  return float(eps);
}

PosteriorStep posterior_step_of(bool cuda, py::handle xt, py::handle model_output, py::handle z,
                                py::handle log_variance, py::handle out, py::handle seed,
                                py::handle step, py::handle sample_index, py::handle t,
                                py::handle table, const std::string& prediction, bool clip,
                                bool learned_range);

void def_codec(py::module_& m);
void def_cpu_ops(py::module_& m);
void def_convolution(py::module_& m);
void def_plan(py::module_& m);
void def_cuda(py::module_& m);

}  // namespace fastddpm
