// The gradient of a convolution's weight: products of grad and x, summed over all pixels.
//
// Winograd: tiles of both are transformed and packed, as many at a time as stay in a cache
// (weight_gradient_tiles.h); then the products of a block of tiles are added to the sums, which are
// transformed back when all images are through. A block goes on from one call to the next, and
// each job owns a part of the sums: their bits depend on neither the threads nor the calls.
#include "weight_gradient.h"

#include "weight_gradient_direct.h"
#include "weight_gradient_tiles.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t BLOCK = 1200 * 1024;  // floats of a block's transformed tiles, about
constexpr int64_t MOST = 4096;          // tiles in a block
constexpr int64_t RUN = 4;              // tiles of a job that packs
constexpr int64_t STEP_BF16 = 32;       // channels: those of a bfloat16 sum are whole blocks

int64_t points_of(Algorithm algorithm, int64_t kernel) {
  const int64_t m = int64_t(algorithm);
  return m ? (m + 2) * (m + 2) : kernel * kernel;
}

struct Block {
  const WeightGradient& op;
  const Sums sums;
  const int threads;
  int64_t height, width, tiles;  // tiles of an image, tiles of a block
  Packing left{}, right{};
  int64_t a, b, size;  // where the operands begin in the workspace, and its end

  Block(const WeightGradient& op, int threads)
      : op(op), sums(points_of(op.algorithm, 3), op.c_in, op.c_out), threads(threads) {
    const int64_t m = int64_t(op.algorithm);
    height = ceil_div(op.height, m), width = ceil_div(op.width, m);
    left.lanes = WIDTH, left.padded = round_up(sums.rows, WIDTH);
    right.lanes = PANEL, right.padded = packed_columns(sums.columns);
    tiles = BLOCK / (sums.points * (left.padded + right.padded)) / DEPTH * DEPTH;
    tiles = tiles < DEPTH ? DEPTH : least(tiles, MOST);
    Packing* const both[] = {&left, &right};
    for (Packing* o : both) {
      o->block = tiles * o->lanes, o->planes = sums.points;
      o->plane = ceil_div(o->padded, o->lanes) * o->block + PAD;
    }
    a = PAD + sums.size();
    b = a + sums.points * left.plane;
    size = b + sums.points * right.plane;
  }

  template <int m>
  void add(float* workspace) const {
    const int64_t total = op.images * height * width;
    for (int64_t first = 0; first < total;) {
      if (state_of(workspace).waiting == tiles) multiply(workspace);
      State state = state_of(workspace);
      const int64_t count = least(tiles - state.waiting, total - first);
      pack<m>(workspace, first, count, state.waiting);
      state.waiting += count, first += count;
      set_state(workspace, state);
    }
  }

  template <int m>
  void finish(float* workspace) const {
    if (state_of(workspace).waiting) multiply(workspace);
    write_filters<m, 3>(op, sums, workspace, threads);
  }

 private:
  // `count` of the call's tiles from `first` on become the block's from `at` on.
  template <int m>
  void pack(float* workspace, int64_t first, int64_t count, int64_t at) const {
    const Image x{op.x, op.rows, op.columns, op.pixel, op.c_in};
    const Image grad{op.grad, op.height, op.width, op.c_out, op.c_out};
    const int64_t work = count * sums.points * (op.c_in + op.c_out);
    parallel_for(2 * ceil_div(count, RUN), work, threads, [&](int64_t job, int) {
      const int64_t run = job / 2 * RUN, some = least(RUN, count - run);
      const Place place(first + run, width, height);
      const Packing& packing = job % 2 ? right : left;
      float* out = workspace + (job % 2 ? b : a) + (at + run) * packing.lanes;
      if (bool(job % 2) == sums.columns_of_x)
        pack_tiles<TileOfX<m>>(x, place, some, packing, out);
      else
        pack_tiles<TileOfGrad<m>>(grad, place, some, packing, out);
    });
  }

  // Adds the products of the tiles that wait.
  void multiply(float* workspace) const {
    const State state = state_of(workspace);
    const int64_t panels = sums.panels(), jobs = sums.points * panels;
    const int64_t parts = jobs >= 4 * threads ? 1 : least(sums.strips, ceil_div(4 * threads, jobs));
    const int64_t work = jobs * sums.strips * state.waiting;
    parallel_for(jobs * parts, work, threads, [&](int64_t job, int) {
      const int64_t part = job % parts, panel = job / parts % panels;
      const int64_t first = sums.strips * part / parts, last = sums.strips * (part + 1) / parts;
      if (panel_width(sums.columns - panel * PANEL) == PANEL)
        multiply_panel<WIDE>(state, workspace, job / parts / panels, panel, first, last);
      else
        multiply_panel<SLIM>(state, workspace, job / parts / panels, panel, first, last);
    });
    set_state(workspace, {0, 1});
  }

