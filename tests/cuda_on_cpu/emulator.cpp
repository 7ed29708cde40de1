// Runs the blocks of a launch, each CUDA thread a fiber on a stack of its own; and the few
// functions of the CUDA runtime that csrc/cuda calls, for a device that is made up.
//
// The scheduler goes round the fibers. One that waits at a barrier or a warp operation is skipped
// until the last thread that is missing arrives and lets all of them go. A round in which nobody
// moves is a deadlock. x86-64 only: the switch between stacks is ten instructions of assembly.
#include "emulator.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator_state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");

namespace emulator {

const Thread* thread = nullptr;
dim3 block_index, block_dim, grid_dim;
Clock clock;
LastLaunch last_launch;
char *stacks = nullptr, *stacks_end = nullptr;

namespace {

constexpr size_t STACK = 256 << 10, GUARD = 4096;
constexpr unsigned MAX_THREADS = 1024;

enum class Wait { no, barrier, warp };

struct Fiber : Thread {
  void* stack_pointer;
  char* stack;
  bool done;
  Wait wait;
  void* fake_stack;  // of AddressSanitizer
};

struct Lane {     // what a lane waits for
  int operation;  // 0: nothing
  unsigned mask;
  uint64_t in, out;
  int source;
};

enum Operation { NONE, SHUFFLE, BALLOT, SYNC };

struct Warp {
  Lane lane[32];
  unsigned live;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Fiber* running = nullptr;
const std::function<void()>* body;
unsigned live, arrived;
int barrier_line;
std::unique_ptr<unsigned char[]> dynamic;
std::string error;
void* scheduler_pointer;
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake;
const void* scheduler_stack;
size_t scheduler_size;
#endif

void to_scheduler(bool for_ever) {
  Fiber* fiber = running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fiber->fake_stack, scheduler_stack,
                                 scheduler_size);
#else
  (void)for_ever;
#endif
  emulator_switch(&fiber->stack_pointer, scheduler_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber->fake_stack, &scheduler_stack, &scheduler_size);
#endif
}

void to_fiber(Fiber& fiber) {
  running = &fiber;
  thread = &fiber;
  clock.enter(fiber.linear);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake, fiber.stack, STACK);
#endif
  emulator_switch(&scheduler_pointer, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
  running = nullptr;
  thread = nullptr;
  clock.leave();
}

// Ends the launch: the scheduler throws on the stack that launched.
[[noreturn]] void fail(const std::string& what) {
  const auto text = [](const dim3& d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) +
           ")";
  };
  error = what + " [block " + text(block_index) + ", thread " + text(running->index) + "]";
  for (;;) to_scheduler(true);
}

void wait(Wait reason) {
  running->wait = reason;
  while (running->wait != Wait::no) to_scheduler(false);
}

void release_barrier() {  // once all have arrived; one that has returned no longer counts
  if (arrived < live || arrived == 0) return;
  arrived = 0;
  clock.block_barrier();
  for (Fiber& fiber : fibers)
    if (fiber.wait == Wait::barrier) fiber.wait = Wait::no;
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  (*body)();
  running->done = true;
  --live;
  warps[running->linear / 32].live &= ~(1u << running->lane);
  release_barrier();
  to_scheduler(true);
  __builtin_unreachable();
}

// Every lane of the mask arrives with the same operation and mask; the last one runs it for all.
uint64_t collective(Operation operation, unsigned mask, uint64_t in, int source) {
  const unsigned first = running->linear / 32 * 32;
  Warp& warp = warps[first / 32];
  if (!(mask >> running->lane & 1)) fail("a warp operation whose mask lacks the calling lane");
  if (mask & ~warp.live) fail("a warp operation whose mask names a lane that is not there");
  Lane& mine = warp.lane[running->lane];
  mine = {operation, mask, in, 0, source};
  for (int lane = 0; lane < 32; ++lane) {
    const Lane& other = warp.lane[lane];
    if (!(mask >> lane & 1)) continue;
    if (other.operation != NONE && (other.operation != operation || other.mask != mask))
      fail("the lanes of one mask wait at different warp operations or masks");
    if (other.operation == NONE) {
      wait(Wait::warp);
      return mine.out;
    }
  }
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) votes |= unsigned(warp.lane[lane].in & 1) << lane;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const int from = warp.lane[lane].source;
    if (operation == SHUFFLE && !(mask >> from & 1))
      fail("a shuffle reads a lane outside its mask");
    warp.lane[lane].out = operation == SHUFFLE ? warp.lane[from].in : votes;
  }
  if (operation == SYNC) clock.warp_barrier(first, mask);
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    warp.lane[lane].operation = NONE;
    fibers[first + lane].wait = Wait::no;
  }
  return mine.out;
}

void start_fiber(unsigned linear) {
  Fiber& fiber = fibers[linear];
  fiber = {};
  fiber.index = dim3(linear % block_dim.x, linear / block_dim.x % block_dim.y,
                     linear / block_dim.x / block_dim.y);
  fiber.linear = linear;
  fiber.lane = linear % 32;
  fiber.stack = stacks + linear * (STACK + GUARD) + GUARD;
  warps[linear / 32].live |= 1u << fiber.lane;
  void** top = reinterpret_cast<void**>(fiber.stack + STACK) - 1;  // as after a call instruction
  *--top = reinterpret_cast<void*>(fiber_main);
  fiber.stack_pointer = top - 6;  // six registers of any value
}

