// The two operands of a weight gradient's products: tiles of x and of grad, transformed and packed
// by channels, [plane][block of channels][tile][channel]. No products.
//
// A tile is m x m pixels of grad and the (m + kernel - 1)^2 pixels of x that its taps read.
// Winograd gives both as many planes, one for each point. The direct sum has tiles of one pixel:
// grad has one plane, and x one for each tap.
#pragma once
#include "place.h"
#include "winograd.h"

namespace fastddpm {
namespace {

struct Image {
  const float* data;
  int64_t rows, columns, pixel, channels;  // of all images
};

template <int m, int kernel>
struct TileOfX {
  static constexpr int SIDE = m + kernel - 1, STEP = m, PLANES = SIDE * SIDE;

  static void transform(const float* d, int64_t line, int64_t pixel, float* v, int64_t plane) {
    if constexpr (m > 1)
      transform_input<m>(d, line, pixel, v, plane);
    else
      for (int i = 0; i < SIDE; ++i)
        for (int j = 0; j < SIDE; ++j)
          store_vector(v + (i * SIDE + j) * plane, load_vector(d + i * line + j * pixel));
  }
};

template <int m, int kernel>
struct TileOfGrad {
  static constexpr int SIDE = m, STEP = m, PLANES = m > 1 ? (m + 2) * (m + 2) : 1;

  static void transform(const float* dy, int64_t line, int64_t pixel, float* u, int64_t plane) {
    if constexpr (m > 1)
      transform_gradient<m>(dy, line, pixel, u, plane);
    else
      store_vector(u, load_vector(dy));
  }
};

// G^T p G of the sums of products, one vector for each tap.
template <int m, int kernel>
inline void taps_of(const float* p, int64_t plane, float* taps) {
  if constexpr (m > 1)
    transform_filter<m>(p, plane, taps);
  else
    for (int tap = 0; tap < kernel * kernel; ++tap)
      store_vector(taps + tap * WIDTH, load_vector(p + tap * plane));
}

// The pixels of a tile, zeros where the image or its channels end.
template <int SIDE>
inline void copy_tile(const Image& image, const float* from, int64_t rows, int64_t columns,
                      int64_t channels, float* tile) {
  __builtin_memset(tile, 0, SIDE * SIDE * WIDTH * sizeof(float));
  for (int64_t i = 0; i < SIDE && i < rows; ++i)
    for (int64_t j = 0; j < SIDE && j < columns; ++j) {
      const float* pixel = from + (i * image.columns + j) * image.pixel;
      float* to = tile + (i * SIDE + j) * WIDTH;
      if (channels >= WIDTH)
        store_vector(to, load_vector(pixel));
      else
        for (int64_t c = 0; c < channels; ++c) to[c] = pixel[c];
    }
}

// `lanes` channels from `channel` on of `count` tiles from `place` on, to out + plane * p.
template <class Tile>
inline void pack_tiles(const Image& image, Place place, int64_t count, int64_t channel,
                       int64_t lanes, float* out, int64_t plane) {
  const int64_t line = image.columns * image.pixel;
  for (int64_t tile = 0; tile < count; ++tile, place.next(), out += lanes) {
    const int64_t top = place.y * Tile::STEP, left = place.x * Tile::STEP;
    const int64_t rows = image.rows - top, columns = image.columns - left;
    const float* from = image.data + (place.image * image.rows + top) * line + left * image.pixel;
    const bool whole = rows >= Tile::SIDE && columns >= Tile::SIDE;
    for (int64_t lane = 0; lane < lanes; lane += WIDTH) {
      const int64_t c = channel + lane, channels = image.channels - c;
      if (channels <= 0) {
        for (int64_t p = 0; p < Tile::PLANES; ++p) store_vector(out + p * plane + lane, Vector{});
      } else if (whole && channels >= WIDTH) {
        Tile::transform(from + c, line, image.pixel, out + lane, plane);
      } else {
        float copy[Tile::SIDE * Tile::SIDE * WIDTH];
        copy_tile<Tile::SIDE>(image, from + c, rows, columns, channels, copy);
        Tile::transform(copy, Tile::SIDE * WIDTH, WIDTH, out + lane, plane);
      }
    }
  }
}

}  // namespace
}  // namespace fastddpm
