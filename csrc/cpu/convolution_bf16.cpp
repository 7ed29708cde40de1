// Convolutions of a plan in bfloat16, 1x1 and 3x3: implicit matrix products over pixels that lie
// one behind the other in the input.
//
// A tile is 16 outputs whose inputs are equally far apart: part of a row, or, where a row is not
// whole tiles, a run through the rows, the border's pixels computed and left out. An image that is
// to be repeated 2x2 is read as it is: a 3x3 filter then touches 2x2 pixels with sums of its
// weights, other ones for each of a pixel's four outputs.
#include "bf16.h"
#include "isa.h"
#include "parallel.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t TILES = 32;  // in a block of work
constexpr int64_t TAPS = 9;    // at most

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The outputs of an image before repetition, and the tiles that cover them: `length` outputs in
// rows of `pitch`, the first `width` of a row wanted.
struct Tiling {
  int64_t repeat, height, width, pitch, length, tiles;

  explicit Tiling(const ConvolutionBf16& op)
      : repeat(op.repeated ? 2 : 1),
        height(op.height / repeat),
        width(op.width / repeat),
        pitch(width % TILE ? op.columns : width),
        length((height - 1) * pitch + width),
        tiles(ceil_div(length, TILE)) {}
};

struct Taps {
  int64_t count, offset[TAPS];

  Taps(const ConvolutionBf16& op, int64_t phase) : count(0) {
    const int64_t side = op.repeated ? 2 : op.kernel;
    for (int64_t i = 0; i < side; ++i)
      for (int64_t j = 0; j < side; ++j)
        offset[count++] = ((i + phase / 2) * op.columns + j + phase % 2) * op.pixel;
  }
};

// y = c + bias (+ residual) for the outputs of a tile that are wanted.
void write_tile(const ConvolutionBf16& op, const Tiling& tiling, int64_t tile, int64_t phase,
                int64_t first, const float* c) {
  const int64_t image = tile / tiling.tiles, begin = tile % tiling.tiles * TILE;
  const int64_t columns = least(BLOCK, op.c_out - first);
  int64_t y = begin / tiling.pitch, x = begin % tiling.pitch;
  for (int64_t i = 0; i < least(TILE, tiling.length - begin); ++i, ++x) {
    if (x == tiling.pitch) x = 0, ++y;
    if (x >= tiling.width) continue;
    const int64_t row = image * op.height + y * tiling.repeat + phase / 2;
    const int64_t at = (row * op.width + x * tiling.repeat + phase % 2) * op.c_out + first;
    const float *sum = c + i * BLOCK, *bias = op.bias + first;
    float* __restrict out = op.y + at;
    if (op.residual)
      for (int64_t j = 0; j < columns; ++j) out[j] = sum[j] + bias[j] + op.residual[at + j];
    else
      for (int64_t j = 0; j < columns; ++j) out[j] = sum[j] + bias[j];
  }
}

// Tiles first .. first + count of all images, panels panel_first .. panel_last of one phase.
void run_tiles(const ConvolutionBf16& op, const Tiling& tiling, int64_t first, int64_t count,
               int64_t panel_first, int64_t panel_last, int64_t phase,
               const Multiplier& multiplier) {
  const Taps taps(op, phase);
  const int64_t steps = blocks_of(op.c_in), panel = taps.count * steps * STEP;
  const BF16* weight = op.weight + phase * blocks_of(op.c_out) * panel;
  const BF16* x[TILES];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t image = (first + i) / tiling.tiles, begin = (first + i) % tiling.tiles * TILE;
    const int64_t pixel = begin / tiling.pitch * op.columns + begin % tiling.pitch;
    x[i] = op.x + image * op.image + pixel * op.stride * op.pixel;
  }
  alignas(64) float c[BLOCK * BLOCK];
  for (int64_t p = panel_first; p < panel_last; ++p)
    for (int64_t i = 0; i < count; i += 2) {
      const int64_t tiles = least(2, count - i);
      multiply_bf16(multiplier, tiles, x + i, op.stride * op.pixel, taps.offset, taps.count, steps,
                    weight + p * panel, c, BLOCK);
      for (int64_t t = 0; t < tiles; ++t)
        write_tile(op, tiling, first + i + t, phase, p * BLOCK, c + t * TILE * BLOCK);
    }
}

// The 2x2 filter of one phase: what a 3x3 filter does to an image whose pixels are repeated.
void fold(const float* weight, int64_t filters, int64_t phase, float* folded) {
  for (int64_t f = 0; f < filters; ++f)
    for (int64_t i = 0; i < 3; ++i)
      for (int64_t j = 0; j < 3; ++j) {
        const int64_t y = (i + 1 - phase / 2) / 2, x = (j + 1 - phase % 2) / 2;
        folded[f * 4 + y * 2 + x] += weight[f * 9 + i * 3 + j];
      }
}

void pack_taps(const float* weight, int64_t c_in, int64_t c_out, int64_t taps, BF16* packed) {
  const int64_t tap = blocks_of(c_in) * STEP;
  for (int64_t t = 0; t < taps; ++t)
    pack_bf16(weight + t, c_in, c_out, taps, c_in * taps, packed + t * tap, taps * tap);
}

}  // namespace

int64_t packed_weight_size_bf16(int64_t c_in, int64_t c_out, int64_t kernel, bool repeated) {
  return packed_size_bf16(c_in, c_out) * (repeated ? 4 * 4 : kernel * kernel);
}

// weight: (c_out, c_in, kernel, kernel)
void pack_weight_bf16(const float* weight, int64_t c_in, int64_t c_out, int64_t kernel,
                      bool repeated, BF16* packed) {
  if (!repeated) return pack_taps(weight, c_in, c_out, kernel * kernel, packed);
  for (int64_t phase = 0; phase < 4; ++phase) {
    const Scratch<float> folded(c_out * c_in * 4);
    fold(weight, c_out * c_in, phase, folded.data);
    pack_taps(folded.data, c_in, c_out, 4, packed + phase * 4 * packed_size_bf16(c_in, c_out));
  }
}

void convolution_bf16(const ConvolutionBf16& op, int threads) {
  const Tiling tiling(op);
  const int64_t total = op.images * tiling.tiles, blocks = ceil_div(total, TILES);
  const int64_t panels = blocks_of(op.c_out), phases = op.repeated ? 4 : 1;
  const int64_t parts = blocks >= 2 * threads ? 1 : least(panels, ceil_div(2 * threads, blocks));
  const int64_t work = total * op.c_out * op.c_in * op.kernel * op.kernel / 64;
  parallel_for(blocks * parts, work, threads, [&](int64_t job, int) {
    const int64_t first = job / parts * TILES, part = job % parts;
    const Multiplier multiplier;
    for (int64_t phase = 0; phase < phases; ++phase)
      run_tiles(op, tiling, first, least(TILES, total - first), panels * part / parts,
                panels * (part + 1) / parts, phase, multiplier);
  });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
