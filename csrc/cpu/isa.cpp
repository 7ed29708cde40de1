// The choice of an instruction set at run time, and the checks that every build of an op shares.
// No kernels.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastddpm {
namespace cpu {
namespace {

bool has_plain() { return true; }

#if defined(FASTDDPM_X86)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512cd");
}
#endif

struct Isa {
  const char* name;
  bool available;
  decltype(&plain::randn) randn;
  decltype(&plain::noise) noise;
  decltype(&plain::posterior_step) posterior_step;
  decltype(&plain::group_norm_silu) group_norm_silu;
  decltype(&plain::group_norm_silu_backward) group_norm_silu_backward;
  decltype(&plain::attention_block) attention_block;
  decltype(&plain::attention_block_backward) attention_block_backward;
  decltype(&plain::discretized_log_likelihood) discretized_log_likelihood;
  decltype(&plain::peak_flops) peak_flops;
};

#define FASTDDPM_ISA_ROW(isa)       \
  {#isa,                            \
   has_##isa(),                     \
   isa::randn,                      \
   isa::noise,                      \
   isa::posterior_step,             \
   isa::group_norm_silu,            \
   isa::group_norm_silu_backward,   \
   isa::attention_block,            \
   isa::attention_block_backward,   \
   isa::discretized_log_likelihood, \
   isa::peak_flops},

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
  for (int64_t i = 0; i < n; ++i) {
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

}  // namespace

void isas(bool available, const char* names[MAX_ISAS]) {
  for (const Isa& row : table)
    if (row.available || !available) *names++ = row.name;
  *names = nullptr;
}

const char* isa() { return active().name; }

void use_isa(const char* name) { current() = find(name); }

double peak_flops(int threads, double seconds, const char* precision) {
  if (std::strcmp(precision, "fp32"))
    throw std::invalid_argument("peak_flops: precision must be 'fp32'; got '" +
                                std::string(precision) + "'");
  require(threads >= 1, "peak_flops: threads must be at least 1");
  require(seconds >= 0.0 && seconds <= 60.0, "peak_flops: seconds must lie in 0 .. 60");
  return active().peak_flops(threads, seconds);
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

void posterior_step(const PosteriorStep& op, int threads) {
  require(op.out.dtype != DType::u8, "posterior_step: out must be float32, bfloat16 or float16");
  check_timesteps(op.t, op.shape.n, op.table);
  active().posterior_step(op, threads);
}

void group_norm_silu(const GroupNormSilu& op, int threads) {
  check_divides("num_groups", op.groups, op.shape.c);
  require(op.y.dtype != DType::u8, "group_norm_silu: y must be float32, bfloat16 or float16");
  active().group_norm_silu(op, threads);
}

void group_norm_silu_backward(const GroupNormSiluBackward& op, int threads) {
  check_divides("num_groups", op.forward.groups, op.forward.shape.c);
  require(op.dx.dtype != DType::u8, "group_norm_silu: dx must be float32, bfloat16 or float16");
  active().group_norm_silu_backward(op, threads);
}

void attention_block(const AttentionBlock& op, int threads) {
  check_divides("num_groups", op.groups, op.shape.c);
  check_divides("num_heads", op.heads, op.shape.c);
  require(op.y.dtype != DType::u8, "attention_block: y must be float32, bfloat16 or float16");
  active().attention_block(op, threads);
}

void attention_block_backward(const AttentionBlockBackward& op, int threads) {
  check_divides("num_groups", op.forward.groups, op.forward.shape.c);
  check_divides("num_heads", op.forward.heads, op.forward.shape.c);
  require(op.dx.dtype != DType::u8, "attention_block: dx must be float32, bfloat16 or float16");
  active().attention_block_backward(op, threads);
}

void discretized_log_likelihood(const DiscretizedLogLikelihood& op, int threads) {
  require(op.out.dtype != DType::u8,
          "discretized_log_likelihood: out must be float32, bfloat16 or float16");
  active().discretized_log_likelihood(op, threads);
}

}  // namespace cpu
}  // namespace fastddpm
