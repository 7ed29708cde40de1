// What stands between two convolutions of a plan: channel statistics, GroupNorm's coefficients and
// the input of the next convolution. No products.
#include "../isa.h"
#include "../ops/dropout.h"
#include "../parallel.h"
#include "../simd.h"
#include "../view.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t RUN = 64;     // pixels in a partial sum
constexpr int64_t LANES = 4;    // vectors of channels at a time
constexpr int64_t PIECE = 256;  // channels that are rounded at a time

using fastddpm::madd;

inline Vector madd(Vector a, Vector b, Vector c) { return vector_madd(a, b, c); }

// Mean and sum of squares around it of COUNT vectors of channels, or of single channels: those of
// each run of pixels around its own mean, whose second reading is from the first cache, joined by
// Chan's formula.
template <class V, int COUNT>
void statistics_of(const float* x, int64_t pixels, int64_t channels, float* mean_out,
                   float* squares_out) {
  constexpr int64_t STEP = sizeof(V) / sizeof(float);
  V mean[COUNT] = {}, squares[COUNT] = {};
  for (int64_t first = 0; first < pixels; first += RUN) {
    const int64_t last = pixels - first < RUN ? pixels : first + RUN;
    const float inverse = 1.0f / float(last - first), share = float(last - first) / float(last);
    V centre[COUNT] = {}, a[COUNT] = {}, b[COUNT] = {};
    for (int64_t i = first; i < last; ++i)
      for (int v = 0; v < COUNT; ++v) {
        V value;
        __builtin_memcpy(&value, x + i * channels + v * STEP, sizeof value);
        centre[v] += value;
      }
    for (int v = 0; v < COUNT; ++v) centre[v] *= inverse;
    for (int64_t i = first; i < last; ++i)
      for (int v = 0; v < COUNT; ++v) {
        V d;
        __builtin_memcpy(&d, x + i * channels + v * STEP, sizeof d);
        d -= centre[v];
        a[v] += d;
        b[v] = madd(d, d, b[v]);
      }
    const V zero = {}, ones = zero + 1.0f;
    for (int v = 0; v < COUNT; ++v) {
      const V rest = a[v] * inverse, run = madd(-rest, a[v], b[v]);
      const V delta = (centre[v] - mean[v]) + rest;
      mean[v] = madd(delta, ones * share, mean[v]);
      squares[v] += run < zero ? zero : run;  // a NaN stays
      squares[v] = madd(delta * delta, ones * (share * float(first)), squares[v]);
    }
  }
  __builtin_memcpy(mean_out, mean, sizeof mean);
  __builtin_memcpy(squares_out, squares, sizeof squares);
}

void statistics_of(const float* x, int64_t pixels, int64_t channels, int64_t count, float* mean,
                   float* squares) {
  if (count == LANES * WIDTH)
    return statistics_of<Vector, LANES>(x, pixels, channels, mean, squares);
  int64_t c = 0;
  for (; c + WIDTH <= count; c += WIDTH)
    statistics_of<Vector, 1>(x + c, pixels, channels, mean + c, squares + c);
  for (; c < count; ++c) statistics_of<float, 1>(x + c, pixels, channels, mean + c, squares + c);
}

void coefficients_of(const GroupCoefficients& op, int64_t image) {
  const int64_t channels = op.channels[0] + op.channels[1], width = channels / op.groups;
  const auto at = [&](const float* const* statistic, int64_t c) -> double {
    const int64_t s = c >= op.channels[0];
    return statistic[s][image * op.channels[s] + (s ? c - op.channels[0] : c)];
  };
  for (int64_t first = 0; first < channels; first += width) {
    double mean = 0.0, squares = 0.0;
    for (int64_t c = first; c < first + width; ++c) mean += at(op.mean, c);
    mean /= double(width);
    for (int64_t c = first; c < first + width; ++c) {
      const double d = at(op.mean, c) - mean;
      squares += at(op.squares, c) + double(op.pixels) * d * d;
    }
    const double rstd = 1.0 / sqrt(squares / double(width * op.pixels) + double(op.eps));
    for (int64_t c = first; c < first + width; ++c) {
      double weight = double(op.weight[c]), bias = double(op.bias[c]);
      if (op.gain) {
        const double gain = 1.0 + double(op.gain[image * op.modulation + c]);
        weight *= gain, bias = bias * gain + double(op.addend[image * op.modulation + c]);
      }
      // What rounding the centre leaves of the mean is part of the shift.
      const double scale = weight * rstd, rest = double(float(mean)) - mean;
      op.centre[image * channels + c] = float(mean);
      op.scale[image * channels + c] = float(scale);
      op.shift[image * channels + c] = float(bias + rest * scale);
    }
  }
}

