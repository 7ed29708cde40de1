// A digest of memory that tells whether any of it has changed. No arithmetic of a layer.
#include "../isa.h"
#include "../parallel.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t CHUNK = 64 * 1024;  // words of a job
constexpr uint32_t PRIME = 16777619;  // odd: a step loses nothing of a word or of what came before

// Of what memory holds, be it aligned for its own type alone.
typedef uint32_t Word __attribute__((aligned(2), may_alias));

// FNV-1a of words, in DIGEST lanes. A change of one word always changes its lane.
void add_words(const Word* __restrict words, int64_t count, uint32_t* __restrict lanes) {
  for (; count >= DIGEST; count -= DIGEST, words += DIGEST)
    for (int64_t i = 0; i < DIGEST; ++i) lanes[i] = (lanes[i] ^ words[i]) * PRIME;
  for (int64_t i = 0; i < count; ++i) lanes[i] = (lanes[i] ^ words[i]) * PRIME;
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
      part[DIGEST - 1] = (part[DIGEST - 1] ^ word) * PRIME;
    }
    __builtin_memcpy(parts.data + chunk * DIGEST, part, sizeof part);
  });
  for (int64_t i = 0; i < DIGEST; ++i) lanes[i] = 0;
  add_words(parts.data, chunks * DIGEST, lanes);
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
