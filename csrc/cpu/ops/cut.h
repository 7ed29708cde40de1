// How images are cut for the ops that treat each channel its own way, and their walk.
//
// A sample is a sequence of elements, in memory order where that is NHWC and else in (C, H, W)
// order, and is cut into blocks: some pixels of it, or one channel. A block is walked in lines of
// 64 or more elements, with every coefficient spread out to one value per element of a line, so
// that the same vectorised loops serve every channel count and layout. The cut depends on the
// shape alone.
//
// The channels may be those of two tensors, one after the other: each is walked by itself, in lines
// of its own.
#pragma once
#include "../parallel.h"
#include "../sizes.h"
#include "../view.h"

namespace fastddpm {
namespace {

constexpr int64_t BLOCK = 16 * 1024;  // elements in a block of pixels, about
constexpr int64_t PIXEL_LINE = 256;   // elements in a line of pixels, at least
constexpr int64_t PLANE_LINE = 64;    // elements in a line of one channel, at most
constexpr int64_t PLANE_STEP = 16;    // which such a line is a multiple of

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Channels `from` and on of a tensor.
inline Tensor channels_from(Tensor x, int64_t from) {
  x.data = static_cast<char*>(x.data) + from * x.stride[1] * element_size(x.dtype);
  return x;
}

struct Source {  // one tensor's channels of the images
  Tensor x;
  Shape shape;      // of x
  int64_t index;    // 0, or 1 for the second
  int64_t channel;  // the first of them, in the images
  int64_t line;     // elements in a line
  int64_t step;     // elements that are loaded at once: whole lines
};

struct Span {  // elements of a source
  int64_t first, count;
};

struct Cut {
  int64_t samples, channels, plane;
  Order order;
  int64_t pixels, blocks;  // of a block; in a sample
  int64_t width;           // channels that a block touches: all, or one
  int64_t sources;         // one or two
  Source source[2];
  int64_t row, step;  // the longest line or list of a block's channels; the longest step

  // x, and the channels that follow its own, if any.
  Cut(const Shape& shape, const Tensor& x, int64_t c1, const Tensor& x2)
      : samples(shape.n), channels(shape.c), plane(shape.h * shape.w), sources(0) {
    const int64_t c2 = channels - c1;
    const bool last = c1 > 1 || !c2 ? channels_last(x, {shape.n, c1, shape.h, shape.w})
                                    : channels_last(x2, {shape.n, c2, shape.h, shape.w});
    order = last ? Order::hwc : Order::chw;
    if (last) {
      const int64_t line = line_of(channels);
      pixels = (line < BLOCK ? BLOCK / line * line : line) / channels;
      blocks = (plane + pixels - 1) / pixels;
      width = channels;
    } else {
      pixels = plane;
      blocks = channels;
      width = 1;
    }
    row = width, step = 0;
    add(x, shape, 0, c1);
    add(x2, shape, c1, c2);
  }

  Cut(const Shape& shape, const Tensor& x) : Cut(shape, x, shape.c, Tensor{}) {}

  int64_t elements() const { return samples * channels * plane; }

  // How many threads find work.
  int64_t team(int threads) const {
    return elements() < SERIAL_ELEMENTS ? 1 : least(threads, samples * blocks);
  }

  // Whether each thread takes whole samples; else all share the blocks of one phase after another.
  bool whole_samples(int threads) const {
    return samples % threads == 0 || samples >= 4 * threads || elements() < SERIAL_ELEMENTS;
  }

  int64_t pixels_of(int64_t b) const {
    return order == Order::chw ? plane : least(pixels, plane - b * pixels);
  }

  // What block b has of a source.
  Span span(const Source& s, int64_t b) const {
    if (order == Order::chw) return {(b - s.channel) * plane, plane};
    return {b * pixels * s.shape.c, pixels_of(b) * s.shape.c};
  }

  // Calls body(source) for each source that has a part of block b.
  template <class Body>
  void for_sources(int64_t b, const Body& body) const {
    for (int64_t i = 0; i < sources; ++i) {
      const Source& s = source[i];
      if (order == Order::hwc || (b >= s.channel && b < s.channel + s.shape.c)) body(s);
    }
  }

