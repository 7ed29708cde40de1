// Finds the OpenMP runtime that torch runs on, if there is one, and hands loops to it. No kernels.
#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
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

struct Region {
  int64_t jobs;
  void (*body)(void*, int64_t, int);
  void* context;
};

// Every thread takes one run of consecutive jobs, the same run in every op: what it wrote in one op
// is in its cache for the next.
void share(void* argument) {
  const Region& region = *static_cast<const Region*>(argument);
  const int64_t thread = runtime().thread(), team = runtime().team();
  const int64_t end = region.jobs * (thread + 1) / team;
  for (int64_t job = region.jobs * thread / team; job < end; ++job)
    region.body(region.context, job, int(thread));
}

}  // namespace

void parallel_run(int64_t jobs, int threads, void (*body)(void*, int64_t, int), void* context) {
  const int64_t team = std::min<int64_t>(jobs, threads);
  if (team > 1 && runtime()) {
    Region region{jobs, body, context};
    runtime().parallel(share, &region, unsigned(team), 0);
  } else {
    for (int64_t job = 0; job < jobs; ++job) body(context, job, 0);
  }
}

const char* threading() { return runtime() ? "libgomp" : "none (libgomp.so.1 not found)"; }

void* scratch_alloc(int64_t bytes, bool zeroed) {
  const size_t rounded = (size_t(bytes) + 127) / 64 * 64;
  void* data = std::aligned_alloc(64, rounded);
  if (!data) throw std::bad_alloc();
  return zeroed ? std::memset(data, 0, rounded) : data;
}

void scratch_free(void* data) { std::free(data); }

}  // namespace cpu
}  // namespace fastddpm
