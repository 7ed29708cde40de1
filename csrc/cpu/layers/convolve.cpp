// Convolutions of a plan, 1x1 and 3x3, from an input that has its border already.
//
// The direct sum walks rows of pixels with register tiles of 6 pixels by a panel of output
// channels. The Winograd forms turn the products of a 3x3 filter into TILE^2 small matrix products
// over blocks of tiles that stay in the cache. Bias and residual are added as the results leave the
// registers. An element's sum runs over the input in the layer's order, whatever block it is in.
#include "../isa.h"
#include "../parallel.h"
#include "gemm.h"
#include "place.h"
#include "winograd.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t PIXELS = 48;  // output pixels in a block of the direct sum: whole strips
constexpr int64_t TILES_MIN = 24, TILES_MAX = 48;  // tiles in a block, whole strips
constexpr int64_t TRANSFORMED = 48 * 1024;         // floats of a block's transformed input, about
constexpr int64_t STEP_BF16 = 32;  // channels: those of a bfloat16 pixel are whole steps

// y = sum + bias (+ residual) for a vector of a pixel's channels, as many as there are; bias: that
// of the pixel's image.
struct Epilogue {
  const float* residual;
  float* y;
  int64_t c_out;

  void operator()(const float* bias, int64_t pixel, int64_t c, Vector sum) const {
    if (c >= c_out) return;
    const int64_t at = pixel * c_out + c;
    if (c + WIDTH <= c_out) {
      sum += load_vector(bias + c);
      if (residual) sum += load_vector(residual + at);
      return store_vector(y + at, sum);
    }
    float values[WIDTH];
    store_vector(values, sum);
    for (int64_t j = 0; j < c_out - c; ++j) {
      const float v = values[j] + bias[c + j];
      y[at + j] = residual ? v + residual[at + j] : v;
    }
  }
};

// ---- the direct sum ----------------------------------------------------------------------------

// Of a block of pixels: where each one's filter begins, its second source and its image's bias.
struct Pixels {
  const float *x[PIXELS], *second[PIXELS], *bias[PIXELS];

  Pixels(const Convolve& op, int64_t first, int64_t count) {
    Place place(first, op.width, op.height);
    for (int64_t i = 0; i < count; ++i, place.next()) {
      const int64_t row = place.image * op.rows + place.y * op.stride;
      x[i] = op.x + (row * op.columns + place.x * op.stride) * op.pixel;
      second[i] = op.x_2 ? op.x_2 + (first + i) * op.c_in_2 : nullptr;
      bias[i] = op.bias + place.image * op.bias_image;
    }
  }
};

// Part of a panel of weights: the output channels c ..
struct Filters {
  const float* weight;
  int64_t width, rows, c;  // of the panel; the first channel
};

// `strips` strips of ROWS pixels from pixel `at` of the block on, which is pixel first + at of all.
template <int ROWS, int VECTORS>
void direct_strips(const Convolve& op, const Pixels& pixels, int64_t at, const Filters& filters,
                   int64_t first, const Epilogue& epilogue, int64_t strips, Ahead& ahead) {
  // A filter is `kernel` runs of kernel * c_in floats, `line` apart.
  const int64_t length = op.kernel * op.c_in, line = op.columns * op.pixel, width = filters.width;
  for (; strips > 0; --strips, at += ROWS) {
    Vector sum[ROWS][VECTORS];
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = Vector{};
    const float* weight = filters.weight;
    for (int64_t run = 0; run < op.kernel; ++run, weight += length * width) {
      const float* row[ROWS];
      for (int i = 0; i < ROWS; ++i) row[i] = pixels.x[at + i] + run * line;
      add_products<ROWS, VECTORS>(row, length, weight, width, ahead, sum);
    }
    if (op.x_2)
      add_products<ROWS, VECTORS>(pixels.second + at, op.c_in_2, weight, width, ahead, sum);
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < VECTORS; ++j)
        epilogue(pixels.bias[at + i], first + at + i, filters.c + j * WIDTH, sum[i][j]);
  }
}

template <int VECTORS>
void direct_block(const Convolve& op, const Pixels& pixels, const Filters& filters, int64_t first,
                  int64_t count, const Epilogue& epilogue) {
  using Strips = void (*)(const Convolve&, const Pixels&, int64_t, const Filters&, int64_t,
                          const Epilogue&, int64_t, Ahead&);
  static constexpr Strips last[STRIP - 1] = {direct_strips<1, VECTORS>, direct_strips<2, VECTORS>,
                                             direct_strips<3, VECTORS>, direct_strips<4, VECTORS>,
                                             direct_strips<5, VECTORS>};
  const int64_t whole = count / STRIP, rest = count % STRIP, rows = filters.rows;
  Ahead ahead = ahead_of<VECTORS>(filters.weight, rows, filters.width, (whole + (rest > 0)) * rows);
  direct_strips<STRIP, VECTORS>(op, pixels, 0, filters, first, epilogue, whole, ahead);
  if (rest) last[rest - 1](op, pixels, whole * STRIP, filters, first, epilogue, 1, ahead);
}

