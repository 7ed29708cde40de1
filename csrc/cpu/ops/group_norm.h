// What group_norm_silu and its gradient share: sums over blocks, statistics, the order of the work.
//
// Sums run in float32 over a block (cut.h), around its own mean, and in float64, in block order,
// over blocks: the bits do not depend on the thread count.
#pragma once
#include "../isa.h"
#include "cut.h"
#include "dropout.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

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

constexpr int64_t PARTS = 3;  // sum, second sum and centres of a block

enum Row {  // of the scratch of a thread; the first COEFFICIENTS are kept for each sample, too
  CENTRE,
  SCALE,
  SHIFT,
  SLOPE,
  OFFSET,
  REST,
  COEFFICIENTS,
  SUM = COEFFICIENTS,
  SECOND,
  BEFORE,
  ADDED,
  ROWS
};

enum Buffer { X, OTHER, OUT, MASK, BUFFERS };  // of a step's elements, each thread's own

class Pass {
 public:
  // dx, dx2: of the gradient, if it is that
  Pass(const GroupNormSilu& op, int threads, const Tensor* dx = nullptr,
       const Tensor* dx2 = nullptr)
      : op(op),
        c1(op.x2.data ? op.c1 : op.shape.c),
        summed(!dx && op.residual.data),
        cut(op.shape, summed ? op.u : op.x, c1, op.x2),
        whole(cut.whole_samples(threads)),
        per_group(op.shape.c / op.groups),
        memory(statistics() + sums() + all_coefficients() + cut.team(threads) * per_thread() +
                   (dx && !holds_floats(*dx, *dx2) ? gradients(threads) : 0),
               false),
        rstd(memory.data),
        partial(rstd + statistics()),
        coefficients(partial + sums()),
        scratch(coefficients + all_coefficients()),
        kept(scratch + cut.team(threads) * per_thread()) {}

  const GroupNormSilu& op;
  const int64_t c1;   // channels of x
  const bool summed;  // whether x is to be added to a residual first
  const Cut cut;
  const bool whole;
  const int64_t per_group;

  // ---- the phases: a block's work, then what follows from all blocks of a sample ----

