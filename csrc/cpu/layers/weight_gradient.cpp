// The gradient of a convolution's weight: products of grad and x, summed over all pixels.
//
// Tiles of both are transformed and packed, as many at a time as stay in a cache
// (weight_gradient.h); then the products of a block of tiles are added to the sums, a matrix of
// channels by channels for each point, which are transformed back when all images are through. Each
// job owns a part of the sums, and an element's sum runs over runs of DEPTH tiles in the order of
// tiles, whatever images come in one call: its bits depend on neither the threads nor the calls.
#include "weight_gradient.h"

#include "../isa.h"
#include "../parallel.h"
#include "gemm.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t power_below(int64_t x) { return x < 2 ? 1 : 2 * power_below(x / 2); }

constexpr int64_t VECTORS = PANEL / WIDTH;
constexpr int64_t ROWS = power_below(STRIP) < WIDTH ? power_below(STRIP) : WIDTH;  // of sums
constexpr int64_t DEPTH = least(4096 / PANEL, 128);  // tiles at a time: half of the first cache
constexpr int64_t BLOCK = 2400 * 1024;               // floats of a block's transformed tiles, about
constexpr int64_t LEAST = 128, MOST = 8192;          // tiles in a block
constexpr int64_t RUN = 16;                          // tiles of a job that packs
constexpr int64_t PAD = 16;  // planes are a cache line further apart than a power of two

static_assert(WIDTH % ROWS == 0 && LEAST % DEPTH == 0, "whole strips, whole runs");

// The left operand lends rows to the products, one channel at a time; the right one panels.
struct Operand {
  bool of_x;
  int64_t channels, lanes, blocks, planes, plane;
};

struct Layout {
  int64_t points, height, width;  // height, width: tiles of an image
  Operand left, right;
  int64_t tiles;             // in a block
  int64_t rows, plane;       // of the sums: [point][panel][rows][PANEL]
  int64_t a, b, sums, size;  // where they begin in the workspace

  explicit Layout(const WeightGradient& op) {
    const int64_t m = op.algorithm == Algorithm::direct ? 1 : int64_t(op.algorithm);
    points = m > 1 ? (m + 2) * (m + 2) : op.kernel * op.kernel;
    height = ceil_div(op.height, m), width = ceil_div(op.width, m);
    const auto area = [](int64_t a, int64_t b) { return round_up(a, ROWS) * round_up(b, PANEL); };
    const bool swapped = area(op.c_in, op.c_out) < area(op.c_out, op.c_in);
    const int64_t of_grad = m > 1 ? points : 1;
    left = {swapped, swapped ? op.c_in : op.c_out, WIDTH, 0, swapped ? points : of_grad, 0};
    right = {!swapped, swapped ? op.c_out : op.c_in, PANEL, 0, swapped ? of_grad : points, 0};
    Operand* const both[] = {&left, &right};
    int64_t floats = 0;
    for (Operand* o : both) {
      o->blocks = ceil_div(o->channels, o->lanes);
      floats += o->planes * o->blocks * o->lanes;
    }
    tiles = BLOCK / floats / LEAST * LEAST;
    tiles = tiles < LEAST ? LEAST : least(tiles, MOST);
    for (Operand* o : both) o->plane = o->blocks * tiles * o->lanes + PAD;
    rows = round_up(left.channels, ROWS);
    plane = right.blocks * rows * PANEL + PAD;
    a = PAD;
    b = a + left.planes * left.plane;
    sums = b + right.planes * right.plane;
    size = sums + points * plane;
  }
};

// Stands at the beginning of the workspace.
struct State {
  int64_t waiting;  // tiles in the block, which the sums do not hold yet
  int64_t summed;   // whether the sums hold any
};

State state_of(const float* workspace) {
  State state;
  __builtin_memcpy(&state, workspace, sizeof state);
  return state;
}

void set_state(float* workspace, State state) { __builtin_memcpy(workspace, &state, sizeof state); }

// ---- the products ------------------------------------------------------------------------------

