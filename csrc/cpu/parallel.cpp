// Finds the OpenMP runtime that torch runs on, if there is one, and hands loops to it. No kernels.
#include "parallel.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

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

namespace {

constexpr size_t HUGE_PAGE = 2 * 1024 * 1024, LEAST = 128 * 1024;

// Blocks of LEAST bytes or more that were freed, up to LIMIT bytes of them, the oldest first: what
// an op needs is about what the next one needs, and the system clears every page that it hands out,
// which takes as long as an op's own pass over the memory.
class Kept {
 public:
  // A block that a call had before, that is not much too large and lies right, or null.
  void* take(size_t size, size_t alignment) {
    const std::lock_guard<std::mutex> turn(mutex);
    size_t best = free.size();
    for (size_t i = 0; i < free.size(); ++i)
      if (free[i].size >= size && free[i].size <= size + size / 2 &&
          uintptr_t(free[i].data) % alignment == 0 &&
          (best == free.size() || free[i].size < free[best].size))
        best = i;
    if (best == free.size()) return nullptr;
    const Block block = free[best];
    free.erase(free.begin() + ptrdiff_t(best));
    total -= block.size;
    used.push_back(block);
    return block.data;
  }

  void add(void* data, size_t size) {
    const std::lock_guard<std::mutex> turn(mutex);
    used.push_back({data, size});
  }

  // Whether it is one of these blocks, which then are taken care of.
  bool give(void* data) {
    const std::lock_guard<std::mutex> turn(mutex);
    for (size_t i = used.size(); i-- > 0;)
      if (used[i].data == data) {
        free.push_back(used[i]);
        total += used[i].size;
        used.erase(used.begin() + ptrdiff_t(i));
        shrink(LIMIT);
        return true;
      }
    return false;
  }

  void clear() {
    const std::lock_guard<std::mutex> turn(mutex);
    shrink(0);
  }

 private:
  static constexpr size_t LIMIT = 32 * HUGE_PAGE;
  struct Block {
    void* data;
    size_t size;
  };
  std::mutex mutex;
  std::vector<Block> free, used;
  size_t total = 0;

  void shrink(size_t limit) {
    while (total > limit) {
      total -= free.front().size;
      std::free(free.front().data);
      free.erase(free.begin());
    }
  }
};

Kept& kept() {
  static Kept& instance = *new Kept;  // outlives whatever frees memory at the very end
  return instance;
}

}  // namespace

// Large memory in huge pages where the system grants them: weights that stream past would miss the
// TLB once for every 4 KiB, and prefetchers stop at the end of a page.
void* scratch_alloc(int64_t bytes, bool zeroed) {
  const size_t size = (size_t(bytes) + 127) / 64 * 64, whole = size / HUGE_PAGE * HUGE_PAGE;
  const size_t alignment = whole ? HUGE_PAGE : 64;
  const bool large = size >= LEAST;
  void* data = large ? kept().take(size, alignment) : nullptr;
  if (!data) {
    if (posix_memalign(&data, alignment, size)) {
      kept().clear();
      if (posix_memalign(&data, alignment, size)) throw std::bad_alloc();
    }
#ifdef MADV_HUGEPAGE
    if (whole) madvise(data, whole, MADV_HUGEPAGE);  // a hint: small pages do as well
#endif
    if (large) kept().add(data, size);
  }
  return zeroed ? std::memset(data, 0, size) : data;
}

void scratch_free(void* data) {
  if (data && !kept().give(data)) std::free(data);
}

}  // namespace cpu
}  // namespace fastddpm
