// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), one block at a time.
#pragma once

#include <cstdint>

#include "gencore/types.h"

namespace gencore {

struct Philox {
  static constexpr std::uint32_t m0 = 0xD2511F53u, m1 = 0xCD9E8D57u;
  static constexpr std::uint32_t w0 = 0x9E3779B9u, w1 = 0xBB67AE85u;
  static constexpr int rounds = 10;
};

struct PhiloxBlock {
  std::uint32_t word[4];
};

// The four words of the block `counter`; key(round, half) is that half of a round's key.
template <class RoundKey>
GENCORE_INLINE PhiloxBlock philox4x32(PhiloxBlock counter, RoundKey&& key) {
  std::uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  GENCORE_UNROLL
  for (int round = 0; round < Philox::rounds; ++round) {
    const std::uint64_t p0 = static_cast<std::uint64_t>(c0) * Philox::m0;
    const std::uint64_t p1 = static_cast<std::uint64_t>(c2) * Philox::m1;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ key(round, 0);
    c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ key(round, 1);
    c3 = static_cast<std::uint32_t>(p0);
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace gencore
