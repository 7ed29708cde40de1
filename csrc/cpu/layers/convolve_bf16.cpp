// Convolutions of a plan in bfloat16, 1x1 and 3x3: implicit matrix products over pixels that lie
// one behind the other in the input.
//
// A row of the product is an output pixel. Where the kernels of an instruction set take any rows,
// those of all images follow one another; AMX's come in tiles of 16 whose inputs are equally far
// apart: part of a row of pixels, or, where that is not whole tiles, a run through the rows, the
// border's pixels computed and left out. An image that is to be repeated 2x2 is read as it is: a
// 3x3 filter then touches 2x2 pixels with sums of its weights, other ones for each of a pixel's
// four outputs.
#include "../isa.h"
#include "../parallel.h"
#include "bf16.h"
#include "pack.h"
#include "place.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t ROWS = 512;  // in a block of work: whole tiles

// An image's rows of the product: `length` outputs before repetition in rows of `pitch`, the first
// `width` of each wanted, and what fills the last tile.
struct Tiling {
  int64_t repeat, height, width, pitch, length, rows;

  explicit Tiling(const ConvolveBf16& op)
      : repeat(op.repeated ? 2 : 1),
        height(op.height / repeat),
        width(op.width / repeat),
        pitch(Multiplier::ANY_ROWS || width % TILE == 0 ? width : op.columns),
        length((height - 1) * pitch + width),
        rows(Multiplier::ANY_ROWS ? length : ceil_div(length, TILE) * TILE) {}
};

// Where the inputs of a block's rows begin, and their outputs, as pixels of y; -1: not wanted.
// bias: that of the row's image.
struct Rows {
  const BF16* x[ROWS];
  int64_t y[ROWS];
  const float* bias[ROWS];

  Rows(const ConvolveBf16& op, const Tiling& tiling, int64_t first, int64_t count) {
    int64_t image = first / tiling.rows, at = first % tiling.rows;
    int64_t i = at / tiling.pitch, j = at % tiling.pitch;
    for (int64_t row = 0; row < count; ++row) {
      x[row] = op.x + image * op.image + (i * op.columns + j) * op.stride * op.pixel;
      const bool wanted = j < tiling.width && at < tiling.length;
      y[row] =
          wanted ? ((image * op.height + i * tiling.repeat) * op.width + j * tiling.repeat) : -1;
      bias[row] = op.bias + image * op.bias_image;
      if (++j == tiling.pitch) j = 0, ++i;
      if (++at == tiling.rows) at = i = j = 0, ++image;
    }
    for (int64_t row = count; row % TILE; ++row) x[row] = x[count - 1], y[row] = -1;
  }
};

struct Taps {
  int64_t count, offset[TAPS];

  Taps(const ConvolveBf16& op, int64_t phase) : count(0) {
    const int64_t side = op.repeated ? 2 : op.kernel;
    for (int64_t i = 0; i < side; ++i)
      for (int64_t j = 0; j < side; ++j)
        offset[count++] = ((i + phase / 2) * op.columns + j + phase % 2) * op.pixel;
  }
};

// out = sum + bias (+ residual) for the first `count` channels of a block.
inline void write_pixel(const float* sum, const float* bias, const float* residual, int64_t count,
                        float* __restrict out) {
  if (residual)
    for (int64_t j = 0; j < count; ++j) out[j] = sum[j] + bias[j] + residual[j];
  else
    for (int64_t j = 0; j < count; ++j) out[j] = sum[j] + bias[j];
}

// Rows first .. first + count of all images, panels panel_first .. panel_last of one phase.
void run_rows(const ConvolveBf16& op, const Rows& rows, int64_t count, int64_t panel_first,
              int64_t panel_last, int64_t phase, const Multiplier& multiplier) {
  const Taps taps(op, phase);
  const int64_t steps = blocks_of(op.c_in), panel = taps.count * steps * STEP;
  const BF16* weight = op.weight + phase * blocks_of(op.c_out) * panel;
  const int64_t shift = phase / 2 * op.width + phase % 2;
  alignas(64) float c[BLOCK * BLOCK];
  for (int64_t p = panel_first; p < panel_last; ++p) {
    const int64_t channel = p * BLOCK, channels = least(BLOCK, op.c_out - channel);
    Ahead ahead = ahead_of(weight + p * panel, taps.count * steps, count);
    for (int64_t first = 0; first < count; first += BLOCK) {
      const int64_t some = least(BLOCK, count - first);
      multiply_bf16(multiplier, some, rows.x + first, op.stride * op.pixel, taps.offset, taps.count,
                    steps, weight + p * panel, ahead, c, BLOCK);
      for (int64_t i = 0; i < some; ++i) {
        if (rows.y[first + i] < 0) continue;
        const int64_t at = (rows.y[first + i] + shift) * op.c_out + channel;
        const float *sum = c + i * BLOCK, *residual = op.residual ? op.residual + at : nullptr;
        const float* bias = rows.bias[first + i] + channel;
        if (channels == BLOCK)
          write_pixel(sum, bias, residual, BLOCK, op.y + at);  // a count that the compiler knows
        else
          write_pixel(sum, bias, residual, channels, op.y + at);
      }
    }
  }
}

