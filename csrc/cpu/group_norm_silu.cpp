// group_norm_silu: the statistics of each sample, then its elements.
#include "group_norm.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

template <bool SILU>
void apply(const float* __restrict x, int64_t count, Line line, float* __restrict y) {
  const float* __restrict centre = line.centre, * __restrict scale = line.scale;
  const float* __restrict shift = line.shift;
  for (int64_t i = 0; i < count; ++i) {
    const float v = madd(x[i] - centre[i], scale[i], shift[i]);
    y[i] = SILU ? silu(v) : v;
  }
}

class Forward : public Pass {
 public:
  using Pass::Pass;

  void apply_block(int64_t n, int64_t b, int thread) {
    const Line line = argument(n, b, thread);
    const View y = view(op.y, op.shape, n, cut.order);
    const char* next = following(op.x, n);
    walk(n, b, thread, [&](const float* x, int64_t first, int64_t count) {
      fetch(next, op.x.dtype, first, count);
      write(y, first, count, thread, [&](float* out) {
        for (int64_t at = 0; at < count; at += cut.line) {
          const int64_t length = least(cut.line, count - at);
          op.silu ? apply<true>(x + at, length, line, out + at)
                  : apply<false>(x + at, length, line, out + at);
        }
      });
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
