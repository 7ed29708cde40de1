// convolution and its gradient for Python. Outputs are allocated by fastddpm/ops/cpu.py.
#include "../cpu/ops/convolution.h"

#include "reader.h"

namespace fastddpm {
namespace {

constexpr const char* PACKED = "fastddpm.packed_weights";

// What convolution and its gradient read alike, beside what is added to the result.
Convolution convolution_of(py::handle x, py::handle weight, py::handle x2, py::handle norm_weight,
                           py::handle norm_bias, int64_t groups, double eps, bool silu,
                           int64_t stride, int64_t before, int64_t after, int64_t upsample,
                           bool rounded, double dropout, py::handle seed, py::handle step,
                           py::handle sample_index) {
  Reader read(false), read_weight(false);
  Convolution op{};
  Shape shape = read.set_images(x, "x");
  op.c1 = shape.c;
  op.x = read.tensor(x, "x");
  if (!x2.is_none()) {
    const int64_t more = read.channels_of(x2, "x2");
    read.set_channels(more);
    op.x2 = read.tensor(x2, "x2");
    shape.c += more;
    read.set_channels(shape.c);
  }
  op.source = shape;
  const Shape filters = read_weight.set_shape(weight, "weight");
  if (filters.c != shape.c || filters.h != filters.w)
    Reader::refuse("weight", "must have shape (O, " + std::to_string(shape.c) + ", k, k)");
  op.weight = read_weight.tensor(weight, "weight");
  op.shape.c = filters.n, op.kernel = filters.h;
  op.stride = stride, op.before = before, op.after = after, op.upsample = upsample;
  op.rounded = rounded, op.eps = norm_eps(eps), op.silu = silu;
  op.groups = groups ? divisor("num_groups", groups, shape.c) : 0;
  op.norm_weight = read.matrix(norm_weight, "norm_weight", false);
  op.norm_bias = read.matrix(norm_bias, "norm_bias", false);
  op.dropout = read.dropout(dropout, seed, step, sample_index);
  return op;
}

void def_forward(py::module_& m) {
  m.def("convolution", [](py::handle x, py::handle weight, py::handle bias, py::handle x2,
                          py::handle norm_weight, py::handle norm_bias, py::handle shift,
                          py::handle residual, py::handle y, int64_t groups, double eps, bool silu,
                          int64_t stride, int64_t before, int64_t after, int64_t upsample,
                          bool rounded, double dropout, py::handle seed, py::handle step,
                          py::handle sample_index, py::handle packed, int64_t threads) {
    Convolution op =
        convolution_of(x, weight, x2, norm_weight, norm_bias, groups, eps, silu, stride, before,
                       after, upsample, rounded, dropout, seed, step, sample_index);
    const int64_t outputs = op.shape.c;
    Reader read(false);
    op.shape = read.set_images(y, "y");
    if (op.shape.c != outputs)
      Reader::refuse("y", "must have the " + std::to_string(outputs) + " channels of weight");
    op.y = read.output(y, "y");
    op.residual = read.optional(residual, "residual");
    op.bias = read.weight(bias, "bias", outputs);
    if (!shift.is_none())
      op.shift = read.is_vector(shift, "shift") ? read.weight(shift, "shift", outputs)
                                                : read.weight(shift, "shift", op.shape.n, outputs);
    if (!packed.is_none()) {
      if (!PyCapsule_IsValid(packed.ptr(), PACKED))
        Reader::refuse("packed", "must be None or what packed_weights() made");
      op.packed = static_cast<cpu::PackedWeights*>(PyCapsule_GetPointer(packed.ptr(), PACKED));
    }
    const int team = thread_count(threads);
    const py::gil_scoped_release nogil;
    cpu::convolution(op, team);
  });
}

void def_backward(py::module_& m) {
  m.def("convolution_backward",
        [](py::handle grad, py::handle x, py::handle weight, py::handle x2, py::handle norm_weight,
           py::handle norm_bias, int64_t groups, double eps, bool silu, int64_t stride,
           int64_t before, int64_t after, int64_t upsample, bool rounded, double dropout,
           py::handle seed, py::handle step, py::handle sample_index, py::handle dx, py::handle dx2,
           py::handle dnorm_weight, py::handle dnorm_bias, py::handle dweight, py::handle dbias,
           py::handle dshift, int64_t threads) {
          ConvolutionBackward op{};
          op.forward =
              convolution_of(x, weight, x2, norm_weight, norm_bias, groups, eps, silu, stride,
                             before, after, upsample, rounded, dropout, seed, step, sample_index);
          const int64_t c1 = op.forward.c1, c = op.forward.source.c, outputs = op.forward.shape.c;
          Reader read(false), read_x(false), read_weight(false);
          op.forward.shape = read.set_images(grad, "grad");
          if (op.forward.shape.c != outputs)
            Reader::refuse("grad",
                           "must have the " + std::to_string(outputs) + " channels of weight");
          op.grad = read.tensor(grad, "grad");
          op.dbias = read.floats(dbias, "dbias", outputs);
          op.dshift = read.floats(dshift, "dshift", op.forward.shape.n, outputs);
          read_x.set_images(x, "x");
          op.dx = dx.is_none() ? Tensor{} : read_x.output(dx, "dx");
          if (!dx2.is_none()) {
            read_x.set_channels(c - c1);
            op.dx2 = read_x.output(dx2, "dx2");
          }
          if (!dx.is_none() && x2.is_none() != dx2.is_none())
            throw py::value_error("x2 and dx2 must both be given, or neither");
          op.dnorm_weight = read.floats(dnorm_weight, "dnorm_weight", c);
          op.dnorm_bias = read.floats(dnorm_bias, "dnorm_bias", c);
          if (!dweight.is_none()) {
            read_weight.set_shape(weight, "weight");
            const Tensor out = read_weight.output(dweight, "dweight");
            if (out.dtype != DType::f32) Reader::refuse("dweight", "must be float32");
            op.dweight = static_cast<float*>(out.data);
            std::copy_n(out.stride, 4, op.dweight_stride);
          }
          const int team = thread_count(threads);
          const py::gil_scoped_release nogil;
          cpu::convolution_backward(op, team);
        });
}

}  // namespace

void def_convolution(py::module_& m) {
  // A capsule: Python can't make an empty one.
  m.def("packed_weights", [] {
    return py::capsule(new cpu::PackedWeights, PACKED, [](PyObject* capsule) {
      delete static_cast<cpu::PackedWeights*>(PyCapsule_GetPointer(capsule, PACKED));
    });
  });
  def_forward(m);
  def_backward(m);
}

}  // namespace fastddpm
