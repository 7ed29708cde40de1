// A digest of memory that tells whether any of it has changed. No arithmetic of a layer.
#include "../isa.h"
#include "../parallel.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t CHUNK = 64 * 1024;  // words of a job
constexpr uint32_t PRIME = 16777619;  // odd: a step loses nothing of a word or of what came before
constexpr int FOLD = 15;

// Of what memory holds, be it aligned for its own type alone.
typedef uint32_t Word __attribute__((aligned(2), may_alias));

// FNV-1a, whose products carry nothing from a high bit to a low one: a sum's high half is folded
// onto its low one, or two words whose signs have changed would have the digest that they had.
inline uint32_t added(uint32_t lane, uint32_t word) {
  lane = (lane ^ word) * PRIME;
  return lane ^ (lane >> FOLD);
}

// Words in DIGEST lanes. A change of one word always changes its lane.
void add_words(const Word* __restrict words, int64_t count, uint32_t* __restrict lanes) {
  for (; count >= DIGEST; count -= DIGEST, words += DIGEST)
    for (int64_t i = 0; i < DIGEST; ++i) lanes[i] = added(lanes[i], words[i]);
  for (int64_t i = 0; i < count; ++i) lanes[i] = added(lanes[i], words[i]);
}

}  // namespace

void digest(const void* data, int64_t bytes, uint32_t* lanes, int threads) {
  const int64_t words = bytes / 4, chunks = words / CHUNK + 1;
  const auto* from = static_cast<const Word*>(data);
  const Scratch<uint32_t> parts(chunks * DIGEST);
  parallel_for(chunks, words / 4, threads, [&](int64_t chunk, int) {
    const int64_t first = chunk * CHUNK, rest = words - first;
    uint32_t part[DIGEST] = {};
    add_words(from + first, rest < CHUNK ? rest : CHUNK, part);
    if (rest < CHUNK && bytes % 4) {  // what is left is less than a word
      uint32_t word = 0;
      __builtin_memcpy(&word, from + words, size_t(bytes % 4));
      part[DIGEST - 1] = added(part[DIGEST - 1], word);
    }
    __builtin_memcpy(parts.data + chunk * DIGEST, part, sizeof part);
  });
  for (int64_t i = 0; i < DIGEST; ++i) lanes[i] = 0;
  add_words(parts.data, chunks * DIGEST, lanes);
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
