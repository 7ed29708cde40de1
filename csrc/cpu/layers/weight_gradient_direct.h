// The gradient of a convolution's weight as the sum over pixels that it is.
//
// A job owns some rows and columns of all taps' matrices and walks over the pixels alone: it packs
// a run of them at a time into its own part of the workspace, where they stay in the cache until
// they have met all rows. The pixels of a call begin a run.
#pragma once
#include "weight_gradient.h"

namespace fastddpm {
namespace {

// Channels of `count` pixels, [block of lanes][DEPTH pixels][lane], with zeros up to `padded`.
inline void pack_pixels(const float* const* pixels, int64_t count, int64_t offset, int64_t channels,
                        int64_t padded, int64_t lanes, float* out) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < padded; c += WIDTH) {
      const float* from = pixels[i] + offset + c;
      float* to = out + c / lanes * lanes * DEPTH + i * lanes + c % lanes;
      if (c + WIDTH <= channels) {
        store_vector(to, load_vector(from));
      } else {
        float part[WIDTH] = {};
        for (int64_t j = 0; j < channels - c; ++j) part[j] = from[j];
        store_vector(to, load_vector(part));
      }
    }
}

// Rows first_row .. last_row and panels from first_column to last_column of all matrices.
struct DirectPart {
  int64_t first_row, last_row, first_column, last_column;
};

// Fetches the pixels of the next run in parts, while this one is multiplied. Where a row of the
// image ends they lie a border further: then a few are missed.
struct NextRun {
  const float *const *left, *const *right;
  int64_t to_left, to_right;  // from a pixel of this run, floats
  int64_t rows, columns, calls, call = 0;

  void fetch() {
    for (int64_t i = DEPTH * call / calls; i < DEPTH * (call + 1) / calls; ++i) {
      for (int64_t c = 0; c < rows; c += 16) __builtin_prefetch(left[i] + to_left + c, 0, 2);
      for (int64_t c = 0; c < columns; c += 16) __builtin_prefetch(right[i] + to_right + c, 0, 2);
    }
    ++call;
  }
};

template <int VECTORS>
inline void add_pixels(const Sums& sums, const DirectPart& part, int64_t tap, int64_t column,
                       const float* a, const float* b, int64_t count, bool fresh, NextRun& next,
                       float* matrices) {
  float* to = matrices + sums.at(tap, part.first_row, column);
  for (int64_t row = part.first_row; row < part.last_row; row += ROWS) {
    if (tap == 0 && count == DEPTH) next.fetch();
    const int64_t at = row - part.first_row;
    const float* strip = a + at / WIDTH * WIDTH * DEPTH + at % WIDTH;
    (fresh ? add_strip<VECTORS, true> : add_strip<VECTORS, false>)(strip, b, count, to);
    to += ROWS * VECTORS * WIDTH;
  }
}

inline int64_t direct_workspace(const Sums& sums) {  // of a thread
  return DEPTH * (round_up(sums.rows, WIDTH) + round_up(sums.columns, PANEL));
}

inline void add_part(const WeightGradient& op, const Sums& sums, const DirectPart& part, bool fresh,
                     float* matrices, float* workspace) {
  const int64_t total = op.images * op.height * op.width;
  const int64_t rows = part.last_row - part.first_row;
  const int64_t columns = part.last_column - part.first_column;
  float *a = workspace, *b = workspace + DEPTH * round_up(rows, WIDTH);
  const float *x[DEPTH], *grad[DEPTH];
  const float *const *left = sums.columns_of_x ? grad : x, *const *right =
                                                               sums.columns_of_x ? x : grad;
  Place place(0, op.width, op.height);
  for (int64_t first = 0; first < total; first += DEPTH, fresh = false) {
    const int64_t count = least(DEPTH, total - first);
    for (int64_t i = 0; i < count; ++i, place.next()) {
      x[i] = op.x + ((place.image * op.rows + place.y) * op.columns + place.x) * op.pixel;
      grad[i] = op.grad + (first + i) * op.c_out;
    }
    NextRun next{left,
                 right,
                 part.first_row + DEPTH * (sums.columns_of_x ? op.c_out : op.pixel),
                 part.first_column + DEPTH * (sums.columns_of_x ? op.pixel : op.c_out),
                 rows,
                 columns,
                 ceil_div(rows, ROWS) * ceil_div(columns, PANEL)};
    for (int64_t tap = 0; tap < sums.points; ++tap) {
      const int64_t shift = (tap / op.kernel * op.columns + tap % op.kernel) * op.pixel;
      if (tap == 0 || !sums.columns_of_x)
        pack_pixels(left, count, part.first_row + (sums.columns_of_x ? 0 : shift), rows,
                    round_up(rows, WIDTH), WIDTH, a);
      if (tap == 0 || sums.columns_of_x)
        pack_pixels(right, count, part.first_column + (sums.columns_of_x ? shift : 0), columns,
                    packed_columns(columns), PANEL, b);
      for (int64_t c = 0; c < columns; c += PANEL)
        (panel_width(columns - c) == PANEL
             ? add_pixels<WIDE>
             : add_pixels<SLIM>)(sums, part, tap, part.first_column + c, a, b + c * DEPTH, count,
                                 fresh, next, matrices);
    }
  }
}

inline void add_direct(const WeightGradient& op, const Sums& sums, float* workspace, int threads) {
  const int64_t total = op.images * op.height * op.width, panels = sums.panels();
  if (!total) return;
  const bool fresh = !state_of(workspace).summed;
  const int64_t blocks = ceil_div(sums.rows, WIDTH), wanted = 2 * threads;
  const int64_t across = panels % wanted ? panels : wanted;  // parts of the columns
  const int64_t down = across >= wanted ? 1 : least(blocks, ceil_div(wanted, across));
  const int64_t work = total * sums.points * sums.rows * sums.columns / 64;
  float* own = sums_of(workspace) + sums.size();
  parallel_for(across * down, work, threads, [&](int64_t job, int thread) {
    const int64_t i = job / across, j = job % across;
    const DirectPart part{
        blocks * i / down * WIDTH, least(blocks * (i + 1) / down * WIDTH, sums.rows),
        panels * j / across * PANEL, least(panels * (j + 1) / across * PANEL, sums.columns)};
    add_part(op, sums, part, fresh, sums_of(workspace), own + thread * direct_workspace(sums));
  });
  set_state(workspace, {0, 1});
}

}  // namespace
}  // namespace fastddpm
