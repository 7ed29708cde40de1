// randn: the walk over samples and chunks; the numbers are those of philox.h.
#include "../isa.h"
#include "normals.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

void randn(const Randn& op, int threads) {
  const int64_t all = op.n * op.numel;
  for_chunks(op.n, op.numel, CHUNK, all, threads, [&](int64_t n, int64_t first, int64_t count) {
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