  // A block's sums around its own means, while it is in the cache. `before` costs nothing where it
  // is not part of a sum that is written: it is taken off the centre of its channel.
  void statistics_block(int64_t n, int64_t b, int thread) {
    float *sums = part(n, b, 0), *centre = part(n, b, 2);
    const float* before = read_block(cut, op.before, c1, n, b, row(thread, BEFORE));
    cut.for_sources(b, [&](const Source& s) {
      float* sum = clear(s, thread, SUM);
      const auto body = [&](const float* x, int64_t, int64_t count) {
        add(x, count / s.line, s.line, sum);
        add(x + count / s.line * s.line, 1, count % s.line, sum);
      };
      if (summed && s.channel == 0)
        walk_sum(s, n, b, thread, before, body);
      else
        walk(s, n, b, thread, body);
      fold(s, sum, sums);
    });

    const int64_t channels = cut.order == Order::chw ? 1 : per_group;
    const float scale = float(1.0 / double(channels * cut.pixels_of(b)));
    for (int64_t first = 0; first < cut.width; first += channels) {
      float group = 0.0f, added = 0.0f;
      for (int64_t c = first; c < first + channels; ++c) group += sums[c], added += before[c];
      const float mean = group * scale, mean_before = added / float(channels);
      for (int64_t c = first; c < first + channels; ++c)
        centre[c] = summed ? mean : mean + (mean_before - before[c]);
    }

    cut.for_sources(b, [&](const Source& s) {
      const float* centres = cut.repeat(s, centre, row(thread, CENTRE));
      float *sum = clear(s, thread, SUM), *squares = clear(s, thread, SECOND);
      walk(s, n, b, thread, [&](const float* x, int64_t, int64_t count) {
        add_centred(x, count / s.line, s.line, centres, sum, squares);
        add_centred(x + count / s.line * s.line, 1, count % s.line, centres, sum, squares);
      });
      fold(s, sum, sums);
      fold(s, squares, part(n, b, 1));
    });
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
    // What is to be added to the elements as they are stored; then the centre takes its place.
    float* const before = coefficient(n, CENTRE);
    for (int64_t c = 0; c < op.shape.c; ++c) before[c] = 0.0f;
    if (!summed) read(op.before, n, c1, 0.0f, before);
    for (int64_t g = 0; g < op.groups; ++g) {
      // Blocks are joined as by Chan et al.; then what rounding the centre to float32 leaves of it.
      const double origin = centre_of(n, g, before);
      double sum = 0.0, squares = 0.0;
      for_parts(n, g, before, [&](double count, double centre, double part_sum, double) {
        sum += count * (centre - origin) + part_sum;
      });
      const double offset = sum / elements(), mean = origin + offset;
      for_parts(n, g, before,
                [&](double count, double centre, double part_sum, double part_squares) {
                  const double from_mean = centre - origin - offset;
                  squares += part_squares + from_mean * (2.0 * part_sum + count * from_mean);
                });
      const double raw = squares / elements(), variance = raw < 0.0 ? 0.0 : raw;
      const int64_t at = n * op.groups + g;
      const float r = float(1.0 / sqrt(variance + double(op.eps)));
      rstd[at] = r;
      if (op.mean) op.mean[at] = float(mean);
      if (op.rstd) op.rstd[at] = r;
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
        const double exact = mean - double(before[c]);
        const float rounded = float(exact), left = float(exact - double(rounded));
        coefficient(n, CENTRE)[c] = rounded;
        coefficient(n, REST)[c] = left;
        scale[c] = r * scale[c] * (1.0f + gain[c]);
        shift[c] = madd(-left, scale[c], madd(1.0f + gain[c], shift[c], addend[c]));
      }
    }
  }

 protected:
  Scratch<float> memory;      // of all that follows: five allocations would outlast a small call
  float* const rstd;          // (N, G): 1 / sqrt(var + eps)
  float* const partial;       // (N, blocks, PARTS, width): the sums over a block, and its centres
  float* const coefficients;  // (N, COEFFICIENTS, C)
  float* const scratch;       // (threads, ROWS of each source and BUFFERS)
  float* const kept;          // (threads or N, elements of a sample): g where dx can't hold it

  int64_t statistics() const { return op.shape.n * op.groups; }
  int64_t sums() const { return op.shape.n * cut.blocks * PARTS * cut.width; }
  int64_t all_coefficients() const { return op.shape.n * COEFFICIENTS * op.shape.c; }
  int64_t per_thread() const { return cut.sources * ROWS * cut.row + BUFFERS * cut.step; }

  int64_t gradients(int threads) const {
    return (whole ? cut.team(threads) : cut.samples) * cut.channels * cut.plane;
  }

  bool holds_floats(const Tensor& dx, const Tensor& dx2) const {
    for (int64_t i = 0; i < cut.sources; ++i)
      if (!is_run_of<float>(i ? dx2 : dx, cut.source[i].shape, cut.order)) return false;
    return true;
  }

  double elements() const { return double(per_group * cut.plane); }

  float* coefficient(int64_t n, Row row) {
    return coefficients + (n * COEFFICIENTS + row) * op.shape.c;
  }

  float* row(int thread, Row row, int64_t source = 0) {
    return scratch + thread * per_thread() + (source * ROWS + row) * cut.row;
  }

  float* buffer(int thread, Buffer which) {
    return row(thread, CENTRE, cut.sources) + which * cut.step;
  }

  View view_of(const Source& s, const Tensor& x, int64_t n) const {
    return view(x, s.shape, n, cut.order);
  }

  float* clear(const Source& s, int thread, Row which) {
    float* line = row(thread, which, s.index);
    for (int64_t i = 0; i < s.line; ++i) line[i] = 0.0f;
    return line;
  }

  float* part(int64_t n, int64_t b, int which) const {
    return partial + ((n * cut.blocks + b) * PARTS + which) * cut.width;
  }

  // The coefficients of a source's channels in the block along a line.
  const float* spread(const Source& s, int64_t n, int64_t b, int thread, Row which) {
    const int64_t first = cut.order == Order::chw ? b : 0;
    return cut.repeat(s, coefficient(n, which) + first, row(thread, which, s.index));
  }

  Line argument(const Source& s, int64_t n, int64_t b, int thread) {
    return {spread(s, n, b, thread, CENTRE), spread(s, n, b, thread, SCALE),
            spread(s, n, b, thread, SHIFT)};
  }

  // Calls body(x, first, count) for every step of a source in block b.
  template <class Body>
  void walk(const Source& s, int64_t n, int64_t b, int thread, const Body& body) {
    const View x = view_of(s, s.x, n);
    cut.for_steps(s, b, [&](int64_t first, int64_t count) {
      body(floats(x, first, count, buffer(thread, X)), first, count);
    });
  }

  // The same for all sources, pixel by pixel about: body(source, x, first, count).
  template <class Body>
  void walk(int64_t n, int64_t b, int thread, const Body& body) {
    View x[2];
    cut.for_sources(b, [&](const Source& s) { x[s.index] = view_of(s, s.x, n); });
    cut.for_steps(b, [&](const Source& s, int64_t first, int64_t count) {
      body(s, floats(x[s.index], first, count, buffer(thread, X)), first, count);
    });
  }

  // The first, of u = x + before + residual, which is written.
  template <class Body>
  void walk_sum(const Source& s, int64_t n, int64_t b, int thread, const float* before,
                const Body& body) {
    const View x = view_of(s, op.x, n), residual = view_of(s, op.residual, n);
    const View u = view_of(s, op.u, n);
    const float* added = cut.repeat(s, before, row(thread, ADDED));
    cut.for_steps(s, b, [&](int64_t first, int64_t count) {
      body(sum_step(s, x, &residual, u, added, first, count, buffer(thread, X),
                    buffer(thread, OTHER), buffer(thread, OUT)),
           first, count);
    });
  }

  // A step's elements from `first` on: themselves where they are float32 and contiguous, or at
  // least each pixel's are; else a buffer, to be filled or stored.
  struct Lines {
    float* data;
    int64_t length, pitch;  // of a line; from one to the next
    bool buffered;
  };

  Lines lines(const Source& s, const View& v, int64_t first, float* buffer) const {
    if (float* elements = direct(v, first)) return {elements, s.line, s.line, false};
    if (v.dtype == DType::f32 && v.size[0] == 1 && v.stride[2] == 1 && v.size[2] == s.shape.c &&
        v.size[2] >= PLANE_STEP && cut.order == Order::hwc)
      return {reinterpret_cast<float*>(v.data) + first / v.size[2] * v.stride[1], v.size[2],
              v.stride[1], false};
    return {buffer, s.line, s.line, true};
  }

  // All bits of mask[i] are set where dropout keeps element first + i of a source's part of block
  // b. Null without dropout.
  const uint32_t* mask(const Source& s, int64_t n, int64_t b, int64_t first, int64_t count,
                       int thread) {
    const uint32_t threshold = op.dropout.threshold;
    if (threshold == 0) return nullptr;
    uint32_t* mask = reinterpret_cast<uint32_t*>(buffer(thread, MASK));
    const Philox random = stream(op.dropout.random, n);
    const int64_t all = cut.channels, own = s.shape.c;
    if (cut.order == Order::chw)
      draw_mask(random, threshold, first % cut.plane * all + b, all, count, mask);
    else if (own == all)
      draw_mask(random, threshold, first, 1, count, mask);
    else
      for (int64_t at = 0; at < count; at += own)
        draw_mask(random, threshold, (first + at) / own * all + s.channel, 1, own, mask + at);
    return mask;
  }

  void fold(const Source& s, float* __restrict line, float* __restrict out) const {
    if (cut.order == Order::chw) {
      for (int64_t at = PLANE_STEP; at < s.line; at += PLANE_STEP)
        for (int64_t i = 0; i < PLANE_STEP; ++i) line[i] += line[at + i];
      float sum = 0.0f;
      for (int64_t i = 0; i < 4; ++i) sum += (line[i] + line[i + 4]) + (line[i + 8] + line[i + 12]);
      *out = sum;
    } else {
      const int64_t width = s.shape.c;
      for (int64_t at = width; at < s.line; at += width)
        for (int64_t c = 0; c < width; ++c) line[c] += line[at + c];
      __builtin_memcpy(out + s.channel, line, size_t(width) * sizeof(float));
    }
  }

  // The sum over a channel of sample n.
  double total(int64_t n, int which, int64_t c) const {
    if (cut.order == Order::chw) return *part(n, c, which);
    double sum = 0.0;
    for (int64_t b = 0; b < cut.blocks; ++b) sum += part(n, b, which)[c];
    return sum;
  }

  double centre_of(int64_t n, int64_t g, const float* before) const {
    const int64_t c = g * per_group;
    if (cut.blocks == 0) return 0.0;
    return double(cut.order == Order::chw ? *part(n, c, 2) : part(n, 0, 2)[c]) + double(before[c]);
  }

  // Calls body(elements, centre, sum, squares) for each part of a group that has a centre, with
  // `before` added to its elements.
  template <class Body>
  void for_parts(int64_t n, int64_t g, const float* before, const Body& body) const {
    const int64_t first = g * per_group;
    if (cut.order == Order::chw) {
      for (int64_t c = first; c < first + per_group; ++c)
        body(double(cut.plane), double(*part(n, c, 2)) + double(before[c]), *part(n, c, 0),
             *part(n, c, 1));
      return;
    }
    for (int64_t b = 0; b < cut.blocks; ++b) {
      const float *sums = part(n, b, 0), *second = part(n, b, 1), *centres = part(n, b, 2);
      const double pixels = double(cut.pixels_of(b));
      const double centre = double(centres[first]) + double(before[first]);
      double sum = 0.0, squares = 0.0;
      for (int64_t c = first; c < first + per_group; ++c) {
        // With `before` the centres of a group's channels are the same but for their rounding.
        const double off = double(centres[c]) + double(before[c]) - centre;
        sum += sums[c] + pixels * off;
        squares += second[c] + off * (2.0 * sums[c] + pixels * off);
      }
      body(pixels * double(per_group), centre, sum, squares);
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
