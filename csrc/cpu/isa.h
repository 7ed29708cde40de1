// Run-time choice of the instruction set. Every kernel file is compiled once per instruction set,
// into the namespace FASTDDPM_ISA with that set's compiler flags, and offers its entry point there;
// isa.cpp calls the one in use. The sets that multiply bfloat16 have kernels of their own for that
// alone and share the others with avx512. Kernel files keep helpers in unnamed namespaces and use
// no library templates.
#pragma once
#include "../ops.h"
#include "layers/images.h"
#include "layers/layers.h"

// Calls X(namespace, namespace of the kernels without bfloat16 products) for each compiled
// instruction set, weakest first.
#if defined(FASTDDPM_X86_BF16)
#define FASTDDPM_EACH_ISA(X) \
  X(plain, plain) X(avx2, avx2) X(avx512, avx512) X(avx512_bf16, avx512) X(amx_bf16, avx512)
#elif defined(FASTDDPM_X86)
#define FASTDDPM_EACH_ISA(X) X(plain, plain) X(avx2, avx2) X(avx512, avx512)
#else
#define FASTDDPM_EACH_ISA(X) X(plain, plain)
#endif

#define FASTDDPM_DECLARE_OPS(isa, base)                                          \
  namespace isa {                                                                \
  void randn(const Randn&, int threads);                                         \
  void noise(const Noise&, int threads);                                         \
  void posterior_step(const PosteriorStep&, int threads);                        \
  void group_norm_silu(const GroupNormSilu&, int threads);                       \
  void group_norm_silu_backward(const GroupNormSiluBackward&, int threads);      \
  void residual_sum(const ResidualSum&, int threads);                            \
  void attention_block(const AttentionBlock&, int threads);                      \
  void attention_block_backward(const AttentionBlockBackward&, int threads);     \
  void discretized_log_likelihood(const DiscretizedLogLikelihood&, int threads); \
  void vlb_term(const VlbTerm&, int threads);                                    \
  void squared_error(const SquaredError&, int threads);                          \
  void squared_error_backward(const SquaredErrorBackward&, int threads);         \
  void adam(const Adam&, int threads);                                           \
  void grad_norm(const GradNorm&, int threads);                                  \
  double peak_flops(int threads, double seconds);                                \
  double peak_flops_bf16(int threads, double seconds);                           \
  }

namespace fastddpm {

FASTDDPM_EACH_ISA(FASTDDPM_DECLARE_OPS)
FASTDDPM_EACH_ISA(FASTDDPM_DECLARE_PLAN_OPS)
FASTDDPM_EACH_ISA(FASTDDPM_DECLARE_IMAGE_OPS)

namespace cpu {

constexpr int MAX_ISAS = 8;

// Names of the instruction sets compiled in, weakest first, null-terminated; `available` on this
// machine only.
void isas(bool available, const char* names[MAX_ISAS]);

// The one in use: the strongest that the machine has, or what FASTDDPM_ISA or use_isa asked for.
const char* isa();

// Throws std::invalid_argument, listing the choices, if the name is unknown or this machine lacks
// it.
void use_isa(const char* name);

// Throws what posterior_step throws for operands that lead out of bounds.
void check(const PosteriorStep& op);

// Whether the one in use multiplies bfloat16: it is then faster than float32.
bool multiplies_bf16();

// attention_block and its gradient of bfloat16 operands with float32 sums.
void attention_block_bf16(const AttentionBlock& op, int threads);
void attention_block_backward_bf16(const AttentionBlockBackward& op, int threads);

// FLOP/s: multiply-adds from registers on `threads` threads, each on a core of its own, the best of
// the repeats that fit into `seconds`. precision: "fp32".
double peak_flops(int threads, double seconds, const char* precision);

}  // namespace cpu
}  // namespace fastddpm
