// Memory that is needed soon, fetched while something else is computed. No arithmetic.
#pragma once
#include <cstdint>

namespace fastddpm {
namespace {

// What follows a panel of weights in memory is mostly the next one. It is fetched in `calls` equal
// parts while the panel is used by one strip of rows after the other: left to the processor, the
// first strip of each panel would wait for all of it.
class Ahead {
 public:
  template <class T>
  Ahead(const T* next, int64_t count, int64_t calls)
      : at(uintptr_t(next)),
        step(uintptr_t(count) * sizeof(T) / uintptr_t(calls > 0 ? calls : 1)) {}

  void fetch() {
    __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
    at += step;
  }

 private:
  uintptr_t at, step;
};

}  // namespace
}  // namespace fastddpm
