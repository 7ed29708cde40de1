// What group_norm_silu and its gradient share: the walk over a sample, sums, statistics.
//
// A sample is a sequence of elements, in memory order where that is NHWC and else in (C, H, W)
// order, and is cut into blocks: some pixels of it, or one channel. A block is walked in lines of
// 64 or more elements, with every coefficient spread out to one value per element of a line, so
// that the same vectorised loops serve every channel count and layout. Sums run in float32 over a
// block, around its own mean, and in float64, in block order, over blocks. The cut depends on the
// shape alone, so the bits do not depend on the thread count.
#pragma once
#include "isa.h"
#include "parallel.h"
#include "view.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t BLOCK = 16 * 1024;  // elements in a block of pixels, about
constexpr int64_t PIXEL_LINE = 256;   // elements in a line of pixels, at least
constexpr int64_t PLANE_LINE = 64;    // elements in a line of one channel, at most
constexpr int64_t PLANE_STEP = 16;    // which such a line is a multiple of

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Cut {
  int64_t samples, channels, plane;
  Order order;
  int64_t line, block, blocks;  // elements in a line and in a block; blocks in a sample
  int64_t width;                // channels that a block touches: all, or one
  int64_t step;                 // elements that are loaded at once: whole lines

  Cut(const Shape& shape, const Tensor& x)
      : samples(shape.n), channels(shape.c), plane(shape.h * shape.w) {
    order = channels_last(x, shape) ? Order::hwc : Order::chw;
    if (order == Order::hwc) {
      line = channels * (channels < PIXEL_LINE ? PIXEL_LINE / channels : 1);
      block = line < BLOCK ? BLOCK / line * line : line;
      blocks = (channels * plane + block - 1) / block;
      width = channels;
    } else {
      line = least(PLANE_LINE, (plane - 1) / PLANE_STEP * PLANE_STEP + PLANE_STEP);
      block = plane;
      blocks = channels;
      width = 1;
    }
    step = line < CHUNK ? CHUNK / line * line : line;
  }

  int64_t elements() const { return samples * channels * plane; }

  // How many threads find work.
  int64_t team(int threads) const {
    return elements() < SERIAL_ELEMENTS ? 1 : least(threads, samples * blocks);
  }

  // Whether each thread takes whole samples; else all share the blocks of one phase after another.
  bool whole_samples(int threads) const {
    return samples % threads == 0 || samples >= 4 * threads || elements() < SERIAL_ELEMENTS;
  }

  int64_t first(int64_t b) const { return b * block; }
  int64_t count(int64_t b) const { return least(block, channels * plane - b * block); }
};

// ---- loops over a line -------------------------------------------------------------------------

void add(const float* __restrict x, int64_t lines, int64_t line, float* __restrict sum) {
  for (; lines >= 4; lines -= 4, x += 4 * line)
    for (int64_t i = 0; i < line; ++i)
      sum[i] += (x[i] + x[i + line]) + (x[i + 2 * line] + x[i + 3 * line]);
  for (; lines > 0; --lines, x += line)
    for (int64_t i = 0; i < line; ++i) sum[i] += x[i];
}

void add_centred(const float* __restrict x, int64_t lines, int64_t line,
                 const float* __restrict centre, float* __restrict sum, float* __restrict squares) {
  for (; lines >= 2; lines -= 2, x += 2 * line)
    for (int64_t i = 0; i < line; ++i) {
      const float d = x[i] - centre[i], e = x[i + line] - centre[i];
      sum[i] += d + e;
      squares[i] = madd(d, d, madd(e, e, squares[i]));
    }
  for (; lines > 0; --lines, x += line)
    for (int64_t i = 0; i < line; ++i) {
      const float d = x[i] - centre[i];
      sum[i] += d;
      squares[i] = madd(d, d, squares[i]);
    }
}

// v = (x - centre) scale + shift is the argument of silu.
struct Line {
  const float *centre, *scale, *shift;
};

// ---- one call ----------------------------------------------------------------------------------