// Calls body(first channel, its panel's first channel, the panel's width, whether the whole of a
// wide panel is meant) for the output channels c_first .. c_last, whole times MIN_PANEL.
template <class Body>
void for_panels(const Convolve& op, int64_t c_first, int64_t c_last, const Body& body) {
  for (int64_t c = c_first; c < c_last;) {
    const int64_t panel = c / PANEL * PANEL, width = panel_width(op.c_out - panel);
    const bool whole = c == panel && width == PANEL && c + PANEL <= c_last;
    body(c, panel, width, whole);
    c += whole ? PANEL : MIN_PANEL;
  }
}

void direct(const Convolve& op, const Epilogue& epilogue, int64_t first, int64_t count,
            int64_t c_first, int64_t c_last) {
  const Pixels pixels(op, first, count);
  const int64_t rows = op.kernel * op.kernel * op.c_in + op.c_in_2;
  for_panels(op, c_first, c_last, [&](int64_t c, int64_t panel, int64_t width, bool whole) {
    const Filters filters{op.weight + panel * rows + c - panel, width, rows, c};
    (whole ? direct_block<WIDE> : direct_block<SLIM>)(op, pixels, filters, first, count, epilogue);
  });
}

// ---- Winograd ----------------------------------------------------------------------------------

int64_t tiles_at_once(int64_t pixel, int64_t points) {
  const int64_t fit = TRANSFORMED / (points * pixel) / STRIP * STRIP;
  return fit < TILES_MIN ? TILES_MIN : fit > TILES_MAX ? TILES_MAX : fit;
}

template <int m>
struct Block {
  static constexpr int TILE = Winograd<m>::TILE, POINTS = TILE * TILE;
  // Planes a cache line further apart than a power of two, which would share their cache sets.
  static int64_t input_plane(const Convolve& op) {
    return tiles_at_once(op.pixel, POINTS) * op.pixel + 16;
  }
  static int64_t product_plane(const Convolve& op) {
    return tiles_at_once(op.pixel, POINTS) * PANEL + 16;
  }
  static int64_t workspace(const Convolve& op) {
    return POINTS * (input_plane(op) + product_plane(op));
  }

  static void run(const Convolve& op, const Epilogue& epilogue, int64_t first, int64_t count,
                  int64_t c_first, int64_t c_last, float* workspace) {
    const Place start(first, ceil_div(op.width, m), ceil_div(op.height, m));
    const int64_t line = op.columns * op.pixel, plane = input_plane(op), part = product_plane(op);
    float *inputs = workspace, *products = workspace + POINTS * plane;
    Place place = start;
    for (int64_t i = 0; i < count; ++i, place.next()) {
      const float* x = op.x + (place.image * op.rows + place.y * m) * line + place.x * m * op.pixel;
      for (int64_t c = 0; c < op.c_in; c += WIDTH)
        transform_input<m>(x + c, line, op.pixel, inputs + i * op.pixel + c, plane);
    }
    for_panels(op, c_first, c_last, [&](int64_t c, int64_t panel, int64_t width, bool whole) {
      const float* weight = op.weight + panel * POINTS * op.c_in + c - panel;
      const int64_t size = op.c_in * width, columns = whole ? PANEL : MIN_PANEL;
      for (int64_t p = 0; p < POINTS; ++p)
        (whole ? multiply_panel<WIDE> : multiply_panel<SLIM>)(inputs + p * plane, op.pixel,
                                                              weight + p * size, width, count,
                                                              op.c_in, nullptr, products + p * part,
                                                              PANEL, columns);
      Place place = start;
      for (int64_t i = 0; i < count; ++i, place.next()) {
        const float* bias = op.bias + place.image * op.bias_image;
        const int64_t top = place.y * m, left = place.x * m;
        const int64_t below = op.height - top, right = op.width - left;
        const int64_t corner = (place.image * op.height + top) * op.width + left;
        for (int64_t j = 0; j < columns && c + j < op.c_out; j += WIDTH)
          transform_output<m>(products + i * PANEL + j, part, [&](int a, int b, Vector y) {
            if (a < below && b < right) epilogue(bias, corner + a * op.width + b, c + j, y);
          });
      }
    });
  }
};

