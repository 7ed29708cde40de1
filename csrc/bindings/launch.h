// How the functions of ops.h are called from Python: `where` is the thread count on the CPU and the
// stream's handle on CUDA.
#pragma once
#include "reader.h"

namespace fastddpm {
namespace {

template <class Op>
void launch(void (*run)(const Op&, int), const Op& op, int64_t where) {
  const int threads = thread_count(where);
  py::gil_scoped_release nogil;
  run(op, threads);
}

template <class Op>
void launch(void (*run)(const Op&, void*), const Op& op, int64_t where) {
  py::gil_scoped_release nogil;
  run(op, reinterpret_cast<void*>(where));
}

template <class Op>
constexpr bool is_cuda(void (*)(const Op&, void*)) {
#if defined(FASTDDPM_CUDA_ON_CPU)  // a build of the tests, which runs the kernels on the CPU
  return false;
#else
  return true;
#endif
}

template <class Op>
constexpr bool is_cuda(void (*)(const Op&, int)) {
  return false;
}

// Whether an op is given memory for sums, the emulated ones of the tests too.
template <class Op>
constexpr bool needs_workspace(void (*)(const Op&, void*)) {
  return true;
}

template <class Op>
constexpr bool needs_workspace(void (*)(const Op&, int)) {
  return false;
}

}  // namespace
}  // namespace fastddpm
