// Weights as convolve() reads them: panels of filters, as they are or in Winograd's domain. In
// training every weight is packed anew in each step, so this runs at about the speed of memory.
#include "pack.h"

#include "../isa.h"
#include "../parallel.h"
#include "gemm.h"
#include "place.h"
#include "winograd.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

// Channels that are packed, and transformed, at a time: they stay in the L1 cache. Each tap's or
// point's part of a panel then goes to its place as one piece, since those places are mostly a
// power of two apart and share their cache sets.
constexpr int64_t CHANNELS = 256 / PANEL, TRANSFORMED = 128 / PANEL;

void copy(const float* from, int64_t count, float* to) {
  __builtin_memcpy(to, from, size_t(count) * sizeof(float));
}

// width: of the panel that the part belongs to.
template <int m>
void pack_winograd(const Weight& weight, const Part& part, int64_t width, float* packed) {
  constexpr int64_t POINTS = Winograd<m>::TILE * Winograd<m>::TILE;
  constexpr int64_t PLANE = CHANNELS * PANEL, U_PLANE = TRANSFORMED * PANEL;
  alignas(64) float taps[TAPS * PLANE], u[POINTS * U_PLANE];
  gather(weight, part, taps, width, PLANE);
  packed += part.o * POINTS * weight.c_in + part.i * width;
  for (int64_t i = 0; i < part.rows; i += TRANSFORMED) {
    const int64_t count = least(TRANSFORMED, part.rows - i) * width;
    for (int64_t at = 0; at < count; at += HALF_WIDTH)
      transform_weight<m>(taps + i * width + at, PLANE, u + at, U_PLANE);
    for (int64_t p = 0; p < POINTS; ++p)
      copy(u + p * U_PLANE, count, packed + (p * weight.c_in + i) * width);
  }
}

void pack_direct(const Weight& weight, const Part& part, int64_t width, float* packed) {
  constexpr int64_t PLANE = CHANNELS * PANEL;
  const int64_t size = weight.c_in * width, taps = weight.kernel * weight.kernel;
  packed += part.o * taps * weight.c_in + part.i * width;
  if (taps == 1) return gather(weight, part, packed, width, size);
  alignas(64) float planes[TAPS * PLANE];
  gather(weight, part, planes, width, PLANE);
  for (int64_t t = 0; t < taps; ++t) copy(planes + t * PLANE, part.rows * width, packed + t * size);
}

}  // namespace

int64_t packed_weight_size(Algorithm algorithm, int64_t c_in, int64_t c_out, int64_t kernel) {
  const int64_t m = int64_t(algorithm);
  return packed_size(c_in * (m ? (m + 2) * (m + 2) : kernel * kernel), c_out);
}

void pack_weight(Algorithm algorithm, const Weight& weight, float* packed, int threads) {
  const int64_t panels = round_up(weight.c_out, PANEL) / PANEL;
  const int64_t parts = round_up(weight.c_in, CHANNELS) / CHANNELS;
  const auto pack_part = algorithm == Algorithm::winograd_2   ? pack_winograd<2>
                         : algorithm == Algorithm::winograd_4 ? pack_winograd<4>
                                                              : pack_direct;
  const int64_t work = packed_weight_size(algorithm, weight.c_in, weight.c_out, weight.kernel);
  parallel_for(panels * parts, work, threads, [&](int64_t job, int) {
    const int64_t o = job / parts * PANEL, i = job % parts * CHANNELS;
    const int64_t columns = least(PANEL, weight.c_out - o);
    const Part part{o, columns, i, least(CHANNELS, weight.c_in - i)};
    pack_part(weight, part, panel_width(columns), packed);
  });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
