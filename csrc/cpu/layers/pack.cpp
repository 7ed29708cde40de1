// Weights as convolve() reads them: panels of filters, as they are or in Winograd's domain. In
// training every weight is packed anew in each step, so this runs at about the speed of memory.
#include "pack.h"

#include "../isa.h"
#include "../parallel.h"
#include "gemm.h"
#include "winograd.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

// Channels that are packed, and transformed, at a time: they stay in the L1 cache. Each tap's or
// point's part of a panel then goes to its place as one piece, since those places are mostly a
// power of two apart and share their cache sets.
constexpr int64_t CHANNELS = 256 / PANEL, TRANSFORMED = 128 / PANEL;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void copy(const float* from, int64_t rows, float* to) {
  __builtin_memcpy(to, from, size_t(rows * PANEL) * sizeof(float));
}

template <int m>
void pack_winograd(const Weight& weight, const Part& part, float* packed) {
  constexpr int64_t POINTS = Winograd<m>::TILE * Winograd<m>::TILE;
  constexpr int64_t PLANE = CHANNELS * PANEL, U_PLANE = TRANSFORMED * PANEL;
  alignas(64) float taps[TAPS * PLANE], u[POINTS * U_PLANE];
  gather(weight, part, taps, PANEL, PLANE);
  packed += (part.o / PANEL * POINTS * weight.c_in + part.i) * PANEL;
  for (int64_t i = 0; i < part.rows; i += TRANSFORMED) {
    const int64_t rows = least(TRANSFORMED, part.rows - i);
    for (int64_t at = 0; at < rows * PANEL; at += HALF_WIDTH)
      transform_weight<m>(taps + i * PANEL + at, PLANE, u + at, U_PLANE);
    for (int64_t p = 0; p < POINTS; ++p)
      copy(u + p * U_PLANE, rows, packed + (p * weight.c_in + i) * PANEL);
  }
}

void pack_direct(const Weight& weight, const Part& part, float* packed) {
  constexpr int64_t PLANE = CHANNELS * PANEL;
  const int64_t size = weight.c_in * PANEL, taps = weight.kernel * weight.kernel;
  packed += part.o / PANEL * taps * size + part.i * PANEL;
  if (taps == 1) return gather(weight, part, packed, PANEL, size);
  alignas(64) float planes[TAPS * PLANE];
  gather(weight, part, planes, PANEL, PLANE);
  for (int64_t t = 0; t < taps; ++t) copy(planes + t * PLANE, part.rows, packed + t * size);
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
  parallel_for(panels * parts, packed_weight_size(algorithm, weight.c_in, weight.c_out, 3), threads,
               [&](int64_t job, int) {
                 const int64_t o = job / parts * PANEL, i = job % parts * CHANNELS;
                 pack_part(weight,
                           {o, least(PANEL, weight.c_out - o), i, least(CHANNELS, weight.c_in - i)},
                           packed);
               });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
