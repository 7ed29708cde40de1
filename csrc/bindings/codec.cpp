// The coder of ../codec/coder.h for Python: a stack that latents and pixels are pushed onto.
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>

#include "../codec/coder.h"
#include "../codec/gaussian.h"
#include "reader.h"

namespace fastddpm {
namespace {

using codec::Gaussians;
using codec::Rans;
using codec::Status;

constexpr int LARGEST_EXPONENT = 64;

std::vector<uint16_t> words_of(const py::bytes& bytes, const char* name) {
  char* data = nullptr;
  py::ssize_t size = 0;
  if (PyBytes_AsStringAndSize(bytes.ptr(), &data, &size)) throw py::error_already_set();
  if (size % 2)
    throw py::value_error(std::string(name) + " must be words of 2 bytes; got " +
                          std::to_string(size) + " bytes");
  std::vector<uint16_t> words(size_t(size) / 2);
  const auto* at = reinterpret_cast<const uint8_t*>(data);
  for (uint16_t& word : words) word = uint16_t(at[0] | at[1] << 8), at += 2;
  return words;
}

py::bytes bytes_of(const std::vector<uint16_t>& words) {
  std::string bytes;
  bytes.reserve(2 * words.size());
  for (uint16_t word : words) bytes += char(word & 0xff), bytes += char(word >> 8);
  return bytes;
}

// A stack and the thread that is at it.
class Coder {
 public:
  explicit Coder(const py::bytes& supply) : rans(words_of(supply, "supply")) {}

  Coder(uint64_t state, const py::bytes& words) : rans(state, words_of(words, "words")) {
    if (state < codec::LOWEST) throw py::value_error("state must be at least 2^48");
  }

  using Values = Status (*)(Rans&, const Gaussians&, float*);
  using Pixels = Status (*)(Rans&, const Gaussians&, uint8_t*);

  void gaussian(Values run, py::handle values, py::handle mean, py::handle log_variance,
                int exponent, bool outside, bool backwards) {
    if (exponent < -LARGEST_EXPONENT || exponent > LARGEST_EXPONENT)
      throw py::value_error("exponent must be in -64 .. 64; got " + std::to_string(exponent));
    Reader read(false);
    const int64_t count = read.set_shape(values, "values").n;
    float* at = vector(read, values, "values", count);
    call(run, at, gaussians(read, count, mean, log_variance, exponent, outside, backwards));
  }

  void levels(Pixels run, py::handle pixels, py::handle mean, py::handle log_variance,
              bool backwards) {
    Reader read(false);
    const Shape shape = read.set_shape(pixels, "pixels");
    const Tensor tensor = read.tensor(pixels, "pixels", true);
    if (tensor.dtype != DType::u8) Reader::refuse("pixels", "must be uint8");
    if (shape.c * shape.h * shape.w != 1 || (tensor.stride[0] != 1 && shape.n > 1))
      Reader::refuse("pixels", "must be contiguous, in one dimension");
    call(run, static_cast<uint8_t*>(tensor.data),
         gaussians(read, shape.n, mean, log_variance, 0, false, backwards));
  }

  py::tuple content() {
    const std::lock_guard<std::mutex> alone(mutex);
    return py::make_tuple(rans.state, bytes_of(rans.words));
  }

  uint64_t taken() {
    const std::lock_guard<std::mutex> alone(mutex);
    return rans.taken;
  }

  double bits() {
    const std::lock_guard<std::mutex> alone(mutex);
    return 16.0 * (double(rans.words.size()) - double(rans.taken)) + std::log2(double(rans.state));
  }

  // The bits of the words that there were at the least since the last call.
  double lowest() {
    const std::lock_guard<std::mutex> alone(mutex);
    const double least = 16.0 * (double(rans.lowest) - double(rans.taken));
    rans.lowest = rans.words.size();
    return least;
  }

 private:
  Rans rans;
  std::mutex mutex;
  bool failed = false;

  static float* vector(Reader& read, py::handle x, const char* name, int64_t count) {
    if (x.is_none()) Reader::refuse(name, "must be a tensor");
    return read.floats(x, name, count);
  }

  static Gaussians gaussians(Reader& read, int64_t count, py::handle mean, py::handle log_variance,
                             int exponent, bool outside, bool backwards) {
    Gaussians of{count,    vector(read, mean, "mean", count), nullptr, 0.0, exponent, outside,
                 backwards};
    if (PyFloat_Check(log_variance.ptr()))
      of.common = PyFloat_AS_DOUBLE(log_variance.ptr());
    else
      of.log_variance = vector(read, log_variance, "log_variance", count);
    return of;
  }