// Row n of a matrix, or `missing` where it is not given.
void read(const Matrix& m, int64_t n, int64_t channels, float missing, float* __restrict out) {
  if (m.data)
    load({static_cast<char*>(m.data) + n * m.stride_n * element_size(m.dtype),
          m.dtype,
          {1, 1, channels},
          {0, 0, m.stride_c}},
         0, channels, out);
  else
    for (int64_t c = 0; c < channels; ++c) out[c] = missing;
}

float element(const Matrix& m, int64_t n, int64_t c, float missing) {
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

constexpr int64_t PARTS = 3;  // sum, second sum and means of a block

enum Row { CENTRE, SCALE, SHIFT, SLOPE, OFFSET, SUM, SECOND, ROWS };  // of the scratch of a thread

class Pass {
 public:
  // dx: of the gradient, if it is that
  Pass(const GroupNormSilu& op, int threads, const Tensor* dx = nullptr)
      : op(op),
        cut(op.shape, op.x),
        whole(cut.whole_samples(threads)),
        per_group(op.shape.c / op.groups),
        memory(2 * statistics() + sums() + all_coefficients() +
                   cut.team(threads) * (ROWS * cut.line + 3 * cut.step) +
                   (dx && !is_run_of<float>(*dx, op.shape, cut.order) ? gradients(threads) : 0),
               false),
        rest(memory.data),
        rstd(rest + statistics()),
        partial(rstd + statistics()),
        coefficients(partial + sums()),
        scratch(coefficients + all_coefficients()),
        kept(scratch + cut.team(threads) * (ROWS * cut.line + 3 * cut.step)) {}

  const GroupNormSilu& op;
  const Cut cut;
  const bool whole;
  const int64_t per_group;

  // ---- the phases: a block's work, then what follows from all blocks of a sample ----

  // A block's sums around its own means, while it is in the cache.
  void statistics_block(int64_t n, int64_t b, int thread) {
    float* sum = clear(thread, SUM);
    walk(n, b, thread, [&](const float* x, int64_t, int64_t count) {
      add(x, count / cut.line, cut.line, sum);
      add(x + count / cut.line * cut.line, 1, count % cut.line, sum);
    });
    float *block_sum = part(n, b, 0), *centre = part(n, b, 2);
    fold(sum, block_sum);
    const int64_t channels = cut.width == 1 ? 1 : per_group;
    const float scale = float(1.0 / double(channels * cut.count(b) / cut.width));
    for (int64_t first = 0; first < cut.width; first += channels) {
      float group = 0.0f;
      for (int64_t c = first; c < first + channels; ++c) group += block_sum[c];
      for (int64_t c = first; c < first + channels; ++c) centre[c] = group * scale;
    }

    float* squares = clear(thread, SECOND);
    const float* centres = repeat(centre, row(thread, CENTRE));
    clear(thread, SUM);
    walk(n, b, thread, [&](const float* x, int64_t, int64_t count) {
      add_centred(x, count / cut.line, cut.line, centres, sum, squares);
      add_centred(x + count / cut.line * cut.line, 1, count % cut.line, centres, sum, squares);
    });
    fold(sum, block_sum);
    fold(squares, part(n, b, 1));
  }

  void statistics_finish(int64_t n) {
    // Weight, bias and modulation, the latter where slope and offset will be.
    float* __restrict scale = coefficient(n, SCALE);
    float* __restrict shift = coefficient(n, SHIFT);
    float* __restrict gain = coefficient(n, SLOPE);
    float* __restrict addend = coefficient(n, OFFSET);
    read(op.weight, 0, op.shape.c, 1.0f, scale);
    read(op.bias, 0, op.shape.c, 0.0f, shift);
    read(op.scale, n, op.shape.c, 0.0f, gain);
    read(op.shift, n, op.shape.c, 0.0f, addend);
    for (int64_t g = 0; g < op.groups; ++g) {
      // Blocks are joined as by Chan et al.; then what rounding the mean to float32 leaves of it.
      const double origin = centre_of(n, g);
      double sum = 0.0, squares = 0.0;
      for_parts(n, g, [&](double count, double centre, double part_sum, double) {
        sum += count * (centre - origin) + part_sum;
      });
      const double offset = sum / elements(), mean = origin + offset;
      for_parts(n, g, [&](double count, double centre, double part_sum, double part_squares) {
        const double from_mean = centre - origin - offset;
        squares += part_squares + from_mean * (2.0 * part_sum + count * from_mean);
      });
      const double raw = squares / elements(), variance = raw < 0.0 ? 0.0 : raw;
      const float rounded = float(mean);
      const double left = mean - double(rounded);
      const int64_t at = n * op.groups + g;
      const float remainder = float(left), r = float(1.0 / sqrt(variance + double(op.eps)));
      rest[at] = remainder;
      rstd[at] = r;
      if (op.mean) op.mean[at] = rounded;
      if (op.rstd) op.rstd[at] = r;
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
        coefficient(n, CENTRE)[c] = rounded;
        scale[c] = r * scale[c] * (1.0f + gain[c]);
        shift[c] = madd(-remainder, scale[c], madd(1.0f + gain[c], shift[c], addend[c]));
      }
    }
  }

 protected:
  Scratch<float> memory;  // of all that follows: five allocations would outlast a small call
  float *const rest, *const rstd;  // (N, G): what float32 left of the mean; 1 / sqrt(var + eps)
  float* const partial;       // (N, blocks, PARTS, width): the sums over a block, and its means
  float* const coefficients;  // (N, OFFSET + 1, C)
  float* const scratch;       // (threads, ROWS lines and 3 buffers of step elements)
  float* const kept;          // (threads or N, elements of a sample): g where dx can't hold it

  int64_t statistics() const { return op.shape.n * op.groups; }
  int64_t sums() const { return op.shape.n * cut.blocks * PARTS * cut.width; }
  int64_t all_coefficients() const { return op.shape.n * (OFFSET + 1) * op.shape.c; }

  int64_t gradients(int threads) const {
    return (whole ? cut.team(threads) : cut.samples) * cut.channels * cut.plane;
  }

  double elements() const { return double(per_group * cut.plane); }

  float* coefficient(int64_t n, Row row) {
    return coefficients + (n * (OFFSET + 1) + row) * op.shape.c;
  }

  float* row(int thread, Row row) {
    return scratch + thread * (ROWS * cut.line + 3 * cut.step) + row * cut.line;
  }

  float* buffer(int thread, int which) { return row(thread, ROWS) + which * cut.step; }

  // Sample n + 1, if this thread takes it next and it is a single run, else null.
  const char* following(const Tensor& tensor, int64_t n) const {
    if (!whole || n + 1 == cut.samples) return nullptr;
    const View v = view(tensor, op.shape, n + 1, cut.order);
    return v.size[1] == 1 && v.stride[2] == 1 ? v.data : nullptr;
  }

  // Starts to bring elements into the cache while the processor computes.
  static void fetch(const char* run, DType dtype, int64_t first, int64_t count) {
    if (!run) return;
    const int64_t size = element_size(dtype);
    for (int64_t at = first * size; at < (first + count) * size; at += 64)
      __builtin_prefetch(run + at, 0, 2);
  }

  // Where g of the elements from `first` on is kept: in dx if that holds float32.
  float* gradient(const View& dx, int64_t n, int thread, int64_t first) {
    if (float* elements = direct(dx, first)) return elements;
    return kept + (whole ? thread : n) * cut.channels * cut.plane + first;
  }

  float* clear(int thread, Row which) {
    float* line = row(thread, which);
    for (int64_t i = 0; i < cut.line; ++i) line[i] = 0.0f;
    return line;
  }

  float* part(int64_t n, int64_t b, int which) const {
    return partial + ((n * cut.blocks + b) * PARTS + which) * cut.width;
  }

  // The values of a block's channels, repeated along a line.
  const float* repeat(const float* values, float* line) const {
    if (cut.width == 1)
      for (int64_t i = 0; i < cut.line; ++i) line[i] = *values;
    else
      for (int64_t at = 0; at < cut.line; at += cut.channels)
        __builtin_memcpy(line + at, values, size_t(cut.channels) * sizeof(float));
    return line;
  }

  // The coefficients of the block's channels along a line.
  const float* spread(int64_t n, int64_t b, int thread, Row which) {
    return repeat(coefficient(n, which) + (cut.width == 1 ? b : 0), row(thread, which));
  }

  Line argument(int64_t n, int64_t b, int thread) {
    return {spread(n, b, thread, CENTRE), spread(n, b, thread, SCALE), spread(n, b, thread, SHIFT)};
  }

  // Calls body(x, first, count) for every step of block b.
  template <class Body>
  void walk(int64_t n, int64_t b, int thread, const Body& body) {
    const View x = view(op.x, op.shape, n, cut.order);
    const int64_t end = cut.first(b) + cut.count(b);
    for (int64_t first = cut.first(b); first < end; first += cut.step) {
      const int64_t count = least(cut.step, end - first);
      body(floats(x, first, count, buffer(thread, 0)), first, count);
    }
  }

  // Calls body(out) with the elements themselves where they are contiguous float32, else with a
  // buffer, then stored.
  template <class Body>
  void write(const View& v, int64_t first, int64_t count, int thread, const Body& body) {
    if (float* elements = direct(v, first)) return body(elements);
    float* out = buffer(thread, 2);
    body(out);
    store(v, first, count, out);
  }

  void fold(float* __restrict line, float* __restrict out) const {
    if (cut.width == 1) {
      for (int64_t at = PLANE_STEP; at < cut.line; at += PLANE_STEP)
        for (int64_t i = 0; i < PLANE_STEP; ++i) line[i] += line[at + i];
      float sum = 0.0f;
      for (int64_t i = 0; i < 4; ++i) sum += (line[i] + line[i + 4]) + (line[i + 8] + line[i + 12]);
      *out = sum;
    } else {
      for (int64_t at = cut.width; at < cut.line; at += cut.width)
        for (int64_t c = 0; c < cut.width; ++c) line[c] += line[at + c];
      __builtin_memcpy(out, line, size_t(cut.width) * sizeof(float));
    }
  }

  // The sum over a channel of sample n.
  double total(int64_t n, int which, int64_t c) const {
    if (cut.width == 1) return *part(n, c, which);
    double sum = 0.0;
    for (int64_t b = 0; b < cut.blocks; ++b) sum += part(n, b, which)[c];
    return sum;
  }

  double centre_of(int64_t n, int64_t g) const {
    if (cut.blocks == 0) return 0.0;
    return cut.width == 1 ? *part(n, g * per_group, 2) : part(n, 0, 2)[g * per_group];
  }

  // Calls body(elements, centre, sum, squares) for each part of a group that has a centre.
  template <class Body>
  void for_parts(int64_t n, int64_t g, const Body& body) const {
    const int64_t first = g * per_group;
    if (cut.width == 1) {
      for (int64_t c = first; c < first + per_group; ++c)
        body(double(cut.plane), *part(n, c, 2), *part(n, c, 0), *part(n, c, 1));
      return;
    }
    for (int64_t b = 0; b < cut.blocks; ++b) {
      double sum = 0.0, squares = 0.0;
      for (int64_t c = first; c < first + per_group; ++c)
        sum += part(n, b, 0)[c], squares += part(n, b, 1)[c];
      body(double(cut.count(b) / cut.channels * per_group), part(n, b, 2)[first], sum, squares);
    }
  }
};

template <class Block, class Finish>
struct Phase {
  Block block;    // block(n, b, thread)
  Finish finish;  // finish(n)
};

template <class Block, class Finish>
Phase<Block, Finish> phase(Block block, Finish finish) {
  return {block, finish};
}

// One thread takes a sample through all phases while it is in its cache; where samples are too few
// for that, all threads share the blocks of one phase after another.
template <class... Phases>
void run(const Cut& cut, int threads, const Phases&... phases) {
  const int64_t elements = cut.elements();
  if (cut.whole_samples(threads)) {
    parallel_for(cut.samples, elements, threads, [&](int64_t n, int thread) {
      const auto whole = [&](const auto& phase) {
        for (int64_t b = 0; b < cut.blocks; ++b) phase.block(n, b, thread);
        phase.finish(n);
      };
      (whole(phases), ...);
    });
  } else {
    const auto shared = [&](const auto& phase) {
      parallel_for(cut.samples * cut.blocks, elements, threads, [&](int64_t job, int thread) {
        phase.block(job / cut.blocks, job % cut.blocks, thread);
      });
      for (int64_t n = 0; n < cut.samples; ++n) phase.finish(n);
    };
    (shared(phases), ...);
  }
}

}  // namespace
}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
