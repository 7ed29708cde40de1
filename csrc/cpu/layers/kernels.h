// The kernels of one instruction set, for what is written once for all of them: plans and ops that
// call layers.
#pragma once
#include <memory>

#include "../isa.h"
#include "../parallel.h"

namespace fastddpm {
namespace cpu {

struct Kernels {
  const char* isa;
  decltype(&plain::channel_statistics) channel_statistics;
  decltype(&plain::group_coefficients) group_coefficients;
  decltype(&plain::prepare_input) prepare_input;
  decltype(&plain::convolve) convolve;
  decltype(&plain::attention) attention;
  decltype(&plain::convolve_workspace) convolve_workspace;
  decltype(&plain::attention_workspace) attention_workspace;
  decltype(&plain::best_algorithm) best_algorithm;
  decltype(&plain::packed_weight_size) packed_weight_size;
  decltype(&plain::pack_weight) pack_weight;
  decltype(&plain::vector_width) vector_width;
  decltype(&plain::load_images) load_images;
  decltype(&plain::store_images) store_images;
  decltype(&plain::spread_images) spread_images;
  decltype(&plain::sum_squares_of_pixels) sum_squares_of_pixels;
  decltype(&plain::sum_pixels) sum_pixels;
  decltype(&plain::activation_gradient) activation_gradient;
  decltype(&plain::digest) digest;
  decltype(&plain::best_weight_gradient) best_weight_gradient;
  decltype(&plain::weight_gradient_workspace) weight_gradient_workspace;
  decltype(&plain::weight_gradient_begin) weight_gradient_begin;
  decltype(&plain::weight_gradient_add) weight_gradient_add;
  decltype(&plain::weight_gradient_finish) weight_gradient_finish;
  decltype(&plain::convolve_bf16) convolve_bf16;
  decltype(&plain::attention_bf16) attention_bf16;
  decltype(&plain::attention_workspace_bf16) attention_workspace_bf16;
  decltype(&plain::attention_gradient_bf16) attention_gradient_bf16;
  decltype(&plain::attention_gradient_workspace_bf16) attention_gradient_workspace_bf16;
  decltype(&plain::packed_weight_size_bf16) packed_weight_size_bf16;
  decltype(&plain::product_rate_bf16) product_rate_bf16;
  decltype(&plain::pack_weight_bf16) pack_weight_bf16;
  decltype(&plain::weight_gradient_bf16_workspace) weight_gradient_bf16_workspace;
  decltype(&plain::weight_gradient_bf16_begin) weight_gradient_bf16_begin;
  decltype(&plain::weight_gradient_bf16_add) weight_gradient_bf16_add;
  decltype(&plain::weight_gradient_bf16_finish) weight_gradient_bf16_finish;
  decltype(&plain::posterior_step) posterior_step;
  decltype(&plain::group_norm_silu_backward) group_norm_silu_backward;
};

// Those of the instruction set in use.
const Kernels& kernels_in_use();

using Buffer = std::unique_ptr<float, void (*)(void*)>;

inline Buffer allocate(int64_t floats, bool zeroed) {
  return {static_cast<float*>(scratch_alloc(floats * int64_t(sizeof(float)), zeroed)),
          scratch_free};
}

constexpr int64_t LINE = 16;  // floats: what has a place of its own begins at cache lines

inline int64_t lines(int64_t floats) { return (floats + LINE - 1) / LINE * LINE; }

}  // namespace cpu
}  // namespace fastddpm