// sums (ROWS, PANEL) = or += `count` tiles of ROWS channels of a times those of a panel of b.
template <bool FIRST>
void add_strip(const float* a, const float* b, int64_t count, float* sums) {
  for (int64_t i = 0; i < ROWS * VECTORS; ++i)
    __builtin_prefetch(sums + ROWS * PANEL + i * WIDTH, 1);
  Vector sum[ROWS][VECTORS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = Vector{};
  for (int64_t tile = 0; tile < count; ++tile, a += WIDTH, b += PANEL) {
    Vector right[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) right[j] = load_vector(b + j * WIDTH);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Vector left = vector_of(a[i]);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = vector_madd(left, right[j], sum[i][j]);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) {
      float* at = sums + i * PANEL + j * WIDTH;
      store_vector(at, FIRST ? sum[i][j] : load_vector(at) + sum[i][j]);
    }
}

// The products of the block's tiles, into rows first .. last of one point's sums of a panel.
void add_block(const Layout& layout, const State& state, const float* workspace, int64_t point,
               int64_t panel, int64_t first, int64_t last, float* sums) {
  const Operand &left = layout.left, &right = layout.right;
  const float* a = workspace + layout.a + (left.planes > 1 ? point * left.plane : 0);
  const float* b = workspace + layout.b + (right.planes > 1 ? point * right.plane : 0) +
                   panel * layout.tiles * PANEL;
  for (int64_t tile = 0; tile < state.waiting; tile += DEPTH) {
    const int64_t count = least(DEPTH, state.waiting - tile);
    float* to = sums;
    for (int64_t row = first; row < last; row += ROWS, to += ROWS * PANEL) {
      const float* strip = a + (row / WIDTH * layout.tiles + tile) * WIDTH + row % WIDTH;
      if (tile == 0 && !state.summed)
        add_strip<true>(strip, b + tile * PANEL, count, to);
      else
        add_strip<false>(strip, b + tile * PANEL, count, to);
    }
  }
}

void flush(const Layout& layout, float* workspace, int threads) {
  const State state = state_of(workspace);
  const int64_t panels = layout.right.blocks, strips = layout.rows / ROWS;
  const int64_t jobs = layout.points * panels;
  const int64_t parts = jobs >= 4 * threads ? 1 : least(strips, ceil_div(4 * threads, jobs));
  const int64_t work = jobs * layout.rows * state.waiting;
  parallel_for(jobs * parts, work, threads, [&](int64_t job, int) {
    const int64_t part = job % parts, panel = job / parts % panels, point = job / parts / panels;
    const int64_t first = strips * part / parts * ROWS, last = strips * (part + 1) / parts * ROWS;
    add_block(
        layout, state, workspace, point, panel, first, last,
        workspace + layout.sums + point * layout.plane + (panel * layout.rows + first) * PANEL);
  });
  set_state(workspace, {0, 1});
}

// Where the taps of rows' and columns' channels go.
struct Filters {
  float* data;
  int64_t row, column, down, right;  // strides

  Filters(const WeightGradient& op, bool columns_of_x)
      : data(op.dweight),
        row(op.stride[columns_of_x ? 0 : 1]),
        column(op.stride[columns_of_x ? 1 : 0]),
        down(op.stride[2]),
        right(op.stride[3]) {}

  // `count` columns from `c` on of one row: taps[tap][WIDTH].
  template <int kernel>
  void store(int64_t r, int64_t c, int64_t count, const float* taps) const {
    float* out = data + r * row + c * column;
    if (column == 1 && count == WIDTH) {
      for (int tap = 0; tap < kernel * kernel; ++tap)
        store_vector(out + tap / kernel * down + tap % kernel * right,
                     load_vector(taps + tap * WIDTH));
      return;
    }
    for (int64_t j = 0; j < count; ++j, out += column)
      for (int tap = 0; tap < kernel * kernel; ++tap)
        out[tap / kernel * down + tap % kernel * right] = taps[tap * WIDTH + j];
  }
};

// ---- one algorithm -----------------------------------------------------------------------------

template <int m, int kernel>
struct Form {
  // `count` of the call's tiles from `first` on become the block's from `at` on.
  static void pack(const WeightGradient& op, const Layout& layout, float* workspace, int64_t first,
                   int64_t count, int64_t at, int threads) {
    const Image x{op.x, op.rows, op.columns, op.pixel, op.c_in};
    const Image grad{op.grad, op.height, op.width, op.c_out, op.c_out};
    const int64_t runs = ceil_div(count, RUN);
    const int64_t blocks = layout.left.blocks + layout.right.blocks;
    const int64_t work = count * layout.points * blocks * PANEL;
    parallel_for(blocks * runs, work, threads, [&](int64_t job, int) {
      const bool right = job / runs >= layout.left.blocks;
      const Operand& o = right ? layout.right : layout.left;
      const int64_t block = job / runs - (right ? layout.left.blocks : 0), run = job % runs * RUN;
      float* out =
          workspace + (right ? layout.b : layout.a) + (block * layout.tiles + at + run) * o.lanes;
      const Place place(first + run, layout.width, layout.height);
      const int64_t some = least(RUN, count - run);
      if (o.of_x)
        pack_tiles<TileOfX<m, kernel>>(x, place, some, block * o.lanes, o.lanes, out, o.plane);
      else
        pack_tiles<TileOfGrad<m, kernel>>(grad, place, some, block * o.lanes, o.lanes, out,
                                          o.plane);
    });
  }

  static void add(const WeightGradient& op, const Layout& layout, float* workspace, int threads) {
    const int64_t total = op.images * layout.height * layout.width;
    for (int64_t first = 0; first < total;) {
      if (state_of(workspace).waiting == layout.tiles) flush(layout, workspace, threads);
      State state = state_of(workspace);
      const int64_t count = least(layout.tiles - state.waiting, total - first);
      pack(op, layout, workspace, first, count, state.waiting, threads);
      state.waiting += count, first += count;
      set_state(workspace, state);
    }
  }

  static void finish(const WeightGradient& op, const Layout& layout, float* workspace,
                     int threads) {
    const Operand &left = layout.left, &right = layout.right;
    const State state = state_of(workspace);
    if (state.waiting) flush(layout, workspace, threads);
    const bool empty = !state.waiting && !state.summed;  // no image came
    const Filters filters(op, right.of_x);
    const int64_t work = layout.points * left.channels * right.channels;
    parallel_for(right.blocks * left.blocks, work, threads, [&](int64_t job, int) {
      const int64_t panel = job / left.blocks, first = job % left.blocks * WIDTH;
      const int64_t last = least(first + WIDTH, left.channels);
      for (int64_t row = first; row < last; ++row)
        for (int64_t lane = 0; lane < PANEL; lane += WIDTH) {
          const int64_t column = panel * PANEL + lane, some = right.channels - column;
          if (some <= 0) break;
          float taps[kernel * kernel * WIDTH] = {};
          const int64_t at = (panel * layout.rows + row) * PANEL + lane;
          if (!empty) taps_of<m, kernel>(workspace + layout.sums + at, layout.plane, taps);
          filters.store<kernel>(row, column, least(some, WIDTH), taps);
        }
    });
  }
};

template <class Act>
void with_form(const WeightGradient& op, const Act& act) {
  if (op.algorithm == Algorithm::winograd_4) return act(Form<4, 3>{});
  if (op.algorithm == Algorithm::winograd_2) return act(Form<2, 3>{});
  if (op.kernel == 3) return act(Form<1, 3>{});
  return act(Form<1, 1>{});
}

}  // namespace

