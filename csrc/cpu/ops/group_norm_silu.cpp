// group_norm_silu: the statistics of each sample, then its elements.
#include "group_norm.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

template <bool SILU, bool DROP>
void apply(const float* __restrict x, int64_t count, Line line, const uint32_t* __restrict mask,
           float keep_scale, float* __restrict y) {
  const float* __restrict centre = line.centre, * __restrict scale = line.scale;
  const float* __restrict shift = line.shift;
  for (int64_t i = 0; i < count; ++i) {
    const float v = madd(x[i] - centre[i], scale[i], shift[i]), out = SILU ? silu(v) : v;
    y[i] = DROP ? drop(out, keep_scale, mask[i]) : out;
  }
}

class Forward : public Pass {
 public:
  using Pass::Pass;

  void apply_block(int64_t n, int64_t b, int thread) {
    op.dropout.threshold
        ? (op.silu ? apply_block<true, true>(n, b, thread) : apply_block<false, true>(n, b, thread))
        : (op.silu ? apply_block<true, false>(n, b, thread)
                   : apply_block<false, false>(n, b, thread));
  }

 private:
  // The run of elements of sample n + 1, if this thread takes it next and it is one, else null.
  struct Next {
    const char* run;
    DType dtype;

    // Starts to bring elements into the cache while the processor computes.
    void fetch(int64_t first, int64_t count) const {
      if (!run) return;
      const int64_t size = element_size(dtype);
      for (int64_t at = first * size; at < (first + count) * size; at += 64)
        __builtin_prefetch(run + at, 0, 2);
    }
  };

  Next following(const Source& s, const Tensor& x, int64_t n) const {
    if (!whole || n + 1 == cut.samples || !x.data) return {nullptr, x.dtype};
    const View v = view_of(s, x, n + 1);
    return {v.size[1] == 1 && v.stride[2] == 1 ? v.data : nullptr, x.dtype};
  }

  template <bool SILU, bool DROP>
  void apply_block(int64_t n, int64_t b, int thread) {
    struct {
      Line line;
      View y;
      Next x, residual;
    } of[2];
    cut.for_sources(b, [&](const Source& s) {
      const bool sum = summed && s.index == 0;
      of[s.index] = {argument(s, n, b, thread), view_of(s, channels_from(op.y, s.channel), n),
                     following(s, sum ? op.x : s.x, n),
                     following(s, sum ? op.residual : Tensor{}, n)};
    });
    walk(n, b, thread, [&](const Source& s, const float* x, int64_t first, int64_t count) {
      const auto& own = of[s.index];
      own.x.fetch(first, count);
      own.residual.fetch(first, count);
      const uint32_t* keep = mask(s, n, b, first, count, thread);
      const Lines y = lines(s, own.y, first, buffer(thread, OUT));
      float* out = y.data;
      for (int64_t at = 0; at < count; at += y.length, out += y.pitch)
        apply<SILU, DROP>(x + at, least(y.length, count - at), own.line, DROP ? keep + at : nullptr,
                          op.dropout.keep_scale, out);
      if (y.buffered) store(own.y, first, count, y.data);
    });
  }
};

}  // namespace

void group_norm_silu(const GroupNormSilu& op, int threads) {
  Forward pass(op, threads);
  run(pass.cut, threads,
      phase([&](int64_t n, int64_t b, int thread) { pass.statistics_block(n, b, thread); },
            [&](int64_t n) { pass.statistics_finish(n); }),
      phase([&](int64_t n, int64_t b, int thread) { pass.apply_block(n, b, thread); },
            [](int64_t) {}));
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
