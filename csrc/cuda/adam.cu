// adam and grad_norm over many tensors a launch: their pointers are an argument of the kernel, so
// that a recorded launch needs nothing of the host. A first kernel counts the steps and works out
// what a tensor's elements share; the sweep then reads and writes every element once.
#include <cmath>

#include "block_sum.h"

namespace fastddpm {
namespace {

constexpr int ADAM_LIST = 40, STEP_LIST = 256, NORM_LIST = 128;  // tensors of a launch: below 4 KB
constexpr int V = 4;                                             // elements of a thread at once
constexpr int64_t ADAM_CHUNK = THREADS * V * 4;                  // of a block

// The values of a step that do not belong to a tensor, without the list of all.
struct AdamStep {
  const float *lr, *share, *norm, *refused;
  double beta1, beta2, eps;
  float clip, grad_scale;
  float* workspace;  // scale, whether the step counts; then step_size and root of each tensor
};

struct StepList {
  float* step[STEP_LIST];
  int64_t offset;  // of its tensors among all
  int count;
};

struct AdamList {
  AdamTensors tensors[ADAM_LIST];
  int64_t offset;
  int first[ADAM_LIST + 1];  // block of a tensor
  int count;
  bool vectors[ADAM_LIST];  // whether all of a tensor's are aligned
};

struct NormList {
  const void* data[NORM_LIST];
  int64_t size[NORM_LIST];
  int64_t offset;            // of its blocks among all
  int first[NORM_LIST + 1];  // block of a tensor
  int count;
  DType dtype[NORM_LIST];
};

// The tensor of a block.
__device__ int tensor_of(const int* first, int count, int block) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first[middle] <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

__global__ void __launch_bounds__(THREADS) adam_begin(const AdamStep op, const StepList list) {
  const int i = int(threadIdx.x);
  const bool counts = step_counts(op.refused, op.norm);
  const float scale = gradient_scale(op.norm, op.clip, op.grad_scale);
  if (i == 0 && list.offset == 0) op.workspace[0] = scale, op.workspace[1] = counts ? 1.0f : 0.0f;
  if (i >= list.count || !counts) return;
  const float step = *list.step[i] + 1.0f;
  *list.step[i] = step;
  const AdamRates rates = adam_rates(op.beta1, op.beta2, op.eps, scale, *op.lr, step);
  float* own = op.workspace + 2 * (list.offset + i + 1);
  own[0] = rates.step_size, own[1] = rates.root;
}

template <class T>
__device__ void load_quad(const void* data, int64_t at, float (&values)[V]) {
  load_vector(static_cast<const T*>(data) + at, values);
}

__device__ void load_quad(const void* data, DType dtype, int64_t at, float (&values)[V]) {
  if (dtype == DType::bf16)
    load_quad<BF16>(data, at, values);
  else if (dtype == DType::f16)
    load_quad<F16>(data, at, values);
  else
    load_quad<float>(data, at, values);
}

__device__ void store_quad(void* data, DType dtype, int64_t at, const float (&values)[V]) {
  if (dtype == DType::bf16)
    store_vector(static_cast<BF16*>(data) + at, values);
  else if (dtype == DType::f16)
    store_vector(static_cast<F16*>(data) + at, values);
  else
    store_vector(static_cast<float*>(data) + at, values);
}

__global__ void __launch_bounds__(THREADS) adam_sweep(const AdamStep op, const AdamList list) {
  if (op.workspace[1] == 0.0f) return;
  const int which = tensor_of(list.first, list.count, int(blockIdx.x));
  const AdamTensors& t = list.tensors[which];
  const float* own = op.workspace + 2 * (list.offset + which + 1);
  const AdamRates rates{op.workspace[0], float(1.0 - op.beta1),
                        float(op.beta2), float(1.0 - op.beta2),
                        float(op.eps),   own[0],
                        own[1]};
  const float share = *op.share;
  const int64_t begin = int64_t(int(blockIdx.x) - list.first[which]) * ADAM_CHUNK;
  const int64_t end = begin + ADAM_CHUNK < t.size ? begin + ADAM_CHUNK : t.size;
  const int64_t whole = list.vectors[which] ? begin + (end - begin) / V * V : begin;
  for (int64_t i = begin + int64_t(threadIdx.x) * V; i < whole; i += THREADS * V) {
    float g[V], p[V], m[V], v[V], mean[V];
    load_quad(t.grad, t.grad_type, i, g);
    load_quad<float>(t.param, i, p);
    load_quad<float>(t.exp_avg, i, m);
    load_quad<float>(t.exp_avg_sq, i, v);
    if (t.average) load_quad<float>(t.average, i, mean);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      adam(rates, g[k], p[k], m[k], v[k]);
      if (t.average) mean[k] = moved_average(mean[k], p[k], share);
    }
    store_vector(t.param + i, p);
    store_vector(t.exp_avg + i, m);
    store_vector(t.exp_avg_sq + i, v);
    if (t.average) store_vector(t.average + i, mean);
    if (t.copy) store_quad(t.copy, t.copy_type, i, p);
  }
  for (int64_t i = whole + threadIdx.x; i < end; i += THREADS) {
    float p = t.param[i], m = t.exp_avg[i], v = t.exp_avg_sq[i];
    adam(rates, load(t.grad, t.grad_type, i), p, m, v);
    t.param[i] = p, t.exp_avg[i] = m, t.exp_avg_sq[i] = v;
    if (t.average) t.average[i] = moved_average(t.average[i], p, share);
    if (t.copy) store(t.copy, t.copy_type, i, p);
  }
}

__global__ void __launch_bounds__(THREADS) grad_norm_squares(const NormList list, double* sums) {
  const int which = tensor_of(list.first, list.count, int(blockIdx.x));
  const void* const data = list.data[which];
  const DType dtype = list.dtype[which];
  const int64_t begin = int64_t(int(blockIdx.x) - list.first[which]) * GRAD_NORM_CHUNK;
  const int64_t size = list.size[which];
  const int64_t end = begin + GRAD_NORM_CHUNK < size ? begin + GRAD_NORM_CHUNK : size;
  const bool vectors = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  const int64_t whole = vectors ? begin + (end - begin) / V * V : begin;
  double sum = 0.0;
  for (int64_t i = begin + int64_t(threadIdx.x) * V; i < whole; i += THREADS * V) {
    float g[V];
    load_quad(data, dtype, i, g);
#pragma unroll
    for (int k = 0; k < V; ++k) sum += double(g[k]) * double(g[k]);
  }
  for (int64_t i = whole + threadIdx.x; i < end; i += THREADS) {
    const double g = double(load(data, dtype, i));
    sum += g * g;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[list.offset + blockIdx.x] = sum;
}

__global__ void __launch_bounds__(THREADS)
    grad_norm_root(const double* sums, int64_t count, float* out) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += THREADS) sum += sums[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = float(sqrt(sum));
}

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Blocks of `chunk` elements from `begin` on; a launch has at most 2^30 of them, and tensors are
// no larger.
int blocks_of(int64_t size, int64_t chunk) {
  const int64_t blocks = (size + chunk - 1) / chunk;
  if (blocks > (1 << 24)) throw std::runtime_error("a tensor is too large for one launch");
  return int(blocks);
}

}  // namespace

