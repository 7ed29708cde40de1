// A range asymmetric numeral system (Duda 2013): a stack of bits, onto which symbols of any mass
// are pushed and from which they are popped. Nothing here knows a distribution.
//
// The state lies in [2^48, 2^64) and trades 16-bit words with the stack below it. Masses are parts
// of 2^28, so that a state is 2^20 times as fine as they are: what coding loses is below 2^-20 bits
// a symbol. For any state, pop then push and push then pop of one interval are the identity.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

namespace fastddpm {
namespace codec {

constexpr int MASS_BITS = 28;
constexpr uint32_t TOTAL = uint32_t(1) << MASS_BITS;
constexpr uint64_t LOWEST = uint64_t(1) << 48;  // of the state

struct Interval {  // of a symbol, in [0, TOTAL)
  uint32_t start, mass;
};

class Rans {
 public:
  // An encoder's, which begins with words of `supply` and then with random ones. What bits back
  // pops before anything was pushed are these.
  explicit Rans(std::vector<uint16_t> supply) : supply(std::move(supply)), endless(true) {
    state = 1;
    for (int i = 0; i < 3; ++i) state = state << 16 | supplied();
  }

  // A decoder's; the last word is the top. The state must be at least LOWEST.
  Rans(uint64_t state, std::vector<uint16_t> words) : state(state), words(std::move(words)) {}

  // Where the symbol that `pop` takes lies.
  uint32_t slot() const { return uint32_t(state) & (TOTAL - 1); }

  void push(Interval symbol) {
    while (state >> (64 - MASS_BITS) >= symbol.mass) {
      words.push_back(uint16_t(state));
      state >>= 16;
    }
    state = (state / symbol.mass << MASS_BITS) + state % symbol.mass + symbol.start;
  }

  // False if the words have run out: nothing can be coded after that.
  bool pop(Interval symbol) {
    state = symbol.mass * (state >> MASS_BITS) + slot() - symbol.start;
    while (state < LOWEST) {
      if (!words.empty()) {
        state = state << 16 | words.back();
        words.pop_back();
      } else if (endless) {
        state = state << 16 | supplied();
      } else {
        return false;
      }
    }
    if (words.size() < lowest) lowest = words.size();
    return true;
  }

  uint64_t state;
  std::vector<uint16_t> words;  // of 16 bits, the last is the top
  uint64_t taken = 0;           // words of the supply, and random ones after them
  uint64_t lowest = 0;          // words there were since somebody set it

  // Word k of those that follow the supply (splitmix64).
  static uint16_t random(uint64_t k) {
    uint64_t z = (k + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return uint16_t(z ^ (z >> 31));
  }

 private:
  std::vector<uint16_t> supply;
  bool endless = false;

  uint16_t supplied() {
    const uint64_t k = taken++;
    return k < supply.size() ? supply[k] : random(k - supply.size());
  }
};

}  // namespace codec
}  // namespace fastddpm
