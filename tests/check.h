// What check programs run kernels with: threads whose jobs come in reverse order, so that none may
// wait for another, and memory that is full of NaN when it is handed out, so that a read of what
// nothing wrote shows. They take the place of csrc/cpu/parallel.cpp and isa.cpp; a program knows
// one instruction set, that of its compiler flags, and is the only file that includes this.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "../csrc/cpu/isa.h"
#include "../csrc/cpu/parallel.h"

namespace fastddpm {
namespace cpu {

const char* isa() { return "plain"; }

void parallel_run(int64_t jobs, int threads, void (*body)(void*, int64_t, int), void* context) {
  std::vector<std::thread> team;
  for (int thread = 0; thread < threads; ++thread)
    team.emplace_back([=] {
      for (int64_t job = jobs - 1 - thread; job >= 0; job -= threads) body(context, job, thread);
    });
  for (std::thread& member : team) member.join();
}

void* scratch_alloc(int64_t bytes, bool zeroed) {
  void* data = nullptr;
  if (posix_memalign(&data, 64, size_t(bytes ? bytes : 1))) throw std::bad_alloc();
  return std::memset(data, zeroed ? 0 : 0xff, size_t(bytes));
}

void scratch_free(void* data) { std::free(data); }

}  // namespace cpu
}  // namespace fastddpm

namespace {

std::mt19937 generator(0);
int failures = 0;

std::vector<float> normals(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> x;
  for (int64_t i = 0; i < count; ++i) x.push_back(normal(generator));
  return x;
}

}  // namespace
