// Choices by shape, and what they mean for the kernels' arguments. No kernels.
#include "way.h"

#include <algorithm>
#include <cstring>

#include "../sizes.h"

namespace fastddpm {
namespace cpu {
namespace {

#define FASTDDPM_KERNELS_ROW(isa, base)    \
  {#isa,                                   \
   base::channel_statistics,               \
   base::group_coefficients,               \
   base::prepare_input,                    \
   base::convolve,                         \
   base::attention,                        \
   base::convolve_workspace,               \
   base::attention_workspace,              \
   base::best_algorithm,                   \
   base::packed_weight_size,               \
   base::pack_weight,                      \
   base::vector_width,                     \
   base::load_images,                      \
   base::store_images,                     \
   base::spread_images,                    \
   base::sum_squares_of_pixels,            \
   base::sum_pixels,                       \
   base::activation_gradient,              \
   base::digest,                           \
   base::best_weight_gradient,             \
   base::weight_gradient_workspace,        \
   base::weight_gradient_begin,            \
   base::weight_gradient_add,              \
   base::weight_gradient_finish,           \
   isa::convolve_bf16,                     \
   isa::attention_bf16,                    \
   isa::attention_workspace_bf16,          \
   isa::attention_gradient_bf16,           \
   isa::attention_gradient_workspace_bf16, \
   isa::packed_weight_size_bf16,           \
   isa::product_rate_bf16,                 \
   isa::pack_weight_bf16,                  \
   isa::weight_gradient_bf16_workspace,    \
   isa::weight_gradient_bf16_begin,        \
   isa::weight_gradient_bf16_add,          \
   isa::weight_gradient_bf16_finish,       \
   base::posterior_step,                   \
   base::group_norm_silu_backward},

const Kernels table[] = {FASTDDPM_EACH_ISA(FASTDDPM_KERNELS_ROW)};

constexpr int64_t CHANNELS_BF16 = 32;  // bfloat16 pixels are whole steps
constexpr int64_t OVERREAD = 15;       // pixels: see ConvolveBf16

// From one image's prepared input to the next's.
int64_t image_values(const Way& way) {
  const Geometry& is = way.is;
  const int64_t border = is.before + is.after;
  const int64_t pixels = (is.height * is.repeat + border) * (is.width * is.repeat + border) +
                         (way.rounded() ? OVERREAD * is.stride : 0);
  return pixels * way.pixel;
}

Convolve arguments(const Way& way, int64_t images, int64_t c_in_2) {
  const Geometry& is = way.is;
  Convolve op{};
  op.algorithm = way.algorithm;
  op.images = images, op.c_in = is.c_in - c_in_2, op.c_in_2 = c_in_2, op.c_out = is.c_out;
  op.kernel = is.kernel, op.stride = is.stride, op.pixel = way.pixel - c_in_2;
  op.rows = is.height * is.repeat + is.before + is.after;
  op.columns = is.width * is.repeat + is.before + is.after;
  op.height = way.y_height, op.width = way.y_width;
  return op;
}

ConvolveBf16 arguments_bf16(const Way& way, int64_t images) {
  const Geometry& is = way.is;
  ConvolveBf16 op{};
  op.images = images, op.c_in = is.c_in, op.c_out = is.c_out;
  op.kernel = is.kernel, op.stride = is.stride, op.repeated = way.repeated;
  op.rows = is.height * is.repeat + is.before + is.after;
  op.columns = is.width * is.repeat + is.before + is.after;
  op.pixel = way.pixel, op.image = way.image;
  op.height = way.y_height, op.width = way.y_width;
  return op;
}

Algorithm choose(const Kernels& kernels, const Way& way, bool bf16, Asked asked) {
  const Geometry& is = way.is;
  const bool square = is.kernel == 3 && is.stride == 1;
  if (asked == Asked::bf16) return Algorithm::bf16;
  if (asked == Asked::automatic) {
    // Repeated pixels: 4 taps of 9.
    const double rate = bf16 ? kernels.product_rate_bf16() * (way.repeated ? 9.0 / 4.0 : 1.0) : 0.0;
    if (square) return kernels.best_algorithm(is.c_in, is.c_out, way.y_height, way.y_width, rate);
    return bf16 ? Algorithm::bf16 : Algorithm::direct;
  }
  if (!square || asked == Asked::direct) return Algorithm::direct;
  return asked == Asked::winograd_2 ? Algorithm::winograd_2 : Algorithm::winograd_4;
}

}  // namespace

const Kernels& kernels_in_use() {
  for (const Kernels& row : table)
    if (!std::strcmp(row.isa, isa())) return row;
  return table[0];
}

Way way_of(const Kernels& kernels, const Geometry& geometry, bool bf16, Asked asked) {
  Way way{};
  way.is = geometry;
  Geometry& is = way.is;
  way.y_height = is.rows(), way.y_width = is.columns();
  way.repeated =
      is.kernel == 3 && is.stride == 1 && is.repeat == 2 && is.before == 1 && is.after == 1;
  way.algorithm = choose(kernels, way, bf16, asked);
  way.repeated = way.repeated && way.rounded();
  way.pixel = is.c_in;
  if (way.rounded()) {
    way.pixel = round_up(is.c_in, CHANNELS_BF16);
    if (way.repeated) is.repeat = 1;
  } else if (const int64_t m = int64_t(way.algorithm)) {
    // Whole tiles and whole vectors can be read: what the image lacks is zeros.
    way.pixel = round_up(is.c_in, kernels.vector_width());
    is.after +=
        std::max(round_up(way.y_height, m) - way.y_height, round_up(way.y_width, m) - way.y_width);
  }
  way.image = image_values(way);
  way.weight_floats =
      way.rounded()
          ? kernels.packed_weight_size_bf16(is.c_in, is.c_out, is.kernel, way.repeated) / 2
          : kernels.packed_weight_size(way.algorithm, is.c_in, is.c_out, is.kernel);
  return way;
}

Way way_of_input(const Geometry& geometry, bool rounded) {
  Way way{};
  way.is = geometry;
  const Geometry& is = way.is;
  way.y_height = is.rows(), way.y_width = is.columns();
  way.algorithm = rounded ? Algorithm::bf16 : Algorithm::direct;
  way.pixel = rounded ? round_up(is.c_in, CHANNELS_BF16) : is.c_in;
  way.image = image_values(way);
  return way;
}

void pack(const Kernels& kernels, const Way& way, const Weight& weight, float* packed,
          int threads) {
  if (way.rounded())
    kernels.pack_weight_bf16(weight, way.repeated, reinterpret_cast<BF16*>(packed), threads);
  else
    kernels.pack_weight(way.algorithm, weight, packed, threads);
}

PrepareInput preparation(const Way& way, int64_t images) {
  PrepareInput op{};
  op.images = images, op.height = way.is.height, op.width = way.is.width;
  op.repeat = way.is.repeat, op.before = way.is.before, op.after = way.is.after;
  op.pixel = way.pixel, op.image = way.image;
  return op;
}

void prepare(const Kernels& kernels, const Way& way, PrepareInput op, float* prepared,
             int threads) {
  if (way.rounded())
    op.out_bf16 = reinterpret_cast<BF16*>(prepared);
  else
    op.out = prepared;
  kernels.prepare_input(op, threads);
}

int64_t workspace(const Kernels& kernels, const Way& way, int64_t images, int64_t c_in_2,
                  int threads) {
  if (way.rounded()) return 0;
  return kernels.convolve_workspace(arguments(way, images, c_in_2), threads);
}

void convolve(const Kernels& kernels, const Way& way, int64_t images, const Operands& operands,
              float* workspace, int threads) {
  if (way.rounded()) {
    ConvolveBf16 op = arguments_bf16(way, images);
    op.x = reinterpret_cast<const BF16*>(operands.x);
    op.weight = reinterpret_cast<const BF16*>(operands.weight);
    op.bias = operands.bias, op.bias_image = operands.bias_image;
    op.residual = operands.residual, op.y = operands.y;
    return kernels.convolve_bf16(op, threads);
  }
  Convolve op = arguments(way, images, operands.c_in_2);
  op.x = operands.x, op.x_2 = operands.x_2, op.weight = operands.weight;
  op.bias = operands.bias, op.bias_image = operands.bias_image;
  op.residual = operands.residual, op.y = operands.y;
  kernels.convolve(op, workspace, threads);
}

}  // namespace cpu
}  // namespace fastddpm
