// Makes the noise of an item in registers.
#pragma once

#include "gencore/philox.h"
#include "items.cuh"

namespace gencore::cuda {

// The key as kernels take it. Words that the host knows come as round keys, which instructions then read from constant
// memory; those on the device are read when the kernel runs.
struct NoiseWords {
  const std::int64_t* on_device;
  std::int64_t rows;
  std::uint64_t sample;
  std::uint32_t stream;
  std::uint32_t round_key[Philox::rounds][2];
};

inline NoiseWords noise_words(const NoiseKey& key) {
  NoiseWords words{};
  if (key.on_device) {
    words.on_device = key.words;
    words.rows = key.rows;
    return words;
  }
  const auto seed = static_cast<std::uint64_t>(key.words[0]);
  words.stream = static_cast<std::uint32_t>(key.words[1]);
  words.sample = static_cast<std::uint64_t>(key.words[2]);
  for (std::uint32_t i = 0; i < Philox::rounds; ++i) {
    words.round_key[i][0] = static_cast<std::uint32_t>(seed) + i * Philox::w0;
    words.round_key[i][1] = static_cast<std::uint32_t>(seed >> 32) + i * Philox::w1;
  }
  return words;
}

// What the noise of one row begins with.
template <bool key_on_device>
struct RowNoise {
  const NoiseWords* words;
  std::uint64_t sample;
  std::uint32_t stream, seed_low, seed_high;

  __device__ __forceinline__ void begin(const NoiseWords& key, std::int64_t row) {
    words = &key;
    if constexpr (key_on_device) {
      const std::int64_t* const own = key.on_device + (key.rows == 0 ? 0 : 3 * row);
      const auto seed = static_cast<std::uint64_t>(own[0]);
      seed_low = static_cast<std::uint32_t>(seed);
      seed_high = static_cast<std::uint32_t>(seed >> 32);
      stream = static_cast<std::uint32_t>(own[1]);
      sample = static_cast<std::uint64_t>(own[2]) + (key.rows == 0 ? static_cast<std::uint64_t>(row) : 0);
    } else {
      stream = key.stream;
      sample = key.sample + static_cast<std::uint64_t>(row);
    }
  }

  // The four words of a block of the row.
  __device__ __forceinline__ void block(std::uint32_t number, std::uint32_t (&word)[4]) const {
    std::uint32_t c0 = number, c1 = stream, c2 = static_cast<std::uint32_t>(sample);
    std::uint32_t c3 = static_cast<std::uint32_t>(sample >> 32);
#pragma unroll
    for (int i = 0; i < Philox::rounds; ++i) {
      const std::uint64_t p0 = static_cast<std::uint64_t>(c0) * Philox::m0,
                          p1 = static_cast<std::uint64_t>(c2) * Philox::m1;
      std::uint32_t k0, k1;
      if constexpr (key_on_device) {
        k0 = seed_low + static_cast<std::uint32_t>(i) * Philox::w0;
        k1 = seed_high + static_cast<std::uint32_t>(i) * Philox::w1;
      } else {
        k0 = words->round_key[i][0];
        k1 = words->round_key[i][1];
      }
      c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<std::uint32_t>(p1);
      c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<std::uint32_t>(p0);
    }
    word[0] = c0;
    word[1] = c1;
    word[2] = c2;
    word[3] = c3;
  }
};

struct Normals {
  static __device__ __forceinline__ void apply(const std::uint32_t (&word)[4], float* value) {
    box_muller<Lane>(word[0], word[1], value[0], value[1]);
    box_muller<Lane>(word[2], word[3], value[2], value[3]);
  }
};

struct Uniforms {
  static __device__ __forceinline__ void apply(const std::uint32_t (&word)[4], float* value) {
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = unit_uniform<Lane>(word[i]);
  }
};

// The noise of an item's elements in the draw whose first block is `first_block`.
template <class Transform, class T, bool channels_last, bool key_on_device>
__device__ __forceinline__ void make_noise(const RowNoise<key_on_device>& row, const Item<T, channels_last>& item,
                                           std::uint32_t first_block, float (&value)[Item<T, channels_last>::size]) {
  const std::uint32_t block = first_block + item.block;
  std::uint32_t word[4];
  if constexpr (!channels_last) {
#pragma unroll
    for (int i = 0; i < item.size / 4; ++i) {
      row.block(block + static_cast<std::uint32_t>(i), word);
      Transform::apply(word, value + 4 * i);
    }
  } else {
    // Where the number of pixels is no multiple of four, a channel begins inside a block.
    row.block(block, word);
    if (item.skip == 0) {
      Transform::apply(word, value);
      return;
    }
    float both[8];
    Transform::apply(word, both);
    row.block(block + 1, word);
    Transform::apply(word, both + 4);
    // Indices that the compiler knows keep the values in registers.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value[i] = item.skip == 1 ? both[i + 1] : item.skip == 2 ? both[i + 2] : both[i + 3];
    }
  }
}

}  // namespace gencore::cuda