void run_block(unsigned threads) {
  fibers.resize(threads);
  warps.assign((threads + 31) / 32, Warp{});
  live = threads;
  arrived = 0;
  clock.start_block(threads);
  for (unsigned linear = 0; linear < threads; ++linear) start_fiber(linear);
  for (bool moved = true; live > 0;) {
    if (!moved) error = "deadlock: no thread of the block can go on";
    moved = false;
    for (Fiber& fiber : fibers) {
      if (!error.empty()) {
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(stacks, size_t(stacks_end - stacks));
#endif
        throw std::runtime_error(error);
      }
      if (fiber.done || fiber.wait != Wait::no) continue;
      moved = true;
      to_fiber(fiber);
    }
  }
}

void make_stacks() {
  const size_t bytes = MAX_THREADS * (STACK + GUARD);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stacks = static_cast<char*>(memory);
  stacks_end = stacks + bytes;
  for (unsigned i = 0; i < MAX_THREADS; ++i)
    mprotect(stacks + i * (STACK + GUARD), GUARD, PROT_NONE);
}

}  // namespace

// ---- devices and errors ------------------------------------------------------------------------

namespace {

std::mutex mutex;  // of all that follows
std::vector<Device> devices(1);
int ordinal = 0;
std::map<std::pair<const void*, int>, size_t> allowed;  // shared memory of kernel and device
int refused = 0, attribute_calls = 0;
thread_local cudaError_t error_left = cudaSuccess;

cudaError_t leave(cudaError_t status) {
  if (status != cudaSuccess) error_left = status;
  return status;
}

// Why the current device does not take this launch.
cudaError_t refusal(const void* function, dim3 grid, dim3 block, size_t shared_bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (refused > 0) return --refused, cudaErrorLaunchOutOfResources;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads < 1 || threads > MAX_THREADS || block.z > 64 || !grid.x || !grid.y || !grid.z ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  const auto found = allowed.find({function, ordinal});
  const size_t most = found == allowed.end() ? 48 << 10 : found->second;
  return shared_bytes > most ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

void use_device(Device wanted) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (ordinal = 0; ordinal < int(devices.size()); ++ordinal)
    if (devices[ordinal].shared_bytes == wanted.shared_bytes &&
        devices[ordinal].processors == wanted.processors)
      return;
  devices.push_back(wanted);
}

void refuse_launches(int count) {
  const std::lock_guard<std::mutex> lock(mutex);
  refused = count;
}

int shared_memory_calls() {
  const std::lock_guard<std::mutex> lock(mutex);
  return attribute_calls;
}

cudaError_t last_error() { return error_left; }

void leave_error() { leave(cudaErrorInvalidDevice); }

// ---- the launch --------------------------------------------------------------------------------

cudaError_t launch(const char* name, const void* function, dim3 grid, dim3 block,
                   size_t shared_bytes, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const cudaError_t status = refusal(function, grid, block, shared_bytes);
  if (status != cudaSuccess) return leave(status);
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  last_launch = {unsigned(threads), shared_bytes};
  if (!stacks) make_stacks();
  body = &kernel;
  grid_dim = grid, block_dim = block;
  error.clear();
  dynamic.reset(new unsigned char[shared_bytes]);  // the exact size: an overrun shows
  clock.start_launch(dynamic.get(), shared_bytes);
  for (block_index.z = 0; block_index.z < grid.z; ++block_index.z)
    for (block_index.y = 0; block_index.y < grid.y; ++block_index.y)
      for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) {
        std::memset(dynamic.get(), 0xff, shared_bytes);  // NaN: a read before a write shows
        run_block(unsigned(threads));
        if (!error.empty()) throw std::runtime_error(std::string(name) + ": " + error);
      }
  return cudaSuccess;
}

void fail_from_access(const char* what, const void* address) {
  char text[32];
  std::snprintf(text, sizeof text, " at %p", address);
  fail(what + std::string(text));
}

void* dynamic_shared() { return dynamic.get(); }

void barrier(int line) {
  if (arrived && barrier_line != line)
    fail("the threads of a block wait at different __syncthreads");
  barrier_line = line;
  ++arrived;
  running->wait = Wait::barrier;
  release_barrier();
  while (running->wait != Wait::no) to_scheduler(false);
}

void warp_barrier(unsigned mask) { collective(SYNC, mask, 0, 0); }

uint64_t shuffle(unsigned mask, uint64_t word, int source) {
  return collective(SHUFFLE, mask, word, source);
}

unsigned ballot(unsigned mask, bool vote) { return unsigned(collective(BALLOT, mask, vote, 0)); }

}  // namespace emulator

// ---- the CUDA runtime --------------------------------------------------------------------------

cudaError_t cudaGetDevice(int* current) {
  const std::lock_guard<std::mutex> lock(emulator::mutex);
  *current = emulator::ordinal;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const std::lock_guard<std::mutex> lock(emulator::mutex);
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulator::devices[device].shared_bytes;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = emulator::devices[device].processors;
      return cudaSuccess;
    default:
      return emulator::leave(cudaErrorInvalidValue);
  }
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::mutex> lock(emulator::mutex);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      value > emulator::devices[emulator::ordinal].shared_bytes)
    return emulator::leave(cudaErrorInvalidValue);
  ++emulator::attribute_calls;
  emulator::allowed[{function, emulator::ordinal}] = size_t(value);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(emulator::error_left, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    default:
      return "an error that the emulator does not make";
  }
}