// ---- a row of a convolution's input ------------------------------------------------------------

template <class T>
void fill_zero(T* x, int64_t count) {
  __builtin_memset(x, 0, size_t(count) * sizeof(T));
}

void normalise(const float* __restrict x, int64_t channels, const float* __restrict centre,
               const float* __restrict scale, const float* __restrict shift, float* __restrict y) {
  int64_t c = 0;
  for (; c + WIDTH <= channels; c += WIDTH)
    store_vector(y + c, vector_madd(load_vector(x + c) - load_vector(centre + c),
                                    load_vector(scale + c), load_vector(shift + c)));
  for (; c < channels; ++c) y[c] = madd(x[c] - centre[c], scale[c], shift[c]);
}

void silu_run(float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = silu(x[i]);
}

// Elements `first` and on of an image's, before repetition.
void drop_run(const PrepareInput& op, int64_t image, int64_t first, int64_t count, float* x) {
  const Philox random = stream(op.dropout.random, image);
  uint32_t mask[CHUNK];
  for (int64_t done = 0; done < count; done += CHUNK) {
    const int64_t some = count - done < CHUNK ? count - done : CHUNK;
    draw_mask(random, op.dropout.threshold, first + done, 1, some, mask);
    for (int64_t i = 0; i < some; ++i)
      x[done + i] = drop(x[done + i], op.dropout.keep_scale, mask[i]);
  }
}

// Channels of a pixel: where their coefficients are, whose image, which of its elements.
struct Run {
  int64_t channels, coefficient, image, element;
};

// What stays float32 gets silu and dropout by whole rows.
void prepare_pixel(const PrepareInput& op, const float* x, const Run& run, float* out) {
  if (op.centre)
    normalise(x, run.channels, op.centre + run.coefficient, op.scale + run.coefficient,
              op.shift + run.coefficient, out);
  else
    __builtin_memcpy(out, x, size_t(run.channels) * sizeof(float));
}

void prepare_pixel(const PrepareInput& op, const float* x, const Run& run, BF16* out) {
  for (int64_t first = 0; first < run.channels; first += PIECE) {
    const int64_t count = run.channels - first < PIECE ? run.channels - first : PIECE;
    float piece[PIECE];
    prepare_pixel(op, x + first, {count, run.coefficient + first, run.image, 0}, piece);
    if (op.silu) silu_run(piece, count);
    if (op.dropout.threshold) drop_run(op, run.image, run.element + first, count, piece);
    narrow(piece, count, out + first);
  }
}

// Row y of an image that stays float32, each pixel `step` floats after the one before.
void activate_row(const PrepareInput& op, int64_t image, int64_t y, int64_t step, float* out) {
  const int64_t all = op.channels[0] + op.channels[1], first = y * op.width * all;
  const int64_t pixels = step == all ? op.width : 1, count = pixels * all;
  for (int64_t i = 0; i < op.width; i += pixels) {
    if (op.silu) silu_run(out + i * step, count);
    if (op.dropout.threshold) drop_run(op, image, first + i * all, count, out + i * step);
  }
}

// Row y of the sources to the inner part of a row of the output.
template <class T>
void prepare_row(const PrepareInput& op, int64_t image, int64_t y, T* out) {
  const int64_t all = op.channels[0] + op.channels[1], step = op.repeat * op.pixel;
  for (int64_t s = 0, c = 0; s < SOURCES && op.channels[s]; c += op.channels[s], ++s) {
    const float* x = op.source[s] + (image * op.height + y) * op.width * op.channels[s];
    for (int64_t i = 0; i < op.width; ++i)
      prepare_pixel(op, x + i * op.channels[s],
                    {op.channels[s], image * all + c, image, (y * op.width + i) * all + c},
                    out + c + i * step);
  }
  if (op.pixel > all)
    for (int64_t i = 0; i < op.width; ++i) fill_zero(out + i * step + all, op.pixel - all);
  if constexpr (sizeof(T) == sizeof(float)) activate_row(op, image, y, step, out);
  if (op.repeat > 1)
    for (int64_t i = 0; i < op.width; ++i)
      for (int64_t r = 1; r < op.repeat; ++r)
        __builtin_memcpy(out + i * step + r * op.pixel, out + i * step,
                         size_t(op.pixel) * sizeof(T));
}

