// How the rate of a loop without memory is measured.
#pragma once
#include <time.h>

#include "parallel.h"

namespace fastddpm {
namespace {

inline double seconds_of(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// The best FLOP/s of several runs of body() on each thread, `flop` of its operations; body returns
// a sum of all its results, so that none can be left out. A thread's clock is its own time on a
// core: what other processes take is not counted.
template <class Body>
inline double best_rate(int threads, double seconds, double flop, const Body& body) {
  constexpr int REPEATS = 5;  // at least
  Scratch<float> sums(threads), taken(threads);
  volatile float seen = 0.0f;
  double best = 0.0;
  const double end = seconds_of(CLOCK_MONOTONIC) + seconds;
  for (int i = 0; i < REPEATS || seconds_of(CLOCK_MONOTONIC) < end; ++i) {
    parallel_for(threads, SERIAL_ELEMENTS, threads, [&](int64_t, int thread) {
      const double start = seconds_of(CLOCK_THREAD_CPUTIME_ID);
      sums.data[thread] = body();
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

}  // namespace
}  // namespace fastddpm
