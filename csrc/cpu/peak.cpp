// The rate of multiply-adds that this instruction set reaches from registers: the ceiling of every
// kernel that multiplies. Memory plays no part.
#include <time.h>

#include "isa.h"
#include "parallel.h"
#include "simd.h"

namespace fastddpm {
namespace {

constexpr int CHAINS = 12;  // independent sums: 4 cycles of latency at 3 multiply-adds a cycle
constexpr int64_t ROUNDS = 1 << 19;  // about a millisecond
constexpr int REPEATS = 5;           // at least

double seconds_of(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

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

// A thread's clock is its own time on a core: what other processes take is not counted.
double peak_flops(int threads, double seconds) {
  const double flop = 2.0 * double(WIDTH * CHAINS * ROUNDS);
  Scratch<float> sums(threads), taken(threads);
  volatile float seen = 0.0f;
  double best = 0.0;
  const double end = seconds_of(CLOCK_MONOTONIC) + seconds;
  for (int i = 0; i < REPEATS || seconds_of(CLOCK_MONOTONIC) < end; ++i) {
    parallel_for(threads, SERIAL_ELEMENTS, threads, [&](int64_t, int thread) {
      const double start = seconds_of(CLOCK_THREAD_CPUTIME_ID);
      sums.data[thread] = multiply_adds();
      taken.data[thread] = float(seconds_of(CLOCK_THREAD_CPUTIME_ID) - start);
    });
    double rate = 0.0;
    for (int thread = 0; thread < threads; ++thread)
      if (taken.data[thread] > 0.0f) {
        seen = seen + sums.data[thread];
        rate += flop / double(taken.data[thread]);
      }
    if (rate > best) best = rate;
  }
  return best;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