// The 2x2 filters of one phase: what 3x3 filters do to an image whose pixels are repeated.
void fold(const float* taps, int64_t phase, float* folded) {
  __builtin_memset(folded, 0, 4 * STEP * sizeof(float));
  for (int64_t i = 0; i < 3; ++i)
    for (int64_t j = 0; j < 3; ++j) {
      const int64_t y = (i + 1 - phase / 2) / 2, x = (j + 1 - phase % 2) / 2;
      const float* __restrict tap = taps + (i * 3 + j) * STEP;
      float* __restrict sum = folded + (y * 2 + x) * STEP;
      for (int64_t k = 0; k < STEP; ++k) sum[k] += tap[k];
    }
}

// A step of B from its rows as they are.
void pack_step(const float* rows, BF16* step) {
  for (int64_t half = 0; half < BLOCK; half += TILE)
    for (int64_t i = 0; i < BLOCK; i += 2, step += 2 * TILE) {
      const float *low = rows + i * BLOCK + half, *high = low + BLOCK;
      uint32_t pairs[TILE];
      for (int64_t j = 0; j < TILE; ++j) pairs[j] = pair_of(low[j], high[j]);
      __builtin_memcpy(step, pairs, sizeof pairs);
    }
}

// A step of every tap; `panel`: values of a panel of all of them.
void pack_steps(const float* taps, int64_t count, int64_t tap, BF16* packed) {
  for (int64_t t = 0; t < count; ++t) pack_step(taps + t * STEP, packed + t * tap);
}

}  // namespace

// Products of bfloat16 in the time of one of float32, as the kernels reach them. Without
// instructions for them as on the weaker of the sets that have some, so that the same layers are
// rounded.
double product_rate_bf16() { return Multiplier::ANY_ROWS ? 1.9 : 16.0; }

int64_t packed_weight_size_bf16(int64_t c_in, int64_t c_out, int64_t kernel, bool repeated) {
  return packed_size_bf16(c_in, c_out) * (repeated ? 4 * 4 : kernel * kernel);
}

void pack_weight_bf16(const Weight& weight, bool repeated, BF16* packed, int threads) {
  const int64_t steps = blocks_of(weight.c_in), panels = blocks_of(weight.c_out);
  const int64_t taps = weight.kernel * weight.kernel, tap = steps * STEP;
  parallel_for(panels * steps, panels * taps * tap, threads, [&](int64_t job, int) {
    const int64_t p = job / steps, o = p * BLOCK, s = job % steps, i = s * BLOCK;
    const Part part{o, least(BLOCK, weight.c_out - o), i, least(BLOCK, weight.c_in - i)};
    alignas(64) float planes[TAPS * STEP], folded[4 * STEP];
    if (part.rows < BLOCK) __builtin_memset(planes, 0, sizeof planes);
    gather(weight, part, planes, BLOCK, STEP);
    if (!repeated) return pack_steps(planes, taps, tap, packed + p * taps * tap + s * STEP);
    for (int64_t phase = 0; phase < 4; ++phase) {
      fold(planes, phase, folded);
      pack_steps(folded, 4, tap, packed + (phase * panels + p) * 4 * tap + s * STEP);
    }
  });
}

void convolve_bf16(const ConvolveBf16& op, int threads) {
  const Tiling tiling(op);
  const int64_t total = op.images * tiling.rows, blocks = ceil_div(total, ROWS);
  const int64_t panels = blocks_of(op.c_out), phases = op.repeated ? 4 : 1;
  const int64_t parts = blocks >= 2 * threads ? 1 : least(panels, ceil_div(2 * threads, blocks));
  const int64_t work = total * op.c_out * op.c_in * op.kernel * op.kernel / 64;
  parallel_for(blocks * parts, work, threads, [&](int64_t job, int) {
    const int64_t first = job / parts * ROWS, part = job % parts;
    const int64_t count = least(ROWS, total - first);
    const Rows rows(op, tiling, first, count);
    const Multiplier multiplier;
    for (int64_t phase = 0; phase < phases; ++phase)
      run_rows(op, rows, count, panels * part / parts, panels * (part + 1) / parts, phase,
               multiplier);
  });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
