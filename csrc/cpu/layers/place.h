// Where the pixels or tiles of a batch of images lie. No arithmetic of values.
#pragma once
#include "../sizes.h"

namespace fastddpm {
namespace {

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

}  // namespace
}  // namespace fastddpm
