// The gradient of group_norm_silu: statistics again, two sums a channel, then dx.
#include "group_norm.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

// g = dL/dv into `out`, and the sums of g and of g (x - centre).
template <bool SILU>
void add_gradient(const float* __restrict x, const float* __restrict grad, int64_t count, Line line,
                  float* __restrict out, float* __restrict sum, float* __restrict product) {
  const float* __restrict centre = line.centre, * __restrict scale = line.scale;
  const float* __restrict shift = line.shift;
  for (int64_t i = 0; i < count; ++i) {
    const float u = x[i] - centre[i];
    const float g = SILU ? grad[i] * silu_gradient(madd(u, scale[i], shift[i])) : grad[i];
    out[i] = g;
    sum[i] += g;
    product[i] = madd(g, u, product[i]);
  }
}

// dx = scale g + slope (x - centre) + offset; g may be in dx.
void apply_gradient(const float* x, const float* g, int64_t count, Line line, const float* slope,
                    const float* offset, float* dx) {
  fill(dx, count, [&](int64_t i) {
    return madd(line.scale[i], g[i], madd(slope[i], x[i] - line.centre[i], offset[i]));
  });
}

class Backward : public Pass {
 public:
  using Pass::Pass;

  void gradient_block(const GroupNormSiluBackward& backward, int64_t n, int64_t b, int thread) {
    float *sum = clear(thread, SUM), *product = clear(thread, SECOND);
    const Line line = argument(n, b, thread);
    const View grads = view(backward.grad, op.shape, n, cut.order);
    const View dx = view(backward.dx, op.shape, n, cut.order);
    walk(n, b, thread, [&](const float* x, int64_t first, int64_t count) {
      const float* grad = floats(grads, first, count, buffer(thread, 1));
      float* out = gradient(dx, n, thread, first);
      for (int64_t at = 0; at < count; at += cut.line) {
        const int64_t length = least(cut.line, count - at);
        op.silu ? add_gradient<true>(x + at, grad + at, length, line, out + at, sum, product)
                : add_gradient<false>(x + at, grad + at, length, line, out + at, sum, product);
      }
    });
    fold(sum, part(n, b, 0));
    fold(product, part(n, b, 1));
  }

  // A = sum of g and B = sum of g xhat per channel. With a = weight (1 + scale), P and Q the means
  // over the group of a g and of a g xhat: dx = rstd (a g - P - xhat Q).
  void gradient_finish(const GroupNormSiluBackward& backward, float* dgain, float* doffset,
                       int64_t n) {
    for (int64_t g = 0; g < op.groups; ++g) {
      const int64_t at = n * op.groups + g;
      const double r = rstd[at], left = rest[at];
      double p = 0.0, q = 0.0;
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
        const double sum = total(n, 0, c), product = r * (total(n, 1, c) - left * sum);
        const double gain = 1.0 + element(op.scale, n, c, 0.0f),
                     weight = element(op.weight, 0, c, 1.0f);
        const int64_t nc = n * op.shape.c + c;
        p += weight * gain * sum;
        q += weight * gain * product;
        dgain[nc] = float(gain * product);
        doffset[nc] = float(gain * sum);
        if (backward.dshift) backward.dshift[nc] = float(sum);
        if (backward.dscale)
          backward.dscale[nc] =
              float(weight * product + double(element(op.bias, 0, c, 0.0f)) * sum);
      }
      const double slope = -r * r * q / elements(), offset = -r * p / elements() - slope * left;
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
        coefficient(n, SLOPE)[c] = float(slope);
        coefficient(n, OFFSET)[c] = float(offset);
      }
    }
  }

  void apply_gradient_block(const GroupNormSiluBackward& backward, int64_t n, int64_t b,
                            int thread) {
    const Line line = argument(n, b, thread);
    const float *slope = spread(n, b, thread, SLOPE), *offset = spread(n, b, thread, OFFSET);
    const View dx = view(backward.dx, op.shape, n, cut.order);
    walk(n, b, thread, [&](const float* x, int64_t first, int64_t count) {
      const float* g = gradient(dx, n, thread, first);
      write(dx, first, count, thread, [&](float* out) {
        for (int64_t at = 0; at < count; at += cut.line)
          apply_gradient(x + at, g + at, least(cut.line, count - at), line, slope, offset,
                         out + at);
      });
    });
  }
};

}  // namespace

void group_norm_silu_backward(const GroupNormSiluBackward& op, int threads) {
  const int64_t n_samples = op.forward.shape.n, channels = op.forward.shape.c;
  if (op.forward.shape.h * op.forward.shape.w == 0) {  // sums of nothing; a mean of nothing is NaN
    for (int64_t nc = 0; nc < n_samples * channels; ++nc) {
      if (op.dscale) op.dscale[nc] = 0.0f;
      if (op.dshift) op.dshift[nc] = 0.0f;
    }
    for (int64_t c = 0; c < channels; ++c) {
      if (op.dweight) op.dweight[c] = 0.0f;
      if (op.dbias) op.dbias[c] = 0.0f;
    }
    return;
  }
  Backward pass(op.forward, threads, &op.dx);
  Scratch<float> dgain(n_samples * channels), doffset(n_samples * channels);
  run(pass.cut, threads,
      phase([&](int64_t n, int64_t b, int thread) { pass.statistics_block(n, b, thread); },
            [&](int64_t n) { pass.statistics_finish(n); }),
      phase([&](int64_t n, int64_t b, int thread) { pass.gradient_block(op, n, b, thread); },
            [&](int64_t n) { pass.gradient_finish(op, dgain.data, doffset.data, n); }),
      phase([&](int64_t n, int64_t b, int thread) { pass.apply_gradient_block(op, n, b, thread); },
            [](int64_t) {}));
  for (int64_t c = 0; c < channels; ++c) {
    double weight = 0.0, bias = 0.0;
    for (int64_t n = 0; n < n_samples; ++n)
      weight += dgain.data[n * channels + c], bias += doffset.data[n * channels + c];
    if (op.dweight) op.dweight[c] = float(weight);
    if (op.dbias) op.dbias[c] = float(bias);
  }
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