// The fewest cycles for 16 images by a count of vector operations and of the bytes of the sums.
// Shapes alone decide, so that results depend on neither batch nor threads.
Algorithm best_weight_gradient(int64_t c_in, int64_t c_out, int64_t height, int64_t width,
                               int64_t kernel, double) {
  constexpr double IMAGES = 16, BYTES = 8;  // bytes a cycle
  const auto vectors = [](int64_t channels) { return double(ceil_div(channels, WIDTH)); };
  const auto cost = [&](Algorithm algorithm) {
    WeightGradient op{};
    op.algorithm = algorithm, op.kernel = kernel, op.c_in = c_in, op.c_out = c_out;
    op.height = height, op.width = width;
    const Layout layout(op);
    const double points = double(layout.points), tiles = double(layout.height * layout.width);
    const double area = double(layout.rows * layout.right.blocks * VECTORS);
    const double of_x = points * (algorithm == Algorithm::direct ? 2 : 5);
    const double of_grad = algorithm == Algorithm::direct ? 2 : points * 4;
    return IMAGES * tiles * (points * area + of_x * vectors(c_in) + of_grad * vectors(c_out)) +
           points * area * (4 * WIDTH * 2 / BYTES);
  };
  if (kernel != 3) return Algorithm::direct;
  const double direct = cost(Algorithm::direct), two = cost(Algorithm::winograd_2);
  const double four = cost(Algorithm::winograd_4);
  if (direct <= two && direct <= four) return Algorithm::direct;
  return two <= four ? Algorithm::winograd_2 : Algorithm::winograd_4;
}

int64_t weight_gradient_workspace(const WeightGradient& op, int) { return Layout(op).size; }

void weight_gradient_begin(const WeightGradient&, float* workspace, int) {
  set_state(workspace, {0, 0});
}

void weight_gradient_add(const WeightGradient& op, float* workspace, int threads) {
  const Layout layout(op);
  with_form(op, [&](auto form) { form.add(op, layout, workspace, threads); });
}

void weight_gradient_finish(const WeightGradient& op, float* workspace, int threads) {
  const Layout layout(op);
  with_form(op, [&](auto form) { form.finish(op, layout, workspace, threads); });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
