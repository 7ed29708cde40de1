// The gradient of attention in bfloat16, a head at a time: with P = softmax(S), S = q k^T /
// sqrt(d),
//
//     mixed = P v,  dv = P^T dmixed,  dP = dmixed v^T,  dS = P (dP - sum_j P dP),
//     dq = dS k / sqrt(d),  dk = dS^T q / sqrt(d)
//
// with float32 scores and sums. Queries come in tiles of BLOCK; P and dS of a group of tiles are
// kept, transposed, for the products that sum over queries.
#include "../isa.h"
#include "../parallel.h"
#include "../sizes.h"
#include "attention.h"
#include "bf16_rows.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t GROUP = 256;  // queries whose P and dS are kept: whole blocks
constexpr int64_t RUN = 64;     // pixels in a partial sum
constexpr int64_t COLUMNS = 64;

struct Sizes {  // in values of bfloat16: a float is two
  int64_t depth, width, length, group, rows, kept, sums, tile;

  explicit Sizes(const AttentionGradient& op)
      : depth(op.channels / op.heads),
        width(blocks_of(depth) * BLOCK),
        length(blocks_of(op.pixels) * BLOCK),
        group(least(GROUP, length)),
        rows(length * width),
        kept(length * group),
        sums(2 * length * width),
        tile(BLOCK * length) {}

  // q, k, v and dmixed; panels of k and v, each both ways; of a group's q and dmixed, and its P and
  // dS; dk and dv; a tile's P and dS, and these rounded.
  int64_t all() const { return 8 * rows + 2 * group * width + 2 * kept + 2 * sums + 6 * tile; }
};

