// One thread pool for torch and for us: loops run on the libgomp that torch loaded.
//
// Results never depend on the thread count: work is cut into jobs by the problem's shape alone,
// each job is computed by one thread, and sums over jobs are taken in job order afterwards.
#pragma once
#include <cstdint>

namespace fastddpm {
namespace cpu {

// Calls body(context, job, thread) for every job in [0, jobs), thread in [0, threads). body must
// not throw.
void parallel_run(int64_t jobs, int threads, void (*body)(void*, int64_t, int), void* context);

// Which runtime the threads come from, for reports: "libgomp" or why there is none.
const char* threading();

// 64-byte aligned; throws std::bad_alloc. Freed by scratch_free.
void* scratch_alloc(int64_t bytes, bool zeroed = true);
void scratch_free(void* data);

}  // namespace cpu

namespace {

// Work worth a second thread: below this many elements waking it costs more than it gives.
constexpr int64_t SERIAL_ELEMENTS = 1 << 15;

template <class Body>
inline void parallel_for(int64_t jobs, int64_t elements, int threads, const Body& body) {
  cpu::parallel_run(
      jobs, elements < SERIAL_ELEMENTS ? 1 : threads,
      [](void* context, int64_t job, int thread) {
        (*static_cast<const Body*>(context))(job, thread);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t count, bool zeroed = true)
      : data(static_cast<T*>(cpu::scratch_alloc(count * int64_t(sizeof(T)), zeroed))) {}
  ~Scratch() { cpu::scratch_free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace
}  // namespace fastddpm
