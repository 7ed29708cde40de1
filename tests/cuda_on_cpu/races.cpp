// Finds data races of kernels: what -fsanitize=thread makes the compiler call at every memory
// access, implemented here instead of by ThreadSanitizer's own library.
//
// That library knows threads, not barriers of a block; it has to be loaded before Python, refuses
// some address-space layouts, and keeps a few of the last accesses only. Here two accesses race if
// they touch the same byte, one of them writes, and they are of different threads of a block
// with no barrier between them, or of different blocks of one launch (of global memory: a block's
// shared memory is its own). Barriers: __syncthreads, and __syncwarp for the lanes of its mask; a
// shuffle orders no memory, as on the device. The compiler leaves out what can't be shared.
//
// The same calls count the accesses to memory ranges that a test watches.
#include <link.h>

#include <memory>
#include <unordered_map>

#include "emulator_state.h"

namespace emulator {
namespace {

struct Access {
  uint32_t block = 0, epoch = 0, time = 0, thread = 0;
};

struct Cell {  // of a byte: the last write, the last read, and the last read by another thread
  Access write, read, other_read;
};

constexpr uintptr_t PAGE = 4096;
std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> pages;

Cell& cell(uintptr_t address) {
  static uintptr_t last = 0;
  static Cell* cells = nullptr;
  const uintptr_t page = address / PAGE;
  if (!cells || page != last) {
    std::unique_ptr<Cell[]>& found = pages[page];
    if (!found) found.reset(new Cell[PAGE]);
    last = page, cells = found.get();
  }
  return cells[address % PAGE];
}

struct Range {
  uintptr_t first, end;
  bool holds(uintptr_t address) const { return address >= first && address < end; }
};

// The writable data of this library: __shared__ variables are statics.
Range find_statics() {
  Range range{0, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        const uintptr_t inside = reinterpret_cast<uintptr_t>(&last_launch);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          const uintptr_t first = info->dlpi_addr + segment.p_vaddr;
          const Range found{first, first + segment.p_memsz};
          if (segment.p_type == PT_LOAD && found.holds(inside))
            *static_cast<Range*>(result) = found;
        }
        return 0;
      },
      &range);
  return range;
}

bool is_shared(uintptr_t address) {
  static const Range statics = find_statics();
  const uintptr_t first = reinterpret_cast<uintptr_t>(clock.shared);
  return statics.holds(address) || Range{first, first + clock.shared_bytes}.holds(address);
}

// Whether `before` and an access of the running thread could happen in either order.
bool unordered(const Access& before, bool shared) {
  if (before.block < clock.first_block || before.block == 0) return false;  // an earlier launch
  if (before.block != clock.block) return !shared;
  if (before.thread == clock.thread || before.epoch < clock.epoch) return false;
  if (before.thread / 32 != clock.thread / 32) return true;
  return clock.seen[clock.thread * 32 + before.thread % 32] < before.time;
}

struct Watched : Range {
  uint64_t accesses[2], bytes[2];  // reads, writes
};
std::vector<Watched> watched;

template <bool WRITE>
void access(const void* pointer, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (!clock.running || Range{uintptr_t(stacks), uintptr_t(stacks_end)}.holds(address)) return;
  for (Watched& range : watched)
    if (range.holds(address)) ++range.accesses[WRITE], range.bytes[WRITE] += bytes;
  const bool shared = is_shared(address);
  const Access now{clock.block, clock.epoch, clock.own(), clock.thread};
  for (uintptr_t at = address; at < address + bytes; ++at) {
    Cell& c = cell(at);
    const bool race = unordered(c.write, shared) ||
                      (WRITE && (unordered(c.read, shared) || unordered(c.other_read, shared)));
    if (race) {
      c = {};
      fail_from_access(shared ? "a race in shared memory" : "a race in global memory", pointer);
    }
    if (WRITE) {
      c.write = now;
      c.read = c.other_read = {};
    } else {
      if (c.read.thread != now.thread || c.read.block != now.block) c.other_read = c.read;
      c.read = now;
    }
  }
}

}  // namespace
}  // namespace emulator

// ---- for the tests -----------------------------------------------------------------------------

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

EXPORTED void emulator_watch(const void* first, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(first);
  emulator::watched.push_back({{address, address + bytes}, {0, 0}, {0, 0}});
}

// counts: reads, writes, bytes read, bytes written of the watched range `which`.
EXPORTED void emulator_counts(int which, uint64_t counts[4]) {
  const auto& range = emulator::watched.at(size_t(which));
  counts[0] = range.accesses[0], counts[1] = range.accesses[1];
  counts[2] = range.bytes[0], counts[3] = range.bytes[1];
}

EXPORTED void emulator_unwatch() { emulator::watched.clear(); }

// ---- for the compiler --------------------------------------------------------------------------

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

#define FASTDDPM_HOOKS(bytes)                                                       \
  void __tsan_read##bytes(void* p) { emulator::access<false>(p, bytes); }           \
  void __tsan_write##bytes(void* p) { emulator::access<true>(p, bytes); }           \
  void __tsan_unaligned_read##bytes(void* p) { emulator::access<false>(p, bytes); } \
  void __tsan_unaligned_write##bytes(void* p) { emulator::access<true>(p, bytes); }
FASTDDPM_HOOKS(1)
FASTDDPM_HOOKS(2)
FASTDDPM_HOOKS(4)
FASTDDPM_HOOKS(8)
FASTDDPM_HOOKS(16)

// The guard of a static in the host's code.
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return *p; }

void __tsan_read_range(void* p, size_t bytes) { emulator::access<false>(p, bytes); }
void __tsan_write_range(void* p, size_t bytes) { emulator::access<true>(p, bytes); }
}
