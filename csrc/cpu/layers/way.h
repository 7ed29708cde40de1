// How one convolution runs: its algorithm, chosen by its shape alone, how its input then has to
// lie, and its calls of the kernels. What a plan's layers and the op share.
#pragma once
#include "kernels.h"

namespace fastddpm {
namespace cpu {

// y = conv(x), x of (height, width) with each pixel repeated to a square of `repeat` by `repeat`,
// between `before` and `after` rows and columns of zeros.
struct Geometry {
  int64_t height, width, c_in, c_out, kernel, stride, before, after, repeat;

  // Of y; 0 or less where the kernel is larger than x.
  int64_t rows() const { return outputs(height); }
  int64_t columns() const { return outputs(width); }

 private:
  int64_t outputs(int64_t size) const {
    const int64_t room = size * repeat + before + after - kernel;
    return room < 0 ? 0 : room / stride + 1;
  }
};

enum class Asked { automatic, direct, winograd_2, winograd_4, bf16 };

struct Way {
  Geometry is;  // with `after` and `repeat` as prepare_input makes them
  int64_t y_height, y_width;
  Algorithm algorithm;
  bool repeated;          // the kernel repeats the pixels, not prepare_input
  int64_t pixel, image;   // values of a pixel of the prepared input, and of an image of it
  int64_t weight_floats;  // packed

  // Whether packed weights of the one are those of the other.
  bool same_weight(const Way& other) const {
    return algorithm == other.algorithm && repeated == other.repeated && is.c_in == other.is.c_in &&
           is.c_out == other.is.c_out && is.kernel == other.is.kernel;
  }

  bool rounded() const { return algorithm == Algorithm::bf16; }

  // Whether the sources can be read as they are, if nothing is done to their values.
  bool reads_sources() const {
    return !rounded() && is.kernel == 1 && is.stride == 1 && !is.before && !is.after &&
           is.repeat == 1;
  }

  int64_t prepared_floats() const { return rounded() ? (image + 1) / 2 : image; }  // an image's
};

// bf16: products of bfloat16 operands are allowed, where they are the fastest.
Way way_of(const Kernels&, const Geometry&, bool bf16, Asked asked = Asked::automatic);

// For an input alone, every pixel and every border in it: what the weight's gradient reads.
Way way_of_input(const Geometry&, bool rounded);

void pack(const Kernels&, const Way&, const Weight&, float* packed, int threads);

// repeat, border and layout; sources and coefficients are the caller's.
PrepareInput preparation(const Way&, int64_t images);

// Into `prepared`, prepared_floats() an image, as the way's kernels read it.
void prepare(const Kernels&, const Way&, PrepareInput, float* prepared, int threads);

struct Operands {
  const float *x, *weight;  // prepared, or the first source; packed
  const float* x_2;         // the second source and its channels, where sources are read as they
  int64_t c_in_2;           // are; or null and 0
  const float* bias;        // (c_out,)
  int64_t bias_image;       // floats from an image's bias to the next one's; 0: all have the same
  const float* residual;    // or null
  float* y;
};

int64_t workspace(const Kernels&, const Way&, int64_t images, int64_t c_in_2, int threads);
void convolve(const Kernels&, const Way&, int64_t images, const Operands&, float* workspace,
              int threads);

}  // namespace cpu
}  // namespace fastddpm