class Head {
 public:
  Head(const AttentionGradient& op, const Sizes& size, int64_t job, BF16* memory)
      : op(op), size(size), image(job / op.heads), c(job % op.heads * size.depth) {
    const auto take = [&](int64_t count) { return (memory += count) - count; };
    const auto take_floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count)); };
    q = take(size.rows), k = take(size.rows), v = take(size.rows), dmixed = take(size.rows);
    keys = take(size.rows), keys_back = take(size.rows);
    values = take(size.rows), values_back = take(size.rows);
    q_back = take(size.group * size.width), dmixed_back = take(size.group * size.width);
    p_kept = take(size.kept), ds_kept = take(size.kept);
    dk = take_floats(size.sums), dv = take_floats(size.sums);
    p = take_floats(2 * size.tile), ds = take_floats(2 * size.tile);
    p_rounded = take(size.tile), ds_rounded = take(size.tile);
  }

  void run() {
    prepare();
    for (int64_t first = 0; first < op.pixels; first += size.group) {
      const int64_t rows = least(size.group, size.length - first);
      for (int64_t at = 0; at < rows; at += BLOCK) run_tile(first + at, at);
      const auto back = [&](const BF16* x, BF16* panels) {
        pack_rows(x + first * size.width, size.width, rows, size.width, panels,
                  rows / BLOCK * STEP);
      };
      back(q, q_back), back(dmixed, dmixed_back);
      add(ds_kept, q_back, rows, first == 0, dk);
      add(p_kept, dmixed_back, rows, first == 0, dv);
    }
    write(dk, op.channels), write(dv, 2 * op.channels);
    for (int64_t part = 0; part < 3; ++part) sum(part * op.channels);
  }

 private:
  const AttentionGradient& op;
  const Sizes& size;
  const int64_t image, c;  // c: the head's first channel
  const Multiplier multiplier{};
  BF16 *q, *k, *v, *dmixed;                       // (pixels, depth)
  BF16 *keys, *values_back;                       // panels of k^T and v^T
  BF16 *values, *keys_back;                       // of v and k
  BF16 *q_back, *dmixed_back, *p_kept, *ds_kept;  // of a group; the latter: (pixels, queries)
  float *dk, *dv;                                 // (pixels, depth)
  float *p, *ds;                                  // of a tile: (queries, pixels)
  BF16 *p_rounded, *ds_rounded;

  BF16* gradient_of(int64_t pixel, int64_t channel) const {
    return op.dqkv + (image * op.pixels + pixel) * op.dqkv_pixel + channel + c;
  }

  void prepare() {
    const float* at = op.qkv + image * op.pixels * 3 * op.channels + c;
    const auto round = [&](const float* x, int64_t ld, BF16* rows) {
      round_rows(x, ld, op.pixels, size.depth, size.length, rows, size.width);
    };
    round(at, 3 * op.channels, q);
    round(at + op.channels, 3 * op.channels, k);
    round(at + 2 * op.channels, 3 * op.channels, v);
    round(op.dmixed + image * op.pixels * op.channels + c, op.channels, dmixed);
    const int64_t deep = size.width * BLOCK, along = size.length * BLOCK;
    pack_columns(k, size.width, size.width, size.length, keys, deep);
    pack_columns(v, size.width, size.width, size.length, values_back, deep);
    pack_rows(k, size.width, size.length, size.width, keys_back, along);
    pack_rows(v, size.width, size.length, size.width, values, along);
  }

  // Calls body(j, product) for every BLOCK columns of a (BLOCK, k) times B.
  template <class Body>
  void multiply(const BF16* a, int64_t k, const BF16* panels, int64_t columns,
                const Body& body) const {
    alignas(64) float product[STEP];
    for (int64_t j = 0; j < columns; j += BLOCK) {
      multiply_bf16(multiplier, BLOCK, a, k, k / BLOCK, panels + j * k, product, BLOCK);
      body(j, product);
    }
  }

  // P and dS of the queries from `first` on, place `at` of their group; mixed and dq.
  void run_tile(int64_t first, int64_t at) {
    const int64_t rows = least(BLOCK, op.pixels - first), pixels = op.pixels, ld = size.length;
    const float scale = float(1.0 / sqrt(double(size.depth)));
    const auto scores = [&](const BF16* x, const BF16* panels, float* out) {
      for (int64_t j = 0; j < ld; j += BLOCK)
        multiply_bf16(multiplier, BLOCK, x + first * size.width, size.width, size.width / BLOCK,
                      panels + j * size.width, out + j, ld);
    };
    scores(q, keys, p);
    scores(dmixed, values_back, ds);
    for (int64_t i = 0; i < rows; ++i) {
      float* row = p + i * ld;
      const float factor = exponentiate(row, pixels, scale);
      for (int64_t j = 0; j < pixels; ++j) row[j] *= factor;
      softmax_gradient(row, ds + i * ld, pixels, scale);
    }
    round_rows(p, ld, rows, pixels, BLOCK, p_rounded, ld);
    round_rows(ds, ld, rows, pixels, BLOCK, ds_rounded, ld);
    const auto put = [&](const BF16* x, const BF16* panels, BF16* out, int64_t pixel) {
      multiply(x, ld, panels, size.width, [&](int64_t j, const float* product) {
        for (int64_t i = 0; i < rows; ++i)
          narrow(product + i * BLOCK, least(BLOCK, size.depth - j), out + i * pixel + j);
      });
    };
    put(p_rounded, values, op.mixed + (image * pixels + first) * op.mixed_pixel + c,
        op.mixed_pixel);
    put(ds_rounded, keys_back, gradient_of(first, 0), op.dqkv_pixel);
    transpose_rows(p_rounded, ld, BLOCK, ld, p_kept + at, size.group);
    transpose_rows(ds_rounded, ld, BLOCK, ld, ds_kept + at, size.group);
  }

  // out (pixels, depth) += a^T b of a group's `queries`; or =, if these are the first.
  void add(const BF16* a, const BF16* b, int64_t queries, bool first, float* out) const {
    alignas(64) float product[STEP];
    for (int64_t j = 0; j < size.width; j += BLOCK)
      for (int64_t i = 0; i < size.length; i += BLOCK) {
        multiply_bf16(multiplier, BLOCK, a + i * size.group, size.group, queries / BLOCK,
                      b + j * queries, product, BLOCK);
        for (int64_t l = 0; l < BLOCK; ++l) {
          float *to = out + (i + l) * size.width + j, *from = product + l * BLOCK;
          for (int64_t m = 0; m < BLOCK; ++m) to[m] = first ? from[m] : to[m] + from[m];
        }
      }
  }

  void write(const float* x, int64_t channel) const {
    for (int64_t i = 0; i < op.pixels; ++i)
      narrow(x + i * size.width, size.depth, gradient_of(i, channel));
  }

  void sum(int64_t channel) const {
    for (int64_t j = 0; j < size.depth; j += COLUMNS) {
      const int64_t count = least(COLUMNS, size.depth - j);
      double total[COLUMNS] = {};
      for (int64_t first = 0; first < op.pixels; first += RUN) {
        float some[COLUMNS] = {};
        for (int64_t i = first; i < least(op.pixels, first + RUN); ++i) {
          const BF16* row = gradient_of(i, channel + j);
          for (int64_t l = 0; l < count; ++l) some[l] += to_float(row[l]);
        }
        for (int64_t l = 0; l < count; ++l) total[l] += double(some[l]);
      }
      __builtin_memcpy(op.sums + image * 3 * op.channels + channel + c + j, total,
                       size_t(count) * sizeof(double));
    }
  }
};

}  // namespace

int64_t attention_gradient_workspace_bf16(const AttentionGradient& op, int threads) {
  return threads * Sizes(op).all() / 2;
}

void attention_gradient_bf16(const AttentionGradient& op, float* workspace, int threads) {
  const Sizes size(op);
  const int64_t work = op.images * op.pixels * op.pixels * op.channels / 16;
  parallel_for(op.images * op.heads, work, threads, [&](int64_t job, int thread) {
    Head(op, size, job, reinterpret_cast<BF16*>(workspace) + thread * size.all()).run();
  });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
