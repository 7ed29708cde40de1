// adam for Python in the case that is the most frequent: each tensor is read once, and nothing but
// that is asked about it.
#pragma once
#include <cmath>

#include "adam.h"

namespace fastddpm {
namespace {

// The memory that a call reads and writes.
class Spans {
 public:
  void add(const float* begin, int64_t count, bool written) {
    if (count) spans.push_back({uintptr_t(begin), uintptr_t(begin + count), written});
  }

  // Whether nothing that is written lies in what another tensor holds.
  bool apart() {
    std::sort(spans.begin(), spans.end(),
              [](const Span& a, const Span& b) { return a.begin < b.begin; });
    uintptr_t end = 0, end_written = 0;  // of what begins before
    for (const Span& span : spans) {
      if (span.begin < (span.written ? end : end_written)) return false;
      end = std::max(end, span.end);
      if (span.written) end_written = std::max(end_written, span.end);
    }
    return true;
  }

 private:
  struct Span {
    uintptr_t begin, end;
    bool written;
  };
  std::vector<Span> spans;
};

inline bool are_plain(py::handle tensors) {
  List list(tensors, "tensors");
  for (int64_t i = 0; i < list.size(); ++i)
    if (!Reader::is_plain(list[i])) return false;
  return true;
}

// The step of adam in one call: float32 tensors of torch's own types, no inference tensors, those
// of a parameter dense and laid out alike, all that is written apart from all else. False for
// anything else; then nothing is done.
inline bool adam_if_plain(py::handle params, py::handle grads, py::handle exp_avgs,
                          py::handle exp_avg_sqs, py::handle steps, py::handle averages, double lr,
                          double share, py::handle norm, py::handle refused, double beta1,
                          double beta2, double eps, double clip, double grad_scale,
                          int64_t threads) {
  const auto is_beta = [](double beta) { return beta >= 0.0 && beta < 1.0; };
  if (!std::isfinite(lr) || !std::isfinite(share) || !is_beta(beta1) || !is_beta(beta2) ||
      !(eps >= 0.0) || !(clip > 0.0) || !(grad_scale > 0.0 && std::isfinite(grad_scale)))
    return false;
  const float rate = float(lr), weight = float(share);
  std::vector<AdamTensors> tensors;
  Adam op{};
  try {
    Reader read(false);
    Spans spans;
    List param(params, "params"), grad(grads, "grads"), exp_avg(exp_avgs, "exp_avgs");
    List exp_avg_sq(exp_avg_sqs, "exp_avg_sqs"), step(steps, "steps"),
        average(averages, "averages");
    const int64_t count = param.size();
    for (const List* list : {&grad, &exp_avg, &exp_avg_sq, &step, &average})
      list->require_size(count);
    for (int64_t i = 0; i < count; ++i) {
      for (py::handle x : {param[i], grad[i], exp_avg[i], exp_avg_sq[i], step[i], average[i]})
        if (!Reader::is_plain(x)) return false;
      const Reader::Layout layout = read.layout_of(param[i], "params");
      const Flat p = read.flat(param[i], "params");
      if (p.dtype != DType::f32) return false;
      const auto add = [&](py::handle x, const char* name, void* data, bool written) {
        if (written && Reader::is_inference(x, name)) Reader::refuse(name, "is inference's");
        spans.add(static_cast<float*>(data), p.size, written);
        return static_cast<float*>(data);
      };
      const auto take = [&](py::handle x, const char* name, bool written) {
        return add(x, name, read.laid_out(x, name, layout, p.size), written);
      };
      AdamTensors t{};
      t.size = p.size, t.param = add(param[i], "params", p.data, true);
      t.grad = take(grad[i], "grads", false), t.grad_type = DType::f32;
      t.exp_avg = take(exp_avg[i], "exp_avgs", true);
      t.exp_avg_sq = take(exp_avg_sq[i], "exp_avg_sqs", true);
      t.average = take(average[i], "averages", true);
      t.step = read.number_of(step[i], "steps"), t.copy_type = DType::f32;
      if (!t.step || Reader::is_inference(step[i], "steps")) return false;
      spans.add(t.step, 1, true);
      tensors.push_back(t);
    }
    if (!Reader::is_plain(norm) || !Reader::is_plain(refused)) return false;
    op = {tensors.data(),
          count,
          &rate,
          &weight,
          read.number_of(norm, "norm"),
          read.number_of(refused, "refused"),
          beta1,
          beta2,
          eps,
          float(clip),
          float(grad_scale),
          nullptr};
    spans.add(op.norm, 1, false), spans.add(op.refused, 1, false);
    if (!spans.apart()) return false;
  } catch (const py::value_error&) {
    return false;
  } catch (const py::type_error&) {
    return false;
  }
  launch(cpu::adam, op, threads);
  return true;
}

inline void def_adam_if_plain(py::module_& m) {
  m.def("are_plain", &are_plain);
  m.def("adam_if_plain", &adam_if_plain);
}

}  // namespace
}  // namespace fastddpm
