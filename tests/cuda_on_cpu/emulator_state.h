// What emulator.cpp shows of its state: the made-up device, and who is running, for races.cpp.
#pragma once
#include <driver_types.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

struct Device {
  int shared_bytes = 227 << 10;  // per block, as on sm_90
  int processors = 132;
};

// The device of the launches to come: the ordinal of one that is just so, made up if there is none.
void use_device(Device wanted);

// The next so many launches are refused, as by a device that lacks the resources.
void refuse_launches(int count);

// How often any kernel was allowed more shared memory, and what the calling thread's last error is.
int shared_memory_calls();
cudaError_t last_error();
void leave_error();  // as somebody else's failed call does

// Says of two memory accesses whether a barrier lies between them. A thread's time is the count of
// the barriers of its block, and for __syncwarp a vector clock over the lanes of its warp.
struct Clock {
  bool running = false;
  uint32_t first_block = 0, block = 0;  // of the launch, and now; counted over all launches
  uint32_t epoch = 0;                   // barriers of this block so far
  uint32_t thread = 0;
  const void* shared = nullptr;  // the dynamic shared memory
  size_t shared_bytes = 0;
  std::vector<uint32_t> seen;  // [thread][lane]: how many __syncwarp of that lane it has seen

  void start_launch(const void* memory, size_t bytes) {
    first_block = block + 1, shared = memory, shared_bytes = bytes;
  }
  void start_block(unsigned threads) {
    ++block, epoch = 0;
    seen.assign(size_t(threads) * 32, 0);
    for (unsigned t = 0; t < threads; ++t) seen[t * 32 + t % 32] = 1;
  }
  void enter(uint32_t t) { thread = t, running = true; }
  void leave() { running = false; }
  void block_barrier() { ++epoch; }
  void warp_barrier(unsigned first, unsigned mask) {
    uint32_t joined[32] = {};
    for (unsigned a = 0; a < 32; ++a)
      for (unsigned lane = 0; mask >> a & 1 && lane < 32; ++lane)
        if (seen[(first + a) * 32 + lane] > joined[lane])
          joined[lane] = seen[(first + a) * 32 + lane];
    for (unsigned a = 0; a < 32; ++a) {
      if (!(mask >> a & 1)) continue;
      for (unsigned lane = 0; lane < 32; ++lane) seen[(first + a) * 32 + lane] = joined[lane];
      ++seen[(first + a) * 32 + a];
    }
  }
  uint32_t own() const { return seen[thread * 32 + thread % 32]; }
};

struct LastLaunch {
  unsigned threads = 0;  // of a block
  size_t shared_bytes = 0;
};

extern Clock clock;
extern LastLaunch last_launch;
extern char *stacks, *stacks_end;  // of the fibers: private to each

[[noreturn]] void fail_from_access(const char* what, const void* address);

}  // namespace emulator