void put(const float* x, int64_t count, float* out) {
  __builtin_memcpy(out, x, size_t(count) * sizeof(float));
}

void put(const float* x, int64_t count, BF16* out) { narrow(x, count, out); }

// The mean of the 2x2 pixels at x, `line` floats a row and `step` a pixel, each normalised and
// activated first.
void mean_of_square(const PrepareInput& op, const float* x, int64_t line, int64_t step,
                    const Run& run, float* mean) {
  for (int64_t c = 0; c < run.channels; ++c) mean[c] = 0.0f;
  const float* const corners[] = {x, x + step, x + line, x + line + step};
  for (const float* corner : corners) {
    float piece[PIECE];
    prepare_pixel(op, corner, run, piece);
    if (op.silu) silu_run(piece, run.channels);
    for (int64_t c = 0; c < run.channels; ++c) mean[c] += piece[c];
  }
  for (int64_t c = 0; c < run.channels; ++c) mean[c] *= 0.25f;
}

// Rows 2y and 2y + 1 of the sources to the inner part of a row of the output.
template <class T>
void halve_rows(const PrepareInput& op, int64_t image, int64_t y, T* out) {
  const int64_t all = op.channels[0] + op.channels[1];
  for (int64_t s = 0, c = 0; s < SOURCES && op.channels[s]; c += op.channels[s], ++s) {
    const int64_t own = op.channels[s], line = op.width * own;
    const float* x = op.source[s] + (image * op.height + 2 * y) * line;
    for (int64_t i = 0; i < op.width / 2; ++i)
      for (int64_t first = 0; first < own; first += PIECE) {
        const int64_t count = own - first < PIECE ? own - first : PIECE;
        float mean[PIECE];
        mean_of_square(op, x + 2 * i * own + first, line, own,
                       {count, image * all + c + first, image, 0}, mean);
        put(mean, count, out + i * op.pixel + c + first);
      }
  }
  if (op.pixel > all)
    for (int64_t i = 0; i < op.width / 2; ++i) fill_zero(out + i * op.pixel + all, op.pixel - all);
}

template <class T>
void prepare_rows(const PrepareInput& op, T* out, int threads) {
  const int64_t border = op.before + op.after, share = op.halve ? 2 : 1;
  const int64_t height = op.height / share;
  const int64_t columns = op.width / share * op.repeat + border, line = columns * op.pixel;
  const int64_t rows = height * op.repeat + border;
  parallel_for(op.images * height, op.images * rows * line, threads, [&](int64_t job, int) {
    const int64_t image = job / height, y = job % height;
    T* row = out + image * op.image + (op.before + y * op.repeat) * line;
    if (y == 0) fill_zero(row - op.before * line, op.before * line);
    if (border) {
      fill_zero(row, op.before * op.pixel);
      fill_zero(row + (columns - op.after) * op.pixel, op.after * op.pixel);
    }
    T* const inner = row + op.before * op.pixel;
    op.halve ? halve_rows(op, image, y, inner) : prepare_row(op, image, y, inner);
    for (int64_t r = 1; r < op.repeat; ++r)
      __builtin_memcpy(row + r * line, row, size_t(line) * sizeof(T));
    if (y == height - 1) fill_zero(row + op.repeat * line, op.after * line);
  });
}

}  // namespace

void channel_statistics(const ChannelStatistics& op, int threads) {
  const int64_t block = LANES * WIDTH, blocks = (op.channels + block - 1) / block;
  const int64_t elements = op.images * op.pixels * op.channels;
  parallel_for(op.images * blocks, elements, threads, [&](int64_t job, int) {
    const int64_t image = job / blocks, c = job % blocks * block;
    const int64_t count = op.channels - c < block ? op.channels - c : block;
    statistics_of(op.x + image * op.pixels * op.channels + c, op.pixels, op.channels, count,
                  op.mean + image * op.channels + c, op.squares + image * op.channels + c);
  });
}

void group_coefficients(const GroupCoefficients& op, int threads) {
  const int64_t work = op.images * (op.channels[0] + op.channels[1]) * 16;
  parallel_for(op.images, work, threads, [&](int64_t n, int) { coefficients_of(op, n); });
}

void prepare_input(const PrepareInput& op, int threads) {
  if (op.out)
    prepare_rows(op, op.out, threads);
  else
    prepare_rows(op, op.out_bf16, threads);
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
