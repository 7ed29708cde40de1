// Finds the OpenMP runtime that torch runs on, if there is one, and hands loops to it. No kernels.
#include "parallel.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace fastddpm {
namespace cpu {
namespace {

// libgomp's entry points are looked up when first used instead of linked. torch's wheels carry
// libgomp under varying names, but always in the global scope: taking the symbols from there gives
// one pool, where a NEEDED entry could load a second libgomp that fights with the first for the
// cores.
struct Runtime {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using Query = int (*)();
  Parallel parallel = nullptr;
  Query thread = nullptr, team = nullptr;

  Runtime() {
    if (!find(RTLD_DEFAULT))
      if (void* library = dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL)) find(library);
  }

  bool find(void* library) {
    parallel = reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel"));
    thread = reinterpret_cast<Query>(dlsym(library, "omp_get_thread_num"));
    team = reinterpret_cast<Query>(dlsym(library, "omp_get_num_threads"));
    return bool(*this);
  }

  operator bool() const { return parallel && thread && team; }
};

const Runtime& runtime() {
  static const Runtime instance;
  return instance;
}

// Jobs next .. end that nobody has taken yet, as one number: a thread takes its own from the front,
// the others what is left from the back.
class Range {
 public:
  void set(int64_t next, int64_t end) { range = uint64_t(next) << 32 | uint64_t(end); }

  // A job, or -1 if none is left.
  int64_t take(bool front) {
    uint64_t now = range.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t next = now >> 32, end = now & 0xffffffffu;
      if (next >= end) return -1;
      const uint64_t rest = front ? (next + 1) << 32 | end : next << 32 | (end - 1);
      if (range.compare_exchange_weak(now, rest, std::memory_order_relaxed))
        return int64_t(front ? next : end - 1);
    }
  }

 private:
  alignas(64) std::atomic<uint64_t> range{0};
};

constexpr int64_t MAX_TEAM = 64, MAX_JOBS = int64_t(1) << 31;  // with ranges; else fixed shares

struct Region {
  int64_t jobs;
  void (*body)(void*, int64_t, int);
  void* context;
  Range* ranges;  // `asked` of them, or null
  int64_t asked;  // threads; the runtime may give fewer
};

// Every thread begins with one run of consecutive jobs, the same run in every op: what it wrote in
// one op is in its cache for the next. Then it helps those that other processes hold up.
void share(void* argument) {
  const Region& region = *static_cast<const Region*>(argument);
  const int64_t thread = runtime().thread(), team = runtime().team();
  if (!region.ranges) {
    const int64_t end = region.jobs * (thread + 1) / team;
    for (int64_t job = region.jobs * thread / team; job < end; ++job)
      region.body(region.context, job, int(thread));
    return;
  }
  for (int64_t i = 0; i < region.asked; ++i)
    for (int64_t job; (job = region.ranges[(thread + i) % region.asked].take(i == 0)) >= 0;)
      region.body(region.context, job, int(thread));
}

}  // namespace

void parallel_run(int64_t jobs, int threads, void (*body)(void*, int64_t, int), void* context) {
  const int64_t team = std::min<int64_t>(jobs, threads);
  if (team > 1 && runtime()) {
    Range ranges[MAX_TEAM];
    const bool ranged = team <= MAX_TEAM && jobs <= MAX_JOBS;
    for (int64_t i = 0; ranged && i < team; ++i)
      ranges[i].set(jobs * i / team, jobs * (i + 1) / team);
    Region region{jobs, body, context, ranged ? ranges : nullptr, team};
    runtime().parallel(share, &region, unsigned(team), 0);
  } else {
    for (int64_t job = 0; job < jobs; ++job) body(context, job, 0);
  }
}

const char* threading() { return runtime() ? "libgomp" : "none (libgomp.so.1 not found)"; }

// Large memory in huge pages where the system grants them: weights that stream past would miss the
// TLB once for every 4 KiB, and prefetchers stop at the end of a page.
void* scratch_alloc(int64_t bytes, bool zeroed) {
  constexpr size_t HUGE_PAGE = 2 * 1024 * 1024;
  const size_t size = (size_t(bytes) + 127) / 64 * 64, whole = size / HUGE_PAGE * HUGE_PAGE;
  void* data = nullptr;
  if (posix_memalign(&data, whole ? HUGE_PAGE : 64, size)) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (whole) madvise(data, whole, MADV_HUGEPAGE);  // a hint: small pages do as well
#endif
  return zeroed ? std::memset(data, 0, size) : data;
}

void scratch_free(void* data) { std::free(data); }

}  // namespace cpu
}  // namespace fastddpm