  // Strips first .. last of one panel of one point.
  template <int VECTORS>
  void multiply_panel(const State& state, float* workspace, int64_t point, int64_t panel,
                      int64_t first, int64_t last) const {
    const float* const rows = workspace + a + point * left.plane;
    const float* const columns = workspace + b + point * right.plane + panel * right.block;
    for (int64_t tile = 0; tile < state.waiting; tile += DEPTH) {
      const int64_t count = least(DEPTH, state.waiting - tile);
      const bool fresh = tile == 0 && !state.summed;
      float* to = sums_of(workspace) + sums.at(point, first * ROWS, panel * PANEL);
      for (int64_t row = first * ROWS; row < last * ROWS; row += ROWS) {
        const float* strip = rows + row / WIDTH * left.block + tile * WIDTH + row % WIDTH;
        (fresh ? add_strip<VECTORS, true>
               : add_strip<VECTORS, false>)(strip, columns + tile * PANEL, count, to);
        to += ROWS * VECTORS * WIDTH;
      }
    }
  }
};

Sums direct_sums(const WeightGradient& op) {
  return Sums(points_of(Algorithm::direct, op.kernel), op.c_in, op.c_out);
}

}  // namespace

// The fewest cycles for 16 images by a count of vector operations and of the bytes of the sums.
// Shapes alone decide, so that results depend on neither batch nor threads. rate_bf16: as
// best_algorithm's, whose direct sum then takes the place of float32's.
Algorithm best_weight_gradient(int64_t c_in, int64_t c_out, int64_t height, int64_t width,
                               int64_t kernel, double rate_bf16) {
  constexpr double IMAGES = 16, BYTES = 8;  // bytes a cycle
  const bool bf16 = rate_bf16 > 0;
  const auto cost = [&](int64_t m) {
    const bool rounded = m == 1 && bf16;
    const int64_t step = rounded ? STEP_BF16 : 1;
    const Sums sums(m > 1 ? (m + 2) * (m + 2) : kernel * kernel, round_up(c_in, step),
                    round_up(c_out, step));
    const double points = double(sums.points), area = double(sums.plane / WIDTH);
    const double tiles = double(ceil_div(height, m) * ceil_div(width, m));
    const double of_x = points * (m > 1 ? 5 : 2), of_grad = m > 1 ? points * 4 : 2;
    const double packing =
        of_x * double(ceil_div(c_in, WIDTH)) + of_grad * double(ceil_div(c_out, WIDTH));
    return IMAGES * tiles * (points * area / (rounded ? rate_bf16 : 1.0) + packing) +
           points * area * (4 * WIDTH * 2 / BYTES);
  };
  const Algorithm direct = bf16 ? Algorithm::bf16 : Algorithm::direct;
  if (kernel != 3) return direct;
  const double one = cost(1), two = cost(2), four = cost(4);
  if (one <= two && one <= four) return direct;
  return two <= four ? Algorithm::winograd_2 : Algorithm::winograd_4;
}

int64_t weight_gradient_workspace(const WeightGradient& op, int threads) {
  if (op.algorithm != Algorithm::direct) return Block(op, threads).size;
  const Sums sums = direct_sums(op);
  return PAD + sums.size() + threads * direct_workspace(sums);
}

void weight_gradient_begin(const WeightGradient&, float* workspace, int) {
  set_state(workspace, {0, 0});
}

void weight_gradient_add(const WeightGradient& op, float* workspace, int threads) {
  if (op.algorithm == Algorithm::winograd_4) return Block(op, threads).add<4>(workspace);
  if (op.algorithm == Algorithm::winograd_2) return Block(op, threads).add<2>(workspace);
  add_direct(op, direct_sums(op), workspace, threads);
}

void weight_gradient_finish(const WeightGradient& op, float* workspace, int threads) {
  if (op.algorithm == Algorithm::winograd_4) return Block(op, threads).finish<4>(workspace);
  if (op.algorithm == Algorithm::winograd_2) return Block(op, threads).finish<2>(workspace);
  const auto write = op.kernel == 3 ? write_filters<1, 3> : write_filters<1, 1>;
  write(op, direct_sums(op), workspace, threads);
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
