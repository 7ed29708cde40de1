// choices: one Philox block an example; see philox.h. A batch's worth of them needs no threads.
#include <stdexcept>

#include "../../ops.h"
#include "../../philox.h"

namespace fastddpm {
namespace cpu {

void choices(const Choices& op, int) {
  if (op.levels < 1 || op.levels >= MAX_LEVELS)
    throw std::invalid_argument("choices: levels must be in 1 .. 2^31 - 1");
  for (int64_t n = 0; n < op.n; ++n) {
    const int64_t index = op.sample_index.data[n * op.sample_index.stride];
    choose(make_philox(op.seed, op.step, index), op.levels, op.t[n], op.flip[n]);
  }
}

}  // namespace cpu
}  // namespace fastddpm
