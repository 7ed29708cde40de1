// The gradient of group_norm_silu: statistics again, two sums a channel, then dx.
#include "group_norm.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

// g = dL/dv into `out`, and the sums of g and of g (x - centre).
template <bool SILU, bool DROP>
void add_gradient(const float* __restrict x, const float* __restrict grad, int64_t count, Line line,
                  const uint32_t* __restrict mask, float keep_scale, float* __restrict out,
                  float* __restrict sum, float* __restrict product) {
  const float* __restrict centre = line.centre, * __restrict scale = line.scale;
  const float* __restrict shift = line.shift;
  for (int64_t i = 0; i < count; ++i) {
    const float u = x[i] - centre[i], d = DROP ? drop(grad[i], keep_scale, mask[i]) : grad[i];
    const float g = SILU ? d * silu_gradient(madd(u, scale[i], shift[i])) : d;
    out[i] = g;
    sum[i] += g;
    product[i] = madd(g, u, product[i]);
  }
}

// dx = scale g + slope (x - centre) + offset, and `more` if there is any; g may be in dx.
void apply_gradient(const float* x, const float* g, int64_t count, Line line, const float* slope,
                    const float* offset, const float* more, float* dx) {
  const auto value = [&](int64_t i) {
    return madd(line.scale[i], g[i], madd(slope[i], x[i] - line.centre[i], offset[i]));
  };
  if (more)
    fill(dx, count, [&](int64_t i) { return value(i) + more[i]; });
  else
    fill(dx, count, value);
}

class Backward : public Pass {
 public:
  Backward(const GroupNormSiluBackward& backward, int threads)
      : Pass(backward.forward, threads, &backward.dx, &backward.dx2),
        backward(backward),
        dgain(op.shape.n * op.shape.c),
        doffset(op.shape.n * op.shape.c) {}

  void gradient_block(int64_t n, int64_t b, int thread) {
    op.dropout.threshold ? (op.silu ? gradient_block<true, true>(n, b, thread)
                                    : gradient_block<false, true>(n, b, thread))
                         : (op.silu ? gradient_block<true, false>(n, b, thread)
                                    : gradient_block<false, false>(n, b, thread));
  }