namespace cuda {

void adam(const Adam& op, void* stream) {
  const AdamStep step{op.lr,    op.share, op.norm, op.refused,    op.beta1,
                      op.beta2, op.eps,   op.clip, op.grad_scale, op.workspace};
  for (int64_t from = 0; from < op.count; from += STEP_LIST) {
    StepList list{};
    list.offset = from;
    for (; list.count < STEP_LIST && from + list.count < op.count; ++list.count)
      list.step[list.count] = op.tensors[from + list.count].step;
    FASTDDPM_LAUNCH(adam_begin, dim3(1), THREADS, 0, stream, step, list);
  }
  for (int64_t from = 0; from < op.count; from += ADAM_LIST) {
    AdamList list{};
    list.offset = from;
    for (; list.count < ADAM_LIST && from + list.count < op.count; ++list.count) {
      const AdamTensors& t = op.tensors[from + list.count];
      const int i = list.count;
      list.tensors[i] = t;
      list.first[i + 1] = list.first[i] + blocks_of(t.size, ADAM_CHUNK);
      list.vectors[i] = aligned(t.param) && aligned(t.exp_avg) && aligned(t.exp_avg_sq) &&
                        aligned(t.grad) && aligned(t.average) && aligned(t.copy);
    }
    if (const int blocks = list.first[list.count])
      FASTDDPM_LAUNCH(adam_sweep, dim3(unsigned(blocks)), THREADS, 0, stream, step, list);
  }
}

void grad_norm(const GradNorm& op, void* stream) {
  int64_t sums = 0;
  for (int64_t from = 0; from < op.count; from += NORM_LIST) {
    NormList list{};
    list.offset = sums;
    for (; list.count < NORM_LIST && from + list.count < op.count; ++list.count) {
      const Flat& grad = op.grads[from + list.count];
      const int i = list.count;
      list.data[i] = grad.data, list.size[i] = grad.size, list.dtype[i] = grad.dtype;
      list.first[i + 1] = list.first[i] + blocks_of(grad.size, GRAD_NORM_CHUNK);
    }
    const int blocks = list.first[list.count];
    if (blocks)
      FASTDDPM_LAUNCH(grad_norm_squares, dim3(unsigned(blocks)), THREADS, 0, stream, list,
                      op.workspace);
    sums += blocks;
  }
  FASTDDPM_LAUNCH(grad_norm_root, dim3(1), THREADS, 0, stream, op.workspace, sums, op.out);
}

}  // namespace cuda
}  // namespace fastddpm
