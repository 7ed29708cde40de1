// Latents and pixels of images on the stack of rans.h. `backwards` takes them from the last to the
// first: a push that way is undone by a pop that goes forwards, and the other way round.
#pragma once
#include <cstdint>

#include "rans.h"

namespace fastddpm {
namespace codec {

enum class Status {
  done,
  exhausted,   // a pop found no more words
  not_finite,  // a mean or a variance
  off_grid,    // a value is no point of the grid, or lies beyond float32's exact integers
  outside,     // a value that none can have been coded as: the stack is not the encoder's
};

struct Gaussians {  // a normal distribution each, on the grid of 2^exponent
  int64_t count;
  const float* mean;
  const float* log_variance;  // (count,), or null: `common`
  double common;
  int exponent;
  bool outside;  // values far from the mean are coded, by an escape; else there are none
  bool backwards;
};

Status push(Rans& rans, const Gaussians& of, const float* values);
Status pop(Rans& rans, const Gaussians& of, float* values);

// The 256 levels of Eq. 13; `exponent` and `outside` are not read.
Status push_levels(Rans& rans, const Gaussians& of, const uint8_t* pixels);
Status pop_levels(Rans& rans, const Gaussians& of, uint8_t* pixels);

}  // namespace codec
}  // namespace fastddpm
