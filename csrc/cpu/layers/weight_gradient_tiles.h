// The operands of a weight gradient's products in Winograd's domain: tiles of x and of grad,
// transformed and packed by channels. No products.
//
// A tile is m x m pixels of grad and the (m + 2) x (m + 2) pixels of x that its taps read; both
// become (m + 2)^2 planes, one for each point.
#pragma once
#include "place.h"
#include "winograd.h"

namespace fastddpm {
namespace {

struct Image {
  const float* data;
  int64_t rows, columns, pixel, channels;  // of all images
};

template <int m>
struct TileOfX {
  static constexpr int SIDE = m + 2, STEP = m;
  static constexpr auto transform = transform_input<m>;
};

template <int m>
struct TileOfGrad {
  static constexpr int SIDE = m, STEP = m;
  static constexpr auto transform = transform_gradient<m>;
};

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

// Where a tile's channels go: blocks of `lanes` of them, [plane][block][tile][lane]; `padded`:
// channels with the zeros that are added.
struct Packing {
  int64_t lanes, padded, block, planes, plane;
};

// All channels of `count` tiles from `place` on.
template <class Tile>
inline void pack_tiles(const Image& image, Place place, int64_t count, const Packing& packing,
                       float* out) {
  const int64_t line = image.columns * image.pixel;
  for (int64_t tile = 0; tile < count; ++tile, place.next(), out += packing.lanes) {
    const int64_t top = place.y * Tile::STEP, left = place.x * Tile::STEP;
    const int64_t rows = image.rows - top, columns = image.columns - left;
    const float* from = image.data + (place.image * image.rows + top) * line + left * image.pixel;
    const bool whole = rows >= Tile::SIDE && columns >= Tile::SIDE;
    for (int64_t c = 0; c < packing.padded; c += WIDTH) {
      float* to = out + c / packing.lanes * packing.block + c % packing.lanes;
      const int64_t channels = image.channels - c;
      if (channels <= 0) {
        for (int64_t p = 0; p < packing.planes; ++p) store_vector(to + p * packing.plane, Vector{});
      } else if (whole && channels >= WIDTH) {
        Tile::transform(from + c, line, image.pixel, to, packing.plane);
      } else {
        float copy[Tile::SIDE * Tile::SIDE * WIDTH];
        copy_tile<Tile::SIDE>(image, from + c, rows, columns, channels, copy);
        Tile::transform(copy, Tile::SIDE * WIDTH, WIDTH, to, packing.plane);
      }
    }
  }
}

}  // namespace
}  // namespace fastddpm
