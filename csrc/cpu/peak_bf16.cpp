// The rate of bfloat16 products that this instruction set reaches with its operands in the first
// cache: the ceiling of every kernel that multiplies them.
#include "isa.h"
#include "layers/bf16.h"
#include "peak.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t STEPS = 8, ROUNDS = 1 << 9;

}  // namespace

double peak_flops_bf16(int threads, double seconds) {
  const double flop = 2.0 * double(BLOCK * BLOCK * BLOCK * STEPS * ROUNDS);
  return best_rate(threads, seconds, flop, [] {
    alignas(64) BF16 a[BLOCK * BLOCK * STEPS], b[STEP * STEPS];
    alignas(64) float c[BLOCK * BLOCK];
    for (BF16& x : a) x = from_float<BF16>(0.5f);
    for (BF16& x : b) x = from_float<BF16>(0.25f);
    const Multiplier multiplier;
    float sum = 0.0f;
    for (int64_t round = 0; round < ROUNDS; ++round) {
      multiply_bf16(multiplier, BLOCK, a, BLOCK * STEPS, STEPS, b, c, BLOCK);
      sum += c[round % (BLOCK * BLOCK)];
    }
    return sum;
  });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
