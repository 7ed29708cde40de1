// The attention of a plan in bfloat16: softmax(q k^T / sqrt(d)) v by tiles of queries, with float32
// scores and sums.
#include "../isa.h"
#include "../parallel.h"
#include "../view.h"
#include "attention.h"
#include "bf16.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

struct Sizes {  // in values of bfloat16: a float is two
  int64_t depth, tiles, width, length, keys, values, tile;

  explicit Sizes(const Attention& op)
      : depth(op.channels / op.heads),
        tiles(blocks_of(op.pixels)),
        width(blocks_of(depth) * BLOCK),
        length(blocks_of(op.pixels) * BLOCK),
        keys(width * length),
        values(width * length),
        tile(BLOCK * (width + length) + 2 * BLOCK * (length + BLOCK)) {}
};

// Rows of floats, rounded, to rows of `ld` values, zeros behind a row's end and for missing rows.
void round_rows(const float* x, int64_t ldx, int64_t rows, int64_t count, int64_t all, BF16* out,
                int64_t ld) {
  for (int64_t i = 0; i < all; ++i) {
    const int64_t filled = i < rows ? count : 0;
    narrow(x + i * ldx, filled, out + i * ld);
    for (int64_t j = filled; j < ld; ++j) out[i * ld + j] = {0};
  }
}

}  // namespace

int64_t attention_workspace_bf16(const Attention& op, int threads) {
  const Sizes size(op);
  return (op.images * op.heads * (size.keys + size.values) + threads * size.tile) / 2;
}

void attention_bf16(const Attention& op, float* workspace, int threads) {
  const Sizes size(op);
  const int64_t heads = op.images * op.heads, ld = 3 * op.channels;
  const int64_t elements = op.images * op.pixels * op.channels;
  const float scale = float(1.0 / sqrt(double(size.depth)));
  BF16 *keys = reinterpret_cast<BF16*>(workspace), *values = keys + heads * size.keys;
  BF16* tiles = values + heads * size.values;
  parallel_for(heads, elements, threads, [&](int64_t job, int) {
    const float* k =
        op.qkv + job / op.heads * op.pixels * ld + op.channels + job % op.heads * size.depth;
    pack_bf16(k, size.depth, op.pixels, 1, ld, keys + job * size.keys, size.width * BLOCK);
    pack_bf16(k + op.channels, op.pixels, size.depth, ld, 1, values + job * size.values,
              size.length * BLOCK);
  });
  parallel_for(
      heads * size.tiles, elements * op.pixels / 16, threads, [&](int64_t job, int thread) {
        const int64_t head = job / size.tiles, first = job % size.tiles * BLOCK;
        const int64_t row = head / op.heads * op.pixels + first, c = head % op.heads * size.depth;
        const int64_t rows = op.pixels - first < BLOCK ? op.pixels - first : BLOCK;
        BF16* q = tiles + thread * size.tile;
        BF16* probabilities = q + BLOCK * size.width;
        float* scores = reinterpret_cast<float*>(probabilities + BLOCK * size.length);
        float *sums = scores + BLOCK * size.length, factor[BLOCK];
        const Multiplier multiplier;

        round_rows(op.qkv + row * ld + c, ld, rows, size.depth, BLOCK, q, size.width);
        for (int64_t j = 0; j < size.length; j += BLOCK)
          multiply_bf16(multiplier, rows, q, size.width, size.width / BLOCK,
                        keys + head * size.keys + j * size.width, scores + j, size.length);
        for (int64_t i = 0; i < rows; ++i)
          factor[i] = exponentiate(scores + i * size.length, op.pixels, scale);
        round_rows(scores, size.length, rows, op.pixels, BLOCK, probabilities, size.length);
        for (int64_t j = 0; j < size.depth; j += BLOCK) {
          multiply_bf16(multiplier, rows, probabilities, size.length, size.length / BLOCK,
                        values + head * size.values + j * size.length, sums, BLOCK);
          const int64_t columns = size.depth - j < BLOCK ? size.depth - j : BLOCK;
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t k = 0; k < columns; ++k)
              op.y[(row + i) * op.channels + c + j + k] = sums[i * BLOCK + k] * factor[i];
        }
      });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