  template <class T>
  void call(Status (*run)(Rans&, const Gaussians&, T*), T* values, const Gaussians& of) {
    Status status;
    {
      const py::gil_scoped_release release;
      const std::lock_guard<std::mutex> alone(mutex);
      if (failed) {
        status = Status::outside;
      } else {
        failed = true;  // what is cut off in the middle has left half a call on the stack
        status = run(rans, of, values);
        failed = status != Status::done;
      }
    }
    switch (status) {
      case Status::done:
        return;
      case Status::exhausted:
        throw py::value_error("the coded stream has run out of words");
      case Status::not_finite:
        throw py::value_error("a mean or a variance is not finite");
      case Status::off_grid:
        throw py::value_error("a value or a mean lies off the grid of its latent");
      case Status::outside:
        throw py::value_error("the coded stream is not the encoder's: a value can't have come up");
    }
  }
};

template <Status (*run)(Rans&, const Gaussians&, const float*)>
Status reads(Rans& rans, const Gaussians& of, float* values) {
  return run(rans, of, values);
}

template <Status (*run)(Rans&, const Gaussians&, const uint8_t*)>
Status reads(Rans& rans, const Gaussians& of, uint8_t* pixels) {
  return run(rans, of, pixels);
}

template <Coder::Values run>
void def_values(py::class_<Coder>& c, const char* name) {
  using namespace py::literals;
  c.def(
      name,
      [](Coder& coder, py::handle values, py::handle mean, py::handle log_variance, int exponent,
         bool outside, bool backwards) {
        coder.gaussian(run, values, mean, log_variance, exponent, outside, backwards);
      },
      "values"_a, "mean"_a, "log_variance"_a, py::kw_only(), "exponent"_a, "outside"_a,
      "backwards"_a = false);
}

template <Coder::Pixels run>
void def_levels(py::class_<Coder>& c, const char* name) {
  using namespace py::literals;
  c.def(
      name,
      [](Coder& coder, py::handle pixels, py::handle mean, py::handle log_variance,
         bool backwards) { coder.levels(run, pixels, mean, log_variance, backwards); },
      "pixels"_a, "mean"_a, "log_variance"_a, py::kw_only(), "backwards"_a = false);
}

// F(j) of every bin edge of one window, for tests against other coders: (index of the first bin,
// [F(0) .. F(bins)]).
py::tuple cumulative(float mean, double log_variance, int exponent, bool outside) {
  const int64_t weight = codec::weight_of(log_variance, exponent);
  codec::Window window;
  if (weight < 0 || !codec::window_of(mean, weight, exponent, outside, window))
    throw py::value_error("no window: the mean lies off the grid, or the variance is not finite");
  py::list edges;
  for (int64_t j = 0; j <= window.bins; ++j) edges.append(window.below(j));
  return py::make_tuple(window.first, edges);
}

py::list cumulative_levels(float mean, double log_variance) {
  const int64_t weight = codec::weight_of(log_variance, 0, 1.0 / 127.5);
  codec::Window window;
  if (weight < 0 || !codec::levels_of(mean, weight, window))
    throw py::value_error("no levels: the mean or the variance is not finite");
  py::list edges;
  for (int64_t j = 0; j <= window.bins; ++j) edges.append(window.below(j));
  return edges;
}

py::bytes tail_table() {
  std::string bytes;
  for (uint32_t value : codec::tables().tail)
    for (int shift = 0; shift < 32; shift += 8) bytes += char(value >> shift & 0xff);
  return bytes;
}

}  // namespace

void def_codec(py::module_& m) {
  using namespace py::literals;
  py::class_<Coder> c(m, "Coder", "A stack of bits; see csrc/codec/coder.h.");
  c.def(py::init<const py::bytes&>(), "supply"_a = py::bytes());
  c.def(py::init<uint64_t, const py::bytes&>(), "state"_a, "words"_a);
  def_values<reads<codec::push>>(c, "push_gaussian");
  def_values<codec::pop>(c, "pop_gaussian");
  def_levels<reads<codec::push_levels>>(c, "push_levels");
  def_levels<codec::pop_levels>(c, "pop_levels");
  c.def("content", &Coder::content, "(state, words as bytes, the last is the top)");
  c.def("lowest", &Coder::lowest, "Net bits of the words that there were at the least, until now.");
  c.def_property_readonly("bits", &Coder::bits, "On the stack, less those of the supply.");
  c.def_property_readonly("taken", &Coder::taken, "Words of the supply and random ones after it.");
  m.def(
      "random_words",
      [](uint64_t count) {
        if (count > uint64_t(MAX_SIZE) * 64) throw py::value_error("count must be below 2^30");
        std::vector<uint16_t> words(count);
        for (uint64_t k = 0; k < count; ++k) words[k] = Rans::random(k);
        return bytes_of(words);
      },
      "count"_a, "The first words that follow a supply.");
  m.def("cumulative", &cumulative, "mean"_a, "log_variance"_a, "exponent"_a, "outside"_a);
  m.def("cumulative_levels", &cumulative_levels, "mean"_a, "log_variance"_a);
  m.def("tail_table", &tail_table, "2^32 (1 - Phi) at every 2^-10 from 0 on, as bytes.");
}

}  // namespace fastddpm
