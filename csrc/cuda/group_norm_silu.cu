#include "access.h"

namespace fastddpm {
namespace {

constexpr unsigned ALL_LANES = 0xffffffffu;

// The sum over the block's THREADS threads, in a fixed order, for every thread.
__device__ float block_sum(float x, float* partial) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
  __syncthreads();  // the previous call's partial sums have been read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < THREADS / 32; ++warp) sum += partial[warp];
  return sum;
}

// One block per (sample, group). The group is read three times: for the mean, for the variance
// around it, and to be normalised; after the first time mostly from the L2 cache.
__global__ void __launch_bounds__(THREADS)
    group_norm_silu_kernel(const GroupNormSilu op, bool channels_last) {
  __shared__ float partial[THREADS / 32];
  const int64_t per_group = op.shape.c / op.groups, plane = op.shape.h * op.shape.w;
  const int64_t elements = per_group * plane;

  for (int64_t job = blockIdx.x; job < op.shape.n * op.groups; job += gridDim.x) {
    int64_t g;
    const int64_t n = divide(job, op.groups, g), first_channel = g * per_group;

    // Neighbouring threads take neighbours in memory: channels of a pixel, or pixels of a channel.
    const auto locate = [&](int64_t i, int64_t& c, int64_t& h, int64_t& w) {
      int64_t pixel;
      if (channels_last) {
        pixel = divide(i, per_group, c);
      } else {
        c = divide(i, plane, pixel);
      }
      c += first_channel;
      h = divide(pixel, op.shape.w, w);
    };
    const auto at = [&](const Tensor& x, int64_t c, int64_t h, int64_t w) {
      return n * x.stride[0] + c * x.stride[1] + h * x.stride[2] + w * x.stride[3];
    };

    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < elements; i += THREADS) {
      int64_t c, h, w;
      locate(i, c, h, w);
      sum += load(op.x.data, op.x.dtype, at(op.x, c, h, w));
    }
    const float centre = block_sum(sum, partial) / float(elements);

    float first = 0.0f, second = 0.0f;
    for (int64_t i = threadIdx.x; i < elements; i += THREADS) {
      int64_t c, h, w;
      locate(i, c, h, w);
      const float d = load(op.x.data, op.x.dtype, at(op.x, c, h, w)) - centre;
      first += d;
      second = madd(d, d, second);
    }
    // What rounding left of the mean, and the variance around the full mean.
    const float rest = block_sum(first, partial) / float(elements);
    const float raw = madd(-rest, rest, block_sum(second, partial) / float(elements));
    const float rstd = 1.0f / sqrtf((raw < 0.0f ? 0.0f : raw) + op.eps);

    for (int64_t i = threadIdx.x; i < elements; i += THREADS) {
      int64_t c, h, w;
      locate(i, c, h, w);
      const float gain = 1.0f + element(op.scale, n, c, 0.0f);
      const float scale = rstd * element(op.weight, 0, c, 1.0f) * gain;
      const float shift = madd(gain, element(op.bias, 0, c, 0.0f), element(op.shift, n, c, 0.0f));
      const float d = load(op.x.data, op.x.dtype, at(op.x, c, h, w)) - centre - rest;
      const float v = madd(d, scale, shift);
      store(op.y.data, op.y.dtype, at(op.y, c, h, w), op.silu ? silu(v) : v);
    }
    if (threadIdx.x == 0) {
      if (op.mean) op.mean[job] = centre + rest;
      if (op.rstd) op.rstd[job] = rstd;
    }
  }
}

}  // namespace

namespace cuda {

void group_norm_silu(const GroupNormSilu& op, void* stream) {
  if (op.groups < 1 || op.shape.c < 1 || op.shape.c % op.groups)
    throw std::invalid_argument("num_groups must divide the channels; got " +
                                std::to_string(op.groups) + " and " + std::to_string(op.shape.c));
  const int64_t jobs = op.shape.n * op.groups;
  if (jobs == 0 || op.shape.h * op.shape.w == 0) return;
  const bool channels_last = op.x.stride[1] == 1 && op.shape.c > 1;
  FASTDDPM_LAUNCH(group_norm_silu_kernel, dim3(unsigned(jobs < 0x7fffffff ? jobs : 0x7fffffff)),
                  THREADS, 0, stream, op, channels_last);
}

}  // namespace cuda
}  // namespace fastddpm
