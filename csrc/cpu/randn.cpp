// randn: the walk over samples and chunks; the numbers are those of philox.h.
#include "isa.h"
#include "normals.h"
#include "parallel.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

void randn(const Randn& op, int threads) {
  const int64_t chunks = (op.numel + CHUNK - 1) / CHUNK, total = op.n * op.numel;
  parallel_for(op.n * chunks, total, threads, [&](int64_t job, int) {
    const int64_t n = job / chunks, first = job % chunks * CHUNK;
    const int64_t count = op.numel - first < CHUNK ? op.numel - first : CHUNK;
    const View out{static_cast<char*>(op.out) + n * op.numel * element_size(op.dtype),
                   op.dtype,
                   {1, 1, op.numel},
                   {0, 0, 1}};
    float z[CHUNK];
    normals_chw(stream(op.random, n), first, count, z);
    store(out, first, count, z);
  });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
