// Random stacks and distributions, hostile ones among them, through the coder: `check COUNT`. It is
// compiled with sanitizers; what decodes must code back to the stack that it came from.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>

#include "../csrc/codec/coder.h"
#include "../csrc/codec/gaussian.h"

using namespace fastddpm::codec;

int main(int, char** arguments) {
  const int count = std::atoi(arguments[1]), most = 64;
  std::mt19937_64 random(1);
  const auto below = [&](uint64_t end) { return random() % end; };
  const float odd[] = {0.0f,
                       -0.0f,
                       1e30f,
                       -1e30f,
                       1e-40f,
                       std::numeric_limits<float>::infinity(),
                       -std::numeric_limits<float>::infinity(),
                       std::nanf("")};
  int done = 0;
  for (int k = 0; k < count; ++k) {
    const int64_t n = int64_t(below(most)) + 1;
    float mean[most], log_variance[most], values[most];
    uint8_t pixels[most];
    const bool hostile = below(2) == 0;
    for (int64_t i = 0; i < n; ++i) {
      mean[i] = float(int64_t(below(4001)) - 2000) / 1000;
      log_variance[i] = float(int64_t(below(40001)) - 30000) / 1000;
      if (hostile && below(16) == 0) mean[i] = odd[below(8)];
      if (hostile && below(16) == 0) log_variance[i] = odd[below(8)];
    }
    std::vector<uint16_t> words(below(200));
    for (uint16_t& word : words) word = below(4) == 0 ? 0xffff : uint16_t(random());
    const uint64_t state = below(3) == 0 ? ~uint64_t(0) : LOWEST + below(~LOWEST);
    const int exponent = hostile ? int(below(129)) - 64 : -int(below(21));
    Gaussians of{
        n, mean, below(2) ? log_variance : nullptr, -7.0, exponent, below(2) == 0, below(2) == 0};
    Rans rans(state, words);
    const bool levels = below(3) == 0;
    const Status status = levels ? pop_levels(rans, of, pixels) : pop(rans, of, values);
    if (status != Status::done) continue;
    ++done;
    of.backwards = !of.backwards;
    const Status back = levels ? push_levels(rans, of, pixels) : push(rans, of, values);
    if (back != Status::done || rans.state != state || rans.words != words) {
      std::printf("stack %d is not what it was: status %d\n", k, int(back));
      return 1;
    }
  }
  std::printf("%d of %d decoded\n", done, count);
  return done > count / 10 ? 0 : 1;
}
