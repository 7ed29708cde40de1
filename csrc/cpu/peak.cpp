// The rate of multiply-adds that this instruction set reaches from registers: the ceiling of every
// kernel that multiplies. Memory plays no part.
#include <time.h>

#include "isa.h"
#include "parallel.h"
#include "simd.h"

namespace fastddpm {
namespace {

constexpr int CHAINS = 12;  // independent sums: 4 cycles of latency at 3 multiply-adds a cycle
constexpr int64_t ROUNDS = 1 << 14;
constexpr int REPEATS = 5;         // at least
constexpr double SHORTEST = 2e-3;  // seconds of a repeat, far above what waking the threads takes

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// `rounds` multiply-adds of each chain; the sum of all, so that none can be left out.
float multiply_adds(int64_t rounds) {
  volatile float half = 0.5f, one = 1.0f;  // unknown to the compiler; every chain tends to 2
  const Vector factor = vector_of(half), term = vector_of(one);
  Vector sum[CHAINS];
  for (int i = 0; i < CHAINS; ++i) sum[i] = vector_of(float(i) * one);
  for (int64_t round = 0; round < rounds; ++round)
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
  Scratch<float> sums(threads);
  const auto run = [&](int64_t rounds) {
    const double start = now();
    parallel_for(threads, SERIAL_ELEMENTS, threads,
                 [&](int64_t job, int) { sums.data[job] = multiply_adds(rounds); });
    volatile float seen = 0.0f;
    for (int i = 0; i < threads; ++i) seen = seen + sums.data[i];
    return now() - start;
  };
  int64_t rounds = ROUNDS;
  while (run(rounds) < SHORTEST) rounds *= 2;
  const double flop = 2.0 * double(WIDTH * CHAINS) * double(rounds) * threads;
  const double end = now() + seconds;
  double best = 0.0;
  for (int i = 0; i < REPEATS || now() < end; ++i) {
    const double rate = flop / run(rounds);
    if (rate > best) best = rate;
  }
  return best;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
