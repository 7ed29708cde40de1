// Convolutions of a plan, 1x1 and 3x3, from an input that has its border already.
//
// The direct sum walks rows of pixels with register tiles of 6 pixels by 2 vectors of output
// channels. The Winograd forms turn the products of a 3x3 filter into TILE^2 small matrix products
// over blocks of tiles that stay in the cache. Bias and residual are added as the results leave the
// registers. An element's sum runs over the input in the layer's order, whatever block it is in.
#include "../isa.h"
#include "../parallel.h"
#include "gemm.h"
#include "winograd.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t PIXELS = 48;  // output pixels in a block of the direct sum: whole strips
constexpr int64_t TILES_MIN = 24, TILES_MAX = 48;  // tiles in a block, whole strips
constexpr int64_t TRANSFORMED = 48 * 1024;         // floats of a block's transformed input, about
constexpr int64_t STEP_BF16 = 32;  // channels: those of a bfloat16 pixel are whole steps

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// y = sum + bias (+ residual) for a vector of a pixel's channels, as many as there are.
struct Epilogue {
  const float* residual;
  float* y;
  int64_t c_out;

  void operator()(int64_t pixel, int64_t c, Vector sum, const float* bias) const {
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

// Where pixel or tile i of all images lies, counted up without a division.
struct Place {
  int64_t width, height, image, y, x;

  Place(int64_t i, int64_t width, int64_t height)
      : width(width),
        height(height),
        image(i / (width * height)),
        y(i / width % height),
        x(i % width) {}

  void next() {
    if (++x < width) return;
    x = 0;
    if (++y < height) return;
    y = 0, ++image;
  }
};

// ---- the direct sum ----------------------------------------------------------------------------

// `strips` strips of ROWS pixels. x[i]: where pixel i's filter begins, `kernel` runs of kernel *
// c_in floats, `line` apart; second: the pixels of the second source, or null; bias: of the pixels'
// images.
template <int ROWS>
void direct_strips(const Convolve& op, const float* const* x, const float* const* second,
                   const float* const* bias, const float* panel, int64_t pixel, int64_t c,
                   const Epilogue& epilogue, int64_t strips, Ahead& ahead) {
  const int64_t length = op.kernel * op.c_in, line = op.columns * op.pixel;
  for (; strips > 0; --strips, x += ROWS, bias += ROWS, pixel += ROWS) {
    Vector sum[ROWS][2];
    for (int i = 0; i < ROWS; ++i) sum[i][0] = sum[i][1] = Vector{};
    for (int64_t run = 0; run < op.kernel; ++run) {
      const float* row[ROWS];
      for (int i = 0; i < ROWS; ++i) row[i] = x[i] + run * line;
      add_products<ROWS>(row, length, panel + run * length * PANEL, ahead, sum);
    }
    if (second) {
      add_products<ROWS>(second, op.c_in_2, panel + op.kernel * length * PANEL, ahead, sum);
      second += ROWS;
    }
    for (int i = 0; i < ROWS; ++i) {
      epilogue(pixel + i, c, sum[i][0], bias[i]);
      epilogue(pixel + i, c + WIDTH, sum[i][1], bias[i]);
    }
  }
}

void direct(const Convolve& op, const Epilogue& epilogue, int64_t first, int64_t count,
            int64_t c_first, int64_t c_last) {
  using Strips =
      void (*)(const Convolve&, const float* const*, const float* const*, const float* const*,
               const float*, int64_t, int64_t, const Epilogue&, int64_t, Ahead&);
  static constexpr Strips last[STRIP - 1] = {direct_strips<1>, direct_strips<2>, direct_strips<3>,
                                             direct_strips<4>, direct_strips<5>};
  const float *x[PIXELS], *second[PIXELS], *bias[PIXELS];
  const int64_t line = op.columns * op.pixel;
  Place place(first, op.width, op.height);
  for (int64_t i = 0; i < count; ++i, place.next()) {
    x[i] = op.x + (place.image * op.rows + place.y * op.stride) * line +
           place.x * op.stride * op.pixel;
    second[i] = op.x_2 ? op.x_2 + (first + i) * op.c_in_2 : nullptr;
    bias[i] = op.bias + place.image * op.bias_image;
  }
  const int64_t rows = op.kernel * op.kernel * op.c_in + op.c_in_2;
  const int64_t whole = count / STRIP, done = whole * STRIP, rest = count - done;
  for (int64_t c = c_first; c < c_last; c += PANEL) {
    const float* panel = op.weight + c * rows;
    Ahead ahead(panel + rows * PANEL, rows * PANEL, (whole + (rest > 0)) * rows);
    direct_strips<STRIP>(op, x, op.x_2 ? second : nullptr, bias, panel, first, c, epilogue, whole,
                         ahead);
    if (rest)
      last[rest - 1](op, x + done, op.x_2 ? second + done : nullptr, bias + done, panel,
                     first + done, c, epilogue, 1, ahead);
  }
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
    const int64_t size = op.c_in * PANEL;
    for (int64_t c = c_first; c < c_last; c += PANEL) {
      const float* weight = op.weight + c / PANEL * POINTS * size;
      for (int64_t p = 0; p < POINTS; ++p)
        multiply(inputs + p * plane, op.pixel, weight + p * size, count, op.c_in, PANEL, nullptr,
                 products + p * part, PANEL);
      place = start;
      for (int64_t i = 0; i < count; ++i, place.next()) {
        const int64_t top = place.y * m, left = place.x * m;
        const int64_t rows = op.height - top, columns = op.width - left;
        const int64_t corner = (place.image * op.height + top) * op.width + left;
        const float* bias = op.bias + place.image * op.bias_image;
        for (int64_t half = 0; half < PANEL && c + half < op.c_out; half += WIDTH)
          transform_output<m>(products + i * PANEL + half, part, [&](int a, int b, Vector y) {
            if (a < rows && b < columns) epilogue(corner + a * op.width + b, c + half, y, bias);
          });
      }
    }
  }
};

// Calls body(first, count, first channel, last channel, thread) for blocks of `block` of `total`
// pixels or tiles, the channels of a block in parts where there are fewer blocks than threads.
template <class Body>
void for_blocks(const Convolve& op, int64_t total, int64_t block, int threads, const Body& body) {
  const int64_t blocks = ceil_div(total, block), panels = ceil_div(op.c_out, PANEL);
  const int64_t parts = blocks >= 2 * threads ? 1 : least(panels, ceil_div(2 * threads, blocks));
  const int64_t work = op.images * op.height * op.width * op.c_out *
                       (op.c_in * op.kernel * op.kernel + op.c_in_2) / 64;
  parallel_for(blocks * parts, work, threads, [&](int64_t job, int thread) {
    const int64_t first = job / parts * block, part = job % parts;
    body(first, least(block, total - first), panels * part / parts * PANEL,
         panels * (part + 1) / parts * PANEL, thread);
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
// neither batch nor threads: a large batch, whose images share the stream, gives up a little.
// rate_bf16: products of bfloat16 in the time of one of float32, whose direct sum then takes the
// place of float32's; 0: everything is float32.
Algorithm best_algorithm(int64_t c_in, int64_t c_out, int64_t height, int64_t width,
                         double rate_bf16) {
  constexpr double BYTES = 8, CACHE = 2 * 1024 * 1024;  // bytes a cycle; bytes that stay
  const double outputs = double(ceil_div(c_out, PANEL) * 2);
  const auto cost = [&](int64_t m) {
    const bool bf16 = !m && rate_bf16 > 0;
    const double inputs = double(bf16 ? round_up(c_in, STEP_BF16) : c_in);
    const double points = m ? double((m + 2) * (m + 2)) : 9.0;
    const double tiles = m ? double(ceil_div(height, m) * ceil_div(width, m)) : height * width;
    const double products = tiles * points * inputs * outputs / 2 / (bf16 ? rate_bf16 : 1.0);
    const double transforms =
        m ? tiles * points * 3 * (double(ceil_div(c_in, WIDTH)) + outputs) : 0.0;
    const double bytes = points * inputs * outputs * WIDTH * (bf16 ? 2 : 4);
    const double streaming = bytes > CACHE ? bytes / BYTES : 0.0;
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
