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

void digest(const Bytes* spans, int64_t count, uint32_t* lanes, int threads) {
  int64_t chunks = 0, words = 0;
  for (int64_t i = 0; i < count; ++i)
    chunks += spans[i].count / 4 / CHUNK + 1, words += spans[i].count / 4;
  const Scratch<Bytes> pieces(chunks);
  for (int64_t i = 0, at = 0; i < count; ++i) {
    const auto* from = static_cast<const char*>(spans[i].data);
    int64_t left = spans[i].count;  // the last piece is the one with less than a chunk, or nothing
    for (; left / 4 >= CHUNK; left -= 4 * CHUNK, from += 4 * CHUNK)
      pieces.data[at++] = {from, 4 * CHUNK};
    pieces.data[at++] = {from, left};
  }
  const Scratch<uint32_t> parts(chunks * DIGEST);
  parallel_for(chunks, words / 4, threads, [&](int64_t chunk, int) {
    const Bytes piece = pieces.data[chunk];
    const auto* from = static_cast<const Word*>(piece.data);
    uint32_t part[DIGEST] = {};
    add_words(from, piece.count / 4, part);
    if (piece.count % 4) {  // what is left is less than a word
      uint32_t word = 0;
      __builtin_memcpy(&word, from + piece.count / 4, size_t(piece.count % 4));
      part[DIGEST - 1] = added(part[DIGEST - 1], word);
    }
    __builtin_memcpy(parts.data + chunk * DIGEST, part, sizeof part);
  });
  for (int64_t i = 0; i < DIGEST; ++i) lanes[i] = 0;
  add_words(parts.data, chunks * DIGEST, lanes);
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
