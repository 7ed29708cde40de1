// adam and grad_norm: walks over chunks of all tensors in one parallel region.
#include "../isa.h"
#include "../view.h"
#include "squares.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t ADAM_CHUNK = 1 << 13;  // elements of a job, a multiple of CHUNK

// Which job belongs to which tensor: those of tensor i are first[i] .. first[i + 1] - 1.
class Jobs {
 public:
  template <class Size>
  Jobs(int64_t count, int64_t chunk, const Size& size) : count(count), first(count + 1, false) {
    first.data[0] = 0;
    for (int64_t i = 0; i < count; ++i)
      first.data[i + 1] = first.data[i] + (size(i) + chunk - 1) / chunk;
  }

  int64_t size() const { return first.data[count]; }

  // The tensor of a job; `chunk`: which of its chunks.
  int64_t find(int64_t job, int64_t& chunk) const {
    int64_t low = 0, high = count - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (first.data[middle] <= job)
        low = middle;
      else
        high = middle - 1;
    }
    chunk = job - first.data[low];
    return low;
  }

 private:
  const int64_t count;
  const Scratch<int64_t> first;
};

// `count` elements from `first` on of a dense tensor, themselves or in `buffer`.
const float* elements(const void* data, DType dtype, int64_t first, int64_t count, float* buffer) {
  switch (dtype) {
    case DType::bf16:
      load_run(static_cast<const BF16*>(data) + first, 1, count, buffer);
      return buffer;
    case DType::f16:
      load_run(static_cast<const F16*>(data) + first, 1, count, buffer);
      return buffer;
    default:
      return static_cast<const float*>(data) + first;
  }
}

void copy_rounded(const float* from, int64_t count, void* to, DType dtype, int64_t first) {
  if (dtype == DType::bf16)
    narrow(from, count, static_cast<BF16*>(to) + first);
  else if (dtype == DType::f16)
    narrow(from, count, static_cast<F16*>(to) + first);
  else
    store_run(static_cast<float*>(to) + first, 1, count, from);
}

void update(const AdamRates& rates, int64_t count, const float* __restrict g, float* __restrict p,
            float* __restrict m, float* __restrict v) {
  for (int64_t i = 0; i < count; ++i) adam(rates, g[i], p[i], m[i], v[i]);
}

void update(const AdamRates& rates, float share, int64_t count, const float* __restrict g,
            float* __restrict p, float* __restrict m, float* __restrict v, float* __restrict mean) {
  for (int64_t i = 0; i < count; ++i) {
    adam(rates, g[i], p[i], m[i], v[i]);
    mean[i] = moved_average(mean[i], p[i], share);
  }
}

void update_chunk(const AdamTensors& t, const AdamRates& rates, float share, int64_t first,
                  int64_t count) {
  float buffer[CHUNK];
  for (int64_t end = first + count; first < end; first += CHUNK) {
    const int64_t n = end - first < CHUNK ? end - first : CHUNK;
    const float* g = elements(t.grad, t.grad_type, first, n, buffer);
    float *p = t.param + first, *m = t.exp_avg + first, *v = t.exp_avg_sq + first;
    if (t.average)
      update(rates, share, n, g, p, m, v, t.average + first);
    else
      update(rates, n, g, p, m, v);
    if (t.copy) copy_rounded(p, n, t.copy, t.copy_type, first);
  }
}

}  // namespace

void adam(const Adam& op, int threads) {
  if (!step_counts(op.refused, op.norm)) return;
  const float scale = gradient_scale(op.norm, op.clip, op.grad_scale);
  const Scratch<AdamRates> rates(op.count, false);
  int64_t total = 0;
  for (int64_t i = 0; i < op.count; ++i) {
    float& step = *op.tensors[i].step;
    step += 1.0f;
    rates.data[i] = adam_rates(op.beta1, op.beta2, op.eps, scale, *op.lr, step);
    total += op.tensors[i].size;
  }
  const Jobs jobs(op.count, ADAM_CHUNK, [&](int64_t i) { return op.tensors[i].size; });
  parallel_for(jobs.size(), total, threads, [&](int64_t job, int) {
    int64_t chunk;
    const int64_t i = jobs.find(job, chunk), first = chunk * ADAM_CHUNK;
    const int64_t left = op.tensors[i].size - first;
    update_chunk(op.tensors[i], rates.data[i], *op.share, first,
                 left < ADAM_CHUNK ? left : ADAM_CHUNK);
  });
}

void grad_norm(const GradNorm& op, int threads) {
  int64_t total = 0;
  for (int64_t i = 0; i < op.count; ++i) total += op.grads[i].size;
  const Jobs jobs(op.count, GRAD_NORM_CHUNK, [&](int64_t i) { return op.grads[i].size; });
  const Scratch<double> sums(jobs.size(), false);
  parallel_for(jobs.size(), total, threads, [&](int64_t job, int) {
    int64_t chunk;
    const Flat& grad = op.grads[jobs.find(job, chunk)];
    double sum = 0.0;
    float buffer[CHUNK];
    const int64_t begin = chunk * GRAD_NORM_CHUNK, left = grad.size - begin;
    const int64_t end = begin + (left < GRAD_NORM_CHUNK ? left : GRAD_NORM_CHUNK);
    for (int64_t first = begin; first < end; first += CHUNK) {
      const int64_t n = end - first < CHUNK ? end - first : CHUNK;
      const float* g = elements(grad.data, grad.dtype, first, n, buffer);
      sum += sum_of_squares(n, [&](int64_t i) { return g[i]; });
    }
    sums.data[job] = sum;
  });
  double sum = 0.0;
  for (int64_t job = 0; job < jobs.size(); ++job) sum += sums.data[job];
  *op.out = float(sqrt(sum));
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
