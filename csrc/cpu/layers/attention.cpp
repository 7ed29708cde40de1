// The attention of a plan between its two projections: softmax(q k^T / sqrt(d)) v, by tiles.
#include "attention.h"

#include "../isa.h"
#include "../parallel.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

struct Sizes {
  int64_t depth, tiles, keys, values, scores;

  explicit Sizes(const Attention& op)
      : depth(op.channels / op.heads),
        tiles((op.pixels + ROWS - 1) / ROWS),
        keys(packed_size(depth, op.pixels)),
        values(packed_size(op.pixels, depth)),
        scores(ROWS * round_up(op.pixels, PANEL)) {}
};

}  // namespace

int64_t attention_workspace(const Attention& op, int threads) {
  const Sizes size(op);
  return op.images * op.heads * (size.keys + size.values) + threads * size.scores;
}

void attention(const Attention& op, float* workspace, int threads) {
  const Sizes size(op);
  const int64_t heads = op.images * op.heads, ld = 3 * op.channels;
  const int64_t elements = op.images * op.pixels * op.channels;
  float *keys = workspace, *values = keys + heads * size.keys;
  float* scores = values + heads * size.values;
  parallel_for(heads, elements, threads, [&](int64_t job, int) {
    const float* k =
        op.qkv + job / op.heads * op.pixels * ld + op.channels + job % op.heads * size.depth;
    pack(k, size.depth, op.pixels, 1, ld, keys + job * size.keys);
    pack(k + op.channels, op.pixels, size.depth, ld, 1, values + job * size.values);
  });
  parallel_for(
      heads * size.tiles, elements * op.pixels / 16, threads, [&](int64_t job, int thread) {
        const int64_t head = job / size.tiles, first = job % size.tiles * ROWS;
        const int64_t row = head / op.heads * op.pixels + first, c = head % op.heads * size.depth;
        const int64_t rows = op.pixels - first < ROWS ? op.pixels - first : ROWS;
        attend_rows(op.qkv + row * ld + c, ld, keys + head * size.keys, values + head * size.values,
                    rows, op.pixels, size.depth, scores + thread * size.scores,
                    op.y + row * op.channels + c, op.channels);
      });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