// Calls body(first, count, first channel, last channel, thread) for blocks of `block` of `total`
// pixels or tiles, the channels of a block in parts where there are fewer blocks than threads.
template <class Body>
void for_blocks(const Convolve& op, int64_t total, int64_t block, int threads, const Body& body) {
  const int64_t blocks = ceil_div(total, block), panels = packed_columns(op.c_out) / MIN_PANEL;
  const int64_t parts = blocks >= 2 * threads ? 1 : least(panels, ceil_div(2 * threads, blocks));
  const int64_t work = op.images * op.height * op.width * op.c_out *
                       (op.c_in * op.kernel * op.kernel + op.c_in_2) / 64;
  parallel_for(blocks * parts, work, threads, [&](int64_t job, int thread) {
    const int64_t first = job / parts * block, part = job % parts;
    body(first, least(block, total - first), panels * part / parts * MIN_PANEL,
         panels * (part + 1) / parts * MIN_PANEL, thread);
  });
}

template <int m>
void winograd(const Convolve& op, const Epilogue& epilogue, float* workspace, int threads) {
  const int64_t total = op.images * ceil_div(op.height, m) * ceil_div(op.width, m);
  const int64_t size = Block<m>::workspace(op);
  for_blocks(op, total, tiles_at_once(op.pixel, Block<m>::POINTS), threads,
             [&](int64_t first, int64_t count, int64_t c_first, int64_t c_last, int thread) {
               Block<m>::run(op, epilogue, first, count, c_first, c_last,
                             workspace + thread * size);
             });
}

}  // namespace

// The fewest cycles for one image by a count of vector operations and of the bytes of weights that
// stream past where they are too many for the cache. Shapes alone decide, so that results depend on
// neither batch nor threads: two images are taken to share a stream, which costs one alone, and a
// large batch, a little.
// rate_bf16: products of bfloat16 in the time of one of float32, whose direct sum then takes the
// place of float32's; 0: everything is float32.
Algorithm best_algorithm(int64_t c_in, int64_t c_out, int64_t height, int64_t width,
                         double rate_bf16) {
  constexpr double BYTES = 8, CACHE = 2 * 1024 * 1024;  // bytes a cycle; bytes that stay
  constexpr double SHARED = 2;                          // images
  const double outputs = double(packed_columns(c_out) / WIDTH);
  const auto cost = [&](int64_t m) {
    const bool bf16 = !m && rate_bf16 > 0;
    const double inputs = double(bf16 ? round_up(c_in, STEP_BF16) : c_in);
    const double points = m ? double((m + 2) * (m + 2)) : 9.0;
    const double tiles = m ? double(ceil_div(height, m) * ceil_div(width, m)) : height * width;
    const double products = tiles * points * inputs * outputs / 2 / (bf16 ? rate_bf16 : 1.0);
    const double transforms =
        m ? tiles * points * 3 * (double(ceil_div(c_in, WIDTH)) + outputs) : 0.0;
    const double bytes = points * inputs * outputs * WIDTH * (bf16 ? 2 : 4);
    const double streaming = bytes > CACHE ? bytes / BYTES / SHARED : 0.0;
    return products + transforms + streaming;
  };
  const double direct = cost(0), two = cost(2), four = cost(4);
  if (direct <= two && direct <= four) return rate_bf16 > 0 ? Algorithm::bf16 : Algorithm::direct;
  return two <= four ? Algorithm::winograd_2 : Algorithm::winograd_4;
}

int64_t convolve_workspace(const Convolve& op, int threads) {
  return threads * (op.algorithm == Algorithm::winograd_2   ? Block<2>::workspace(op)
                    : op.algorithm == Algorithm::winograd_4 ? Block<4>::workspace(op)
                                                            : 0);
}

void convolve(const Convolve& op, float* workspace, int threads) {
  const Epilogue epilogue{op.residual, op.y, op.c_out};
  if (op.algorithm == Algorithm::winograd_2) return winograd<2>(op, epilogue, workspace, threads);
  if (op.algorithm == Algorithm::winograd_4) return winograd<4>(op, epilogue, workspace, threads);
  for_blocks(op, op.images * op.height * op.width, PIXELS, threads,
             [&](int64_t first, int64_t count, int64_t c_first, int64_t c_last, int) {
               direct(op, epilogue, first, count, c_first, c_last);
             });
}

int64_t vector_width() { return WIDTH; }

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
