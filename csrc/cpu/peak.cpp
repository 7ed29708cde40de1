// The rate of multiply-adds that this instruction set reaches from registers: the ceiling of every
// kernel that multiplies. Memory plays no part.
#include "peak.h"

#include "isa.h"
#include "simd.h"

namespace fastddpm {
namespace {

constexpr int CHAINS = 12;  // independent sums: 4 cycles of latency at 3 multiply-adds a cycle
constexpr int64_t ROUNDS = 1 << 19;  // about a millisecond

// ROUNDS multiply-adds of each chain; the sum of all, so that none can be left out.
float multiply_adds() {
  volatile float half = 0.5f, one = 1.0f;  // unknown to the compiler; every chain tends to 2
  const Vector factor = vector_of(half), term = vector_of(one);
  Vector sum[CHAINS];
  for (int i = 0; i < CHAINS; ++i) sum[i] = vector_of(float(i) * one);
  for (int64_t round = 0; round < ROUNDS; ++round)
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) sum[i] = vector_madd(sum[i], factor, term);
  Vector all = sum[0];
  for (int i = 1; i < CHAINS; ++i) all += sum[i];
  float total = 0.0f;
  for (int64_t i = 0; i < WIDTH; ++i) total += all[i];
  return total;
}

}  // namespace

namespace FASTDDPM_ISA {

double peak_flops(int threads, double seconds) {
  return best_rate(threads, seconds, 2.0 * double(WIDTH * CHAINS * ROUNDS), multiply_adds);
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