  // Calls body(source, first, count) for every step of all sources in block b, pixel by pixel
  // about.
  template <class Body>
  void for_steps(int64_t b, const Body& body) const {
    if (order == Order::chw || sources == 1)
      return for_sources(b, [&](const Source& s) {
        for_steps(s, b, [&](int64_t first, int64_t count) { body(s, first, count); });
      });
    const int64_t end = b * pixels + pixels_of(b);
    int64_t at_once = pixels;
    for (const Source& s : source) at_once = least(at_once, s.step / s.shape.c);
    for (int64_t pixel = b * pixels; pixel < end; pixel += at_once)
      for (const Source& s : source)
        body(s, pixel * s.shape.c, least(at_once, end - pixel) * s.shape.c);
  }

  // Calls body(first, count) for every step of a source in block b.
  template <class Body>
  void for_steps(const Source& s, int64_t b, const Body& body) const {
    const Span all = span(s, b);
    for (int64_t done = 0; done < all.count; done += s.step)
      body(all.first + done, least(s.step, all.count - done));
  }

  // A value per channel of a block, from its first channel on, repeated along a line of a source.
  const float* repeat(const Source& s, const float* values, float* line) const {
    if (order == Order::chw)
      for (int64_t i = 0; i < s.line; ++i) line[i] = *values;
    else
      for (int64_t at = 0; at < s.line; at += s.shape.c)
        __builtin_memcpy(line + at, values + s.channel, size_t(s.shape.c) * sizeof(float));
    return line;
  }

 private:
  static int64_t line_of(int64_t channels) {
    return channels * (channels < PIXEL_LINE ? PIXEL_LINE / channels : 1);
  }

  void add(const Tensor& x, const Shape& shape, int64_t channel, int64_t count) {
    if (count == 0) return;
    const int64_t line =
        order == Order::hwc ? line_of(count)
                            : least(PLANE_LINE, (plane - 1) / PLANE_STEP * PLANE_STEP + PLANE_STEP);
    const int64_t whole = line < CHUNK ? CHUNK / line * line : line;
    source[sources] = {x, {shape.n, count, shape.h, shape.w}, sources, channel, line, whole};
    ++sources;
    row = most(row, line), step = most(step, whole);
  }
};

// ---- a value per channel
// -------------------------------------------------------------------------

// Row n of a matrix, or `missing` where it is not given.
inline void read(const Matrix& m, int64_t n, int64_t channels, float missing,
                 float* __restrict out) {
  if (m.data)
    load({static_cast<char*>(m.data) + n * m.stride_n * element_size(m.dtype),
          m.dtype,
          {1, 1, channels},
          {0, 0, m.stride_c}},
         0, channels, out);
  else
    for (int64_t c = 0; c < channels; ++c) out[c] = missing;
}

inline float element(const Matrix& m, int64_t n, int64_t c, float missing) {
  if (!m.data) return missing;
  const int64_t at = n * m.stride_n + c * m.stride_c;
  switch (m.dtype) {
    case DType::bf16:
      return to_float(static_cast<const BF16*>(m.data)[at]);
    case DType::f16:
      return to_float(static_cast<const F16*>(m.data)[at]);
    default:
      return static_cast<const float*>(m.data)[at];
  }
}

// The values of the channels of block b; 0 from channel `given` on, and where there is no matrix.
inline const float* read_block(const Cut& cut, const Matrix& m, int64_t given, int64_t n, int64_t b,
                               float* out) {
  if (cut.order == Order::chw) {
    *out = b < given ? element(m, n, b, 0.0f) : 0.0f;
    return out;
  }
  read(m, n, given, 0.0f, out);
  for (int64_t c = given; c < cut.channels; ++c) out[c] = 0.0f;
  return out;
}

// ---- u = x + before + residual
// -------------------------------------------------------------------

// One step of a source: the sum, rounded to the type of u, is written there and returned as it
// was written, in u itself or in `out`. before: along a line; x and residual have a buffer each.
inline const float* sum_step(const Source& s, const View& x, const View* residual, const View& u,
                             const float* before, int64_t first, int64_t count, float* x_buffer,
                             float* residual_buffer, float* out) {
  const float* a = floats(x, first, count, x_buffer);
  const float* b = residual ? floats(*residual, first, count, residual_buffer) : nullptr;
  float* const elements = direct(u, first);
  float* const sum = elements ? elements : out;
  for (int64_t at = 0; at < count; at += s.line) {
    const int64_t length = least(s.line, count - at);
    if (b)
      fill(sum + at, length, [&](int64_t i) { return (a[at + i] + before[i]) + b[at + i]; });
    else
      fill(sum + at, length, [&](int64_t i) { return a[at + i] + before[i]; });
  }
  if (elements) return elements;
  store(u, first, count, sum);
  if (u.dtype != DType::f32) load(u, first, count, out);
  return out;
}

}  // namespace
}  // namespace fastddpm
