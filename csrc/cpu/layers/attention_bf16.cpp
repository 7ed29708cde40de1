// The attention of a plan in bfloat16: softmax(q k^T / sqrt(d)) v by tiles of queries, with float32
// scores and sums.
#include "../isa.h"
#include "../parallel.h"
#include "attention.h"
#include "bf16_rows.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

struct Sizes {  // in values of bfloat16: a float is two
  int64_t depth, tiles, width, length, rows, tile;

  explicit Sizes(const Attention& op)
      : depth(op.channels / op.heads),
        tiles(blocks_of(op.pixels)),
        width(blocks_of(depth) * BLOCK),
        length(blocks_of(op.pixels) * BLOCK),
        rows(width * length),
        tile(BLOCK * (width + length) + 2 * BLOCK * (length + BLOCK)) {}
};

}  // namespace

int64_t attention_workspace_bf16(const Attention& op, int threads) {
  const Sizes size(op);
  return (op.images * op.heads * 2 * size.rows + threads * (size.rows + size.tile)) / 2;
}

void attention_bf16(const Attention& op, float* workspace, int threads) {
  const Sizes size(op);
  const int64_t heads = op.images * op.heads, ld = 3 * op.channels;
  const int64_t elements = op.images * op.pixels * op.channels;
  const float scale = float(1.0 / sqrt(double(size.depth)));
  BF16 *keys = reinterpret_cast<BF16*>(workspace), *values = keys + heads * size.rows;
  BF16 *rounded = values + heads * size.rows, *tiles = rounded + threads * size.rows;
  parallel_for(heads, elements, threads, [&](int64_t job, int thread) {
    const float* k =
        op.qkv + job / op.heads * op.pixels * ld + op.channels + job % op.heads * size.depth;
    BF16* rows = rounded + thread * size.rows;
    round_rows(k, ld, op.pixels, size.depth, size.length, rows, size.width);
    pack_columns(rows, size.width, size.width, size.length, keys + job * size.rows,
                 size.width * BLOCK);
    round_rows(k + op.channels, ld, op.pixels, size.depth, size.length, rows, size.width);
    pack_rows(rows, size.width, size.length, size.width, values + job * size.rows,
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
                        keys + head * size.rows + j * size.width, scores + j, size.length);
        for (int64_t i = 0; i < rows; ++i)
          factor[i] = exponentiate(scores + i * size.length, op.pixels, scale);
        round_rows(scores, size.length, rows, op.pixels, BLOCK, probabilities, size.length);
        for (int64_t j = 0; j < size.depth; j += BLOCK) {
          multiply_bf16(multiplier, rows, probabilities, size.length, size.length / BLOCK,
                        values + head * size.rows + j * size.length, sums, BLOCK);
          const int64_t columns = size.depth - j < BLOCK ? size.depth - j : BLOCK;
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t k = 0; k < columns; ++k)
              op.y[(row + i) * op.channels + c + j + k] = sums[i * BLOCK + k] * factor[i];
        }
      });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
