// The gradient of a convolution's weight of bfloat16 operands, as the sum over pixels that it is.
//
// A matrix product sums over neighbours in memory, here over pixels: a run of them at a time is
// packed, grad with a channel's pixels side by side, x by panels with pairs of pixels interleaved.
// A job owns some rows of the result and walks over all pixels alone; those of a call begin a run.
#include "../isa.h"
#include "../parallel.h"
#include "bf16_rows.h"
#include "place.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t DEPTH = 512;  // pixels of a run: whole steps

// Matrices of (c_out, c_in), one for each tap: [tap][panel][block of rows][BLOCK][BLOCK].
struct Sums {
  int64_t taps, panels, blocks;

  explicit Sums(const WeightGradientBf16& op)
      : taps(op.kernel * op.kernel), panels(blocks_of(op.c_in)), blocks(blocks_of(op.c_out)) {}

  int64_t size() const { return taps * panels * blocks * STEP; }

  int64_t at(int64_t tap, int64_t panel, int64_t block) const {
    return ((tap * panels + panel) * blocks + block) * STEP;
  }

  // Of a thread, as floats: its packed rows, then a panel.
  int64_t packed() const { return (blocks + 1) * BLOCK * DEPTH / 2; }
};

constexpr BF16 ZEROS[TILE] = {};  // what a missing pixel has

struct Pixels {
  const BF16 *x[DEPTH], *grad[DEPTH];
  int64_t count, steps;

  Pixels(const WeightGradientBf16& op, int64_t first, int64_t total)
      : count(least(DEPTH, total - first)), steps(blocks_of(count)) {
    Place place(first, op.width, op.height);
    for (int64_t i = 0; i < count; ++i, place.next()) {
      x[i] = op.x + place.image * op.image + (place.y * op.columns + place.x) * op.pixel;
      grad[i] = op.grad + (first + i) * op.grad_pixel;
    }
  }

  // Values of pixel i from channel `at` on: TILE at most.
  const BF16* of(const BF16* const* pixels, int64_t i, int64_t at) const {
    return i < count ? pixels[i] + at : ZEROS;
  }

  // Channels first .. last of grad, [channel][DEPTH pixels], with zeros up to whole blocks.
  void pack_rows(int64_t first, int64_t last, BF16* rows) const {
    const int64_t channels = last - first, whole = channels / EIGHT * EIGHT;
    for (int64_t c = channels; c < blocks_of(channels) * BLOCK; ++c)
      __builtin_memset(rows + c * DEPTH, 0, size_t(steps * BLOCK) * sizeof(BF16));
    for (int64_t i = 0; i < steps * BLOCK; i += EIGHT) {
      for (int64_t c = 0; c < whole; c += EIGHT) {
        const BF16* from[EIGHT];
        for (int64_t j = 0; j < EIGHT; ++j) from[j] = of(grad, i + j, first + c);
        transpose_eight(from, rows + c * DEPTH + i, DEPTH);
      }
      for (int64_t j = i; j < i + EIGHT; ++j)
        for (int64_t c = whole; c < channels; ++c) rows[c * DEPTH + j] = of(grad, j, first + c)[0];
    }
  }

  // Up to BLOCK channels of x, as panels of B, whose rows are pixels.
  void pack_panel(int64_t first, int64_t channels, BF16* panel) const {
    for (int64_t i = 0; i < steps * BLOCK; i += 2)
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t at = half * TILE, some = channels - at;
        BF16* to = panel + i / BLOCK * STEP + half * (STEP / 2) + i % BLOCK * TILE;
        const BF16 *low = of(x, i, first + at), *high = of(x, i + 1, first + at);
        if (some >= TILE)
          interleave(low, high, TILE, to);
        else
          interleave(low, high, some > 0 ? some : 0, to);
      }
  }
};

void add_blocks(const WeightGradientBf16& op, const Sums& sums, int64_t first_block,
                int64_t last_block, int64_t first_panel, int64_t last_panel, float* matrices,
                BF16* rows) {
  const Multiplier multiplier;
  const int64_t total = op.images * op.height * op.width;
  BF16* const panel = rows + (last_block - first_block) * BLOCK * DEPTH;
  alignas(64) float c[STEP];
  for (int64_t first = 0; first < total; first += DEPTH) {
    const Pixels pixels(op, first, total);
    pixels.pack_rows(first_block * BLOCK, least(last_block * BLOCK, op.c_out), rows);
    for (int64_t tap = 0; tap < sums.taps; ++tap)
      for (int64_t p = first_panel; p < last_panel; ++p) {
        const int64_t shift = (tap / op.kernel * op.columns + tap % op.kernel) * op.pixel;
        const int64_t channel = p * BLOCK;
        pixels.pack_panel(shift + channel, least(BLOCK, op.c_in - channel), panel);
        for (int64_t block = first_block; block < last_block; ++block) {
          multiply_bf16(multiplier, BLOCK, rows + (block - first_block) * BLOCK * DEPTH, DEPTH,
                        pixels.steps, panel, c, BLOCK);
          float* const to = matrices + sums.at(tap, p, block);
          for (int64_t i = 0; i < STEP; ++i) to[i] += c[i];
        }
      }
  }
}

}  // namespace

int64_t weight_gradient_bf16_workspace(const WeightGradientBf16& op, int threads) {
  const Sums sums(op);
  return sums.size() + threads * sums.packed();
}

void weight_gradient_bf16_begin(const WeightGradientBf16& op, float* workspace, int) {
  __builtin_memset(workspace, 0, size_t(Sums(op).size()) * sizeof(float));
}

void weight_gradient_bf16_add(const WeightGradientBf16& op, float* workspace, int threads) {
  const Sums sums(op);
  const int64_t wanted = 2 * threads, down = least(sums.blocks, wanted);
  const int64_t across = least(sums.panels, ceil_div(wanted, down));
  const int64_t work = op.images * op.height * op.width * sums.size() / 64;
  parallel_for(down * across, work, threads, [&](int64_t job, int thread) {
    const int64_t i = job / across, j = job % across;
    add_blocks(op, sums, sums.blocks * i / down, sums.blocks * (i + 1) / down,
               sums.panels * j / across, sums.panels * (j + 1) / across, workspace,
               reinterpret_cast<BF16*>(workspace + sums.size() + thread * sums.packed()));
  });
}

void weight_gradient_bf16_finish(const WeightGradientBf16& op, float* workspace, int threads) {
  const Sums sums(op);
  parallel_for(op.c_out, op.c_out * op.c_in * sums.taps, threads, [&](int64_t o, int) {
    for (int64_t i = 0; i < op.c_in; ++i)
      for (int64_t tap = 0; tap < sums.taps; ++tap)
        op.dweight[o * op.stride[0] + i * op.stride[1] + tap / op.kernel * op.stride[2] +
                   tap % op.kernel * op.stride[3]] =
            workspace[sums.at(tap, i / BLOCK, o / BLOCK) + o % BLOCK * BLOCK + i % BLOCK];
  });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