  // A = sum of g and B = sum of g xhat per channel. With a = weight (1 + scale), P and Q the means
  // over the group of a g and of a g xhat: dx = rstd (a g - P - xhat Q).
  void gradient_finish(int64_t n) {
    const float* rest = coefficient(n, REST);
    for (int64_t g = 0; g < op.groups; ++g) {
      const double r = rstd[n * op.groups + g];
      double p = 0.0, q = 0.0;
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
        const double sum = total(n, 0, c), product = r * (total(n, 1, c) - double(rest[c]) * sum);
        const double gain = 1.0 + element(op.scale, n, c, 0.0f),
                     weight = element(op.weight, 0, c, 1.0f);
        const int64_t nc = n * op.shape.c + c;
        p += weight * gain * sum;
        q += weight * gain * product;
        dgain.data[nc] = float(gain * product);
        doffset.data[nc] = float(gain * sum);
        if (backward.dshift) backward.dshift[nc] = float(sum);
        if (backward.dscale)
          backward.dscale[nc] =
              float(weight * product + double(element(op.bias, 0, c, 0.0f)) * sum);
      }
      const double slope = -r * r * q / elements(), offset = -r * p / elements();
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
        coefficient(n, SLOPE)[c] = float(slope);
        coefficient(n, OFFSET)[c] = float(offset - slope * double(rest[c]));
      }
    }
  }

  void apply_gradient_block(int64_t n, int64_t b, int thread) {
    cut.for_sources(b, [&](const Source& s) {
      const Line line = argument(s, n, b, thread);
      const float* slope = spread(s, n, b, thread, SLOPE);
      const float* offset = spread(s, n, b, thread, OFFSET);
      const bool is_x = s.channel < c1;
      const bool more = is_x && backward.grad_u.data, summing = is_x && backward.dbefore;
      const View dx = view_of(s, dx_of(s), n);
      const View grad_u = more ? view_of(s, backward.grad_u, n) : View{};
      float* sum = clear(s, thread, SUM);
      walk(s, n, b, thread, [&](const float* x, int64_t first, int64_t count) {
        const float* g = gradient(s, dx, n, thread, first);
        const float* u = more ? floats(grad_u, first, count, buffer(thread, OTHER)) : nullptr;
        const Lines out = lines(s, dx, first, buffer(thread, OUT));
        float* line_out = out.data;
        for (int64_t at = 0; at < count; at += out.length, line_out += out.pitch) {
          const int64_t length = least(out.length, count - at);
          apply_gradient(x + at, g + at, length, line, slope, offset, u ? u + at : nullptr,
                         line_out);
          if (summing) add(line_out, 1, length, sum);
        }
        if (out.buffered) store(dx, first, count, out.data);
      });
      if (summing) fold(s, sum, part(n, b, 0));
    });
  }

  void before_finish(int64_t n) {
    if (!backward.dbefore) return;
    for (int64_t c = 0; c < c1; ++c) backward.dbefore[n * c1 + c] = float(total(n, 0, c));
  }

  // The gradients that are sums over the samples.
  void finish() {
    const int64_t channels = op.shape.c;
    for (int64_t c = 0; c < channels; ++c) {
      double weight = 0.0, bias = 0.0;
      for (int64_t n = 0; n < op.shape.n; ++n)
        weight += dgain.data[n * channels + c], bias += doffset.data[n * channels + c];
      if (backward.dweight) backward.dweight[c] = float(weight);
      if (backward.dbias) backward.dbias[c] = float(bias);
    }
  }

 private:
  const GroupNormSiluBackward& backward;
  Scratch<float> dgain, doffset;

  const Tensor& dx_of(const Source& s) const { return s.channel < c1 ? backward.dx : backward.dx2; }

  // Where g of a source's elements from `first` on is kept: in dx if that holds float32.
  float* gradient(const Source& s, const View& dx, int64_t n, int thread, int64_t first) {
    if (float* elements = direct(dx, first)) return elements;
    return kept + ((whole ? thread : n) * cut.channels + s.channel) * cut.plane + first;
  }

  template <bool SILU, bool DROP>
  void gradient_block(int64_t n, int64_t b, int thread) {
    struct {
      Line line;
      View grad, dx;
      float *sum, *product;
    } of[2];
    cut.for_sources(b, [&](const Source& s) {
      of[s.index] = {argument(s, n, b, thread),
                     view_of(s, channels_from(backward.grad, s.channel), n),
                     view_of(s, dx_of(s), n), clear(s, thread, SUM), clear(s, thread, SECOND)};
    });
    walk(n, b, thread, [&](const Source& s, const float* x, int64_t first, int64_t count) {
      const auto& own = of[s.index];
      const Lines grad = lines(s, own.grad, first, buffer(thread, OTHER));
      if (grad.buffered) load(own.grad, first, count, grad.data);
      const uint32_t* keep = mask(s, n, b, first, count, thread);
      float* out = gradient(s, own.dx, n, thread, first);
      const float* g = grad.data;
      for (int64_t at = 0; at < count; at += grad.length, g += grad.pitch)
        add_gradient<SILU, DROP>(x + at, g, least(grad.length, count - at), own.line,
                                 DROP ? keep + at : nullptr, op.dropout.keep_scale, out + at,
                                 own.sum, own.product);
    });
    cut.for_sources(b, [&](const Source& s) {
      fold(s, of[s.index].sum, part(n, b, 0));
      fold(s, of[s.index].product, part(n, b, 1));
    });
  }
};

// Sums of nothing: a mean of nothing would make them NaN.
void clear_sums(const GroupNormSiluBackward& op) {
  const auto clear = [](float* sums, int64_t count) {
    for (int64_t i = 0; sums && i < count; ++i) sums[i] = 0.0f;
  };
  const Shape& shape = op.forward.shape;
  clear(op.dscale, shape.n * shape.c);
  clear(op.dshift, shape.n * shape.c);
  clear(op.dbefore, shape.n * op.forward.c1);
  clear(op.dweight, shape.c);
  clear(op.dbias, shape.c);
}

}  // namespace

void group_norm_silu_backward(const GroupNormSiluBackward& op, int threads) {
  if (op.forward.shape.h * op.forward.shape.w == 0) return clear_sums(op);
  Backward pass(op, threads);
  run(pass.cut, threads,
      phase([&](int64_t n, int64_t b, int thread) { pass.statistics_block(n, b, thread); },
            [&](int64_t n) { pass.statistics_finish(n); }),
      phase([&](int64_t n, int64_t b, int thread) { pass.gradient_block(n, b, thread); },
            [&](int64_t n) { pass.gradient_finish(n); }),
      phase([&](int64_t n, int64_t b, int thread) { pass.apply_gradient_block(n, b, thread); },
            [&](int64_t n) { pass.before_finish(n); }));
  pass.finish();
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
