// The choice of an instruction set at run time, and the checks that every build of an op shares.
// No kernels.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(FASTDDPM_X86)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastddpm {
namespace cpu {
namespace {

bool has_plain() { return true; }

#if defined(FASTDDPM_X86)
// What __builtin_cpu_supports of some clangs has no name for: bits of cpuid.
enum Register { ECX = 2, EDX = 3 };

bool has_bit(unsigned leaf, Register which, int bit) {
  unsigned registers[4] = {};
  return __get_cpuid_count(leaf, 0, &registers[0], &registers[1], &registers[2], &registers[3]) &&
         (registers[which] >> bit & 1);
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         has_bit(1, ECX, 29);  // f16c
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512cd");
}
#endif

#if defined(FASTDDPM_X86_BF16)
// Products of small whole numbers, which are exact: an instruction set whose kernels get them wrong
// here is not used.
bool multiplies(void (*convolve)(const ConvolveBf16&, int),
                void (*pack)(const Weight&, bool, BF16*, int)) {
  constexpr int64_t PIXELS = 48, C_IN = 64, C_OUT = 40;
  float weight[C_OUT * C_IN], bias[C_OUT] = {};
  static BF16 x[PIXELS * C_IN], packed[2 * 32 * C_IN];
  static float y[PIXELS * C_OUT];
  for (int64_t i = 0; i < PIXELS * C_IN; ++i) x[i] = from_float<BF16>(float(i * 7 % 11 - 5));
  for (int64_t i = 0; i < C_OUT * C_IN; ++i) weight[i] = float(i * 5 % 13 - 6);
  pack({weight, DType::f32, C_OUT, C_IN, 1, {C_IN, 1, 1, 1}}, false, packed, 1);
  convolve({1, C_IN, C_OUT, 1, 1, false, 1, PIXELS, C_IN, PIXELS * C_IN, 1, PIXELS, x, packed, bias,
            nullptr, y, 0},
           1);
  for (int64_t i = 0; i < PIXELS; ++i)
    for (int64_t o = 0; o < C_OUT; ++o) {
      float sum = 0.0f;
      for (int64_t c = 0; c < C_IN; ++c) sum += to_float(x[i * C_IN + c]) * weight[o * C_IN + c];
      if (y[i * C_OUT + o] != sum) return false;
    }
  return true;
}

bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         multiplies(avx512_bf16::convolve_bf16, avx512_bf16::pack_weight_bf16);
}

// The operating system saves the tiles of a process that asked for them.
bool tiles_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

bool has_amx_bf16() {
  return has_avx512_bf16() && has_bit(7, EDX, 24) && has_bit(7, EDX, 22) &&  // amx-tile, amx-bf16
         tiles_permitted() && multiplies(amx_bf16::convolve_bf16, amx_bf16::pack_weight_bf16);
}
#endif

struct Isa {
  const char* name;
  bool available, bf16;
  decltype(&plain::randn) randn;
  decltype(&plain::noise) noise;
  decltype(&plain::posterior_step) posterior_step;
  decltype(&plain::group_norm_silu) group_norm_silu;
  decltype(&plain::group_norm_silu_backward) group_norm_silu_backward;
  decltype(&plain::residual_sum) residual_sum;
  decltype(&plain::attention_block) attention_block;
  decltype(&plain::attention_block_backward) attention_block_backward;
  decltype(&plain::discretized_log_likelihood) discretized_log_likelihood;
  decltype(&plain::vlb_term) vlb_term;
  decltype(&plain::squared_error) squared_error;
  decltype(&plain::squared_error_backward) squared_error_backward;
  decltype(&plain::adam) adam;
  decltype(&plain::grad_norm) grad_norm;
  decltype(&plain::peak_flops) peak_flops;
  decltype(&plain::peak_flops_bf16) peak_flops_bf16;
};

#define FASTDDPM_ISA_ROW(isa, base)      \
  {#isa,                                 \
   has_##isa(),                          \
   std::strstr(#isa, "bf16") != nullptr, \
   base::randn,                          \
   base::noise,                          \
   base::posterior_step,                 \
   base::group_norm_silu,                \
   base::group_norm_silu_backward,       \
   base::residual_sum,                   \
   base::attention_block,                \
   base::attention_block_backward,       \
   base::discretized_log_likelihood,     \
   base::vlb_term,                       \
   base::squared_error,                  \
   base::squared_error_backward,         \
   base::adam,                           \
   base::grad_norm,                      \
   base::peak_flops,                     \
   isa::peak_flops_bf16},

const Isa table[] = {FASTDDPM_EACH_ISA(FASTDDPM_ISA_ROW)};

std::string listing(bool available) {
  std::string names;
  for (const Isa& row : table)
    if (row.available || !available)
      names += (names.empty() ? "'" : ", '") + std::string(row.name) + "'";
  return names;
}

const Isa* find(const char* name) {
  for (const Isa& row : table)
    if (!std::strcmp(row.name, name)) {
      if (row.available) return &row;
      throw std::invalid_argument("FASTDDPM_ISA: this machine lacks '" + std::string(name) +
                                  "'; it has " + listing(true));
    }
  throw std::invalid_argument("FASTDDPM_ISA must be one of " + listing(false) + "; got '" +
                              std::string(name) + "'");
}

const Isa* choose() {
  const char* forced = std::getenv("FASTDDPM_ISA");
  if (forced && *forced) return find(forced);
  const Isa* best = table;
  for (const Isa& row : table)
    if (row.available) best = &row;
  return best;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> instance{choose()};
  return instance;
}

const Isa& active() { return *current().load(std::memory_order_relaxed); }

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void check_timesteps(const PerSample& t, int64_t n, const Table& table) {
  for (int64_t i = 0; i < (t.stride ? n : n > 0); ++i) {
    const int64_t value = t.data[i * t.stride];
    if (value < 0 || value >= table.steps)
      throw std::invalid_argument("t must lie in 0 .. " + std::to_string(table.steps - 1) + "; t[" +
                                  std::to_string(i) + "] is " + std::to_string(value));
  }
}

void check_divides(const char* name, int64_t parts, int64_t channels) {
  if (parts < 1 || channels < 1 || channels % parts)
    throw std::invalid_argument(std::string(name) + " must divide the channels; got " +
                                std::to_string(parts) + " and " + std::to_string(channels));
}

void check_sources(const GroupNormSilu& op) {
  require(!op.x2.data || (op.c1 >= 1 && op.c1 < op.shape.c),
          "group_norm_silu: c1 must lie in 1 .. C - 1");
}

// Whether the weights ask for products of bfloat16 that this machine is faster with.
bool rounds(const AttentionBlock& op) {
  return multiplies_bf16() && op.qkv_weight.dtype == DType::bf16 &&
         op.proj_weight.dtype == DType::bf16;
}

}  // namespace

void isas(bool available, const char* names[MAX_ISAS]) {
  for (const Isa& row : table)
    if (row.available || !available) *names++ = row.name;
  *names = nullptr;
}

const char* isa() { return active().name; }

void use_isa(const char* name) { current() = find(name); }

bool multiplies_bf16() { return active().bf16; }

double peak_flops(int threads, double seconds, const char* precision) {
  const bool bf16 = !std::strcmp(precision, "bf16");
  if (!bf16 && std::strcmp(precision, "fp32"))
    throw std::invalid_argument("peak_flops: precision must be 'fp32' or 'bf16'; got '" +
                                std::string(precision) + "'");
  require(threads >= 1, "peak_flops: threads must be at least 1");
  require(seconds >= 0.0 && seconds <= 3.0, "peak_flops: seconds must lie in 0 .. 3");
  return (bf16 ? active().peak_flops_bf16 : active().peak_flops)(threads, seconds);
}

// ---- the ops: what would lead out of bounds is refused here, before any kernel runs
// ------------------

void randn(const Randn& op, int threads) {
  require(op.dtype != DType::u8, "randn: out must be float32, bfloat16 or float16");
  active().randn(op, threads);
}

void noise(const Noise& op, int threads) {
  require(op.xt.dtype != DType::u8 && op.eps.dtype != DType::u8,
          "noise: xt and eps must be float32, bfloat16 or float16");
  check_timesteps(op.t, op.shape.n, op.table);
  active().noise(op, threads);
}

void check(const PosteriorStep& op) {
  require(op.out.dtype != DType::u8, "posterior_step: out must be float32, bfloat16 or float16");
  check_timesteps(op.t, op.shape.n, op.table);
}

void posterior_step(const PosteriorStep& op, int threads) {
  check(op);
  active().posterior_step(op, threads);
}

void group_norm_silu(const GroupNormSilu& op, int threads) {
  check_divides("num_groups", op.groups, op.shape.c);
  check_sources(op);
  require(op.y.dtype != DType::u8 && op.u.dtype != DType::u8,
          "group_norm_silu: y and u must be float32, bfloat16 or float16");
  require(!op.residual.data == !op.u.data,
          "group_norm_silu: residual and u must both be given, or neither");
  active().group_norm_silu(op, threads);
}

void group_norm_silu_backward(const GroupNormSiluBackward& op, int threads) {
  check_divides("num_groups", op.forward.groups, op.forward.shape.c);
  check_sources(op.forward);
  require(op.dx.dtype != DType::u8 && op.dx2.dtype != DType::u8,
          "group_norm_silu: dx and dx2 must be float32, bfloat16 or float16");
  require(!op.forward.x2.data == !op.dx2.data,
          "group_norm_silu: x2 and dx2 must both be given, or neither");
  active().group_norm_silu_backward(op, threads);
}

void residual_sum(const ResidualSum& op, int threads) {
  require(op.u.dtype != DType::u8, "residual_sum: u must be float32, bfloat16 or float16");
  active().residual_sum(op, threads);
}

void attention_block(const AttentionBlock& op, int threads) {
  check_divides("num_groups", op.groups, op.shape.c);
  check_divides("num_heads", op.heads, op.shape.c);
  require(op.y.dtype != DType::u8, "attention_block: y must be float32, bfloat16 or float16");
  if (rounds(op)) return attention_block_bf16(op, threads);
  active().attention_block(op, threads);
}

void attention_block_backward(const AttentionBlockBackward& op, int threads) {
  check_divides("num_groups", op.forward.groups, op.forward.shape.c);
  check_divides("num_heads", op.forward.heads, op.forward.shape.c);
  require(op.dx.dtype != DType::u8, "attention_block: dx must be float32, bfloat16 or float16");
  if (rounds(op.forward)) return attention_block_backward_bf16(op, threads);
  active().attention_block_backward(op, threads);
}

void discretized_log_likelihood(const DiscretizedLogLikelihood& op, int threads) {
  require(op.out.dtype != DType::u8,
          "discretized_log_likelihood: out must be float32, bfloat16 or float16");
  active().discretized_log_likelihood(op, threads);
}

void vlb_term(const VlbTerm& op, int threads) {
  check_timesteps(op.t, op.shape.n, op.table);
  active().vlb_term(op, threads);
}

void squared_error(const SquaredError& op, int threads) { active().squared_error(op, threads); }

void squared_error_backward(const SquaredErrorBackward& op, int threads) {
  require(op.dprediction.dtype != DType::u8,
          "squared_error: dprediction must be float32, bfloat16 or float16");
  active().squared_error_backward(op, threads);
}

void adam(const Adam& op, int threads) { active().adam(op, threads); }

void grad_norm(const GradNorm& op, int threads) { active().grad_norm(op, threads); }

}  // namespace cpu
}  // namespace fastddpm
