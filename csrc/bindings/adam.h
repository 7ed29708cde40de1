// The ops over lists of tensors for Python: adam and grad_norm.
#pragma once
#include <vector>

#include "launch.h"

namespace fastddpm {
namespace {

// The tensors of a Python list or tuple, one after the other.
class List {
 public:
  List(py::handle list, const char* name) : name(name) {
    if (!PyList_Check(list.ptr()) && !PyTuple_Check(list.ptr()))
      throw py::type_error(std::string(name) + " must be a list of tensors; got " +
                           Py_TYPE(list.ptr())->tp_name);
    items = py::reinterpret_steal<py::object>(PySequence_Tuple(list.ptr()));
    if (!items) throw py::error_already_set();
  }

  int64_t size() const { return PyTuple_GET_SIZE(items.ptr()); }

  py::handle operator[](int64_t i) const { return PyTuple_GET_ITEM(items.ptr(), i); }

  // What item i is called in an error.
  const char* name_of(int64_t i) {
    std::snprintf(text, sizeof text, "%s[%lld]", name, static_cast<long long>(i));
    return text;
  }

  void require_size(int64_t expected) const {
    if (size() != expected)
      Reader::refuse(name, "must have " + std::to_string(expected) + " tensors; got " +
                               std::to_string(size()));
  }

 private:
  const char* name;
  py::object items;
  char text[64];
};

// Item i, of `elements` float32 numbers.
inline float* floats_of(Reader& read, List& list, int64_t i, int64_t elements) {
  const Flat flat = read.flat(list[i], list.name_of(i));
  if (flat.dtype != DType::f32) Reader::refuse(list.name_of(i), "must be float32");
  if (flat.size != elements)
    Reader::refuse(list.name_of(i), "must have " + std::to_string(elements) + " elements; got " +
                                        std::to_string(flat.size));
  return static_cast<float*>(flat.data);
}

// averages: as many as params, or none;  copies: of the first of them.
template <auto run>
void def_adam(py::module_& m) {
  m.def("adam",
        [](py::handle params, py::handle grads, py::handle exp_avgs, py::handle exp_avg_sqs,
           py::handle steps, py::handle averages, py::handle copies, py::handle lr,
           py::handle share, py::handle norm, py::handle refused, double beta1, double beta2,
           double eps, double clip, double grad_scale, py::handle workspace, int64_t where) {
          Reader read(is_cuda(run));
          List param(params, "params"), grad(grads, "grads"), exp_avg(exp_avgs, "exp_avgs");
          List exp_avg_sq(exp_avg_sqs, "exp_avg_sqs"), step(steps, "steps");
          List average(averages, "averages"), copy(copies, "copies");
          const int64_t count = param.size();
          for (const List* list : {&grad, &exp_avg, &exp_avg_sq, &step}) list->require_size(count);
          if (average.size()) average.require_size(count);
          if (copy.size() > count) copy.require_size(count);
          if (lr.is_none() || share.is_none()) throw py::value_error("lr and share must be given");

          std::vector<AdamTensors> tensors{size_t(count)};
          for (int64_t i = 0; i < count; ++i) {
            AdamTensors& t = tensors[size_t(i)];
            const Flat p = read.flat(param[i], param.name_of(i));
            if (p.dtype != DType::f32) Reader::refuse(param.name_of(i), "must be float32");
            t.param = static_cast<float*>(p.data), t.size = p.size;
            const Flat g = read.flat(grad[i], grad.name_of(i));
            t.exp_avg = floats_of(read, exp_avg, i, t.size);
            t.exp_avg_sq = floats_of(read, exp_avg_sq, i, t.size);
            t.step = read.number_of(step[i], step.name_of(i));
            if (!t.step) Reader::refuse(step.name_of(i), "must be given");
            t.average = average.size() ? floats_of(read, average, i, t.size) : nullptr;
            if (g.size != t.size)
              Reader::refuse(grad.name_of(i), "must have the elements of its param");
            t.grad = g.data, t.grad_type = g.dtype;
            t.copy = nullptr, t.copy_type = DType::f32;
            if (i >= copy.size()) continue;
            const Flat rounded = read.flat(copy[i], copy.name_of(i));
            if (rounded.size != t.size)
              Reader::refuse(copy.name_of(i), "must have the elements of its param");
            t.copy = rounded.data, t.copy_type = rounded.dtype;
          }
          Adam op{tensors.data(),
                  count,
                  read.number_of(lr, "lr"),
                  read.number_of(share, "share"),
                  read.number_of(norm, "norm"),
                  read.number_of(refused, "refused"),
                  beta1,
                  beta2,
                  eps,
                  float(clip),
                  float(grad_scale),
                  nullptr};
          if (needs_workspace(run))
            op.workspace = read.floats(workspace, "workspace", adam_workspace(count));
          launch(run, op, where);
        });
}

template <auto run>
void def_grad_norm(py::module_& m) {
  m.def("grad_norm", [](py::handle grads, py::handle out, py::handle workspace, int64_t where) {
    Reader read(is_cuda(run));
    List grad(grads, "grads");
    std::vector<Flat> flats;
    int64_t chunks = 0;
    for (int64_t i = 0; i < grad.size(); ++i) {
      flats.push_back(read.flat(grad[i], grad.name_of(i)));
      chunks += (flats.back().size + GRAD_NORM_CHUNK - 1) / GRAD_NORM_CHUNK;
    }
    GradNorm op{flats.data(), grad.size(), read.number_of(out, "out"), nullptr};
    if (!op.out) throw py::value_error("out must be given");
    if (needs_workspace(run)) op.workspace = read.doubles(workspace, "workspace", chunks);
    launch(run, op, where);
  });
}

}  // namespace
}  // namespace fastddpm
