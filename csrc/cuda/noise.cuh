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

// Whether the sizes are valid, and the key where kernels can read it.
inline bool is_acceptable(const NoiseShape& shape, const NoiseKey& key) {
  return is_valid(shape, key) && (key.on_device || key.rows == 0);
}

// Calls body(type, channels_last, key_on_device), the last two as constants: what kernels that make noise are compiled
// for.
template <class Body>
cudaError_t with_variant(DType dtype, const NoiseShape& shape, const NoiseKey& key, Body&& body) {
  return with_type(dtype, [&](auto* type) {
    return with_constants([&](auto... constants) { return body(type, constants...); }, shape.channels > 1,
                          key.on_device);
  });
}

// Calls body(type, channels_last, from_device), the last two as constants, for kernels that begin their rows with
// `begin_either`: from_device says that what differs from row to row may be on the device, or for float64 that it may
// be anywhere, as that needs no kernel of its own to be fast.
template <class Body>
cudaError_t with_row_variant(DType dtype, const NoiseShape& shape, bool from_device, Body&& body) {
  return with_type(dtype, [&](auto* type) {
    return with_constants(
        [&](auto channels_last) {
          if constexpr (!std::is_same_v<std::remove_pointer_t<decltype(type)>, double>) {
            if (!from_device) return body(type, channels_last, std::false_type{});
          }
          return body(type, channels_last, std::true_type{});
        },
        shape.channels > 1);
  });
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

  // Of a key that may be on the device or not.
  __device__ __forceinline__ void begin_either(const NoiseWords& key, std::int64_t row) {
    if constexpr (key_on_device) {
      if (key.on_device == nullptr) {
        seed_low = key.round_key[0][0];
        seed_high = key.round_key[0][1];
        stream = key.stream;
        sample = key.sample + static_cast<std::uint64_t>(row);
        return;
      }
    }
    begin(key, row);
  }

  // The four words of a block of the row.
  __device__ __forceinline__ PhiloxBlock block(std::uint32_t number) const {
    const PhiloxBlock counter{
        {number, stream, static_cast<std::uint32_t>(sample), static_cast<std::uint32_t>(sample >> 32)}};
    return philox4x32(counter, [&](int round, int half) {
      if constexpr (key_on_device) {
        const auto rounds_before = static_cast<std::uint32_t>(round);
        return half == 0 ? seed_low + rounds_before * Philox::w0 : seed_high + rounds_before * Philox::w1;
      } else {
        return words->round_key[round][half];
      }
    });
  }
};

struct Normals {
  static __device__ __forceinline__ void apply(const PhiloxBlock& block, float* value) {
    const auto& word = block.word;
    box_muller<Lane>(word[0], word[1], value[0], value[1]);
    box_muller<Lane>(word[2], word[3], value[2], value[3]);
  }
};

struct Uniforms {
  static __device__ __forceinline__ void apply(const PhiloxBlock& block, float* value) {
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = unit_uniform<Lane>(block.word[i]);
  }
};

// The noise of an item's elements in the draw whose first block is `first_block`.
template <class Transform, class T, bool channels_last, bool key_on_device>
__device__ __forceinline__ void make_noise(const RowNoise<key_on_device>& row, const Item<T, channels_last>& item,
                                           std::uint32_t first_block, float (&value)[Item<T, channels_last>::size]) {
  const std::uint32_t block = first_block + item.block;
  if constexpr (!channels_last) {
#pragma unroll
    for (int i = 0; i < item.size / 4; ++i) {
      Transform::apply(row.block(block + static_cast<std::uint32_t>(i)), value + 4 * i);
    }
  } else {
    // Where the number of pixels is no multiple of four, a channel begins inside a block.
    const PhiloxBlock first = row.block(block);
    if (item.skip == 0) {
      Transform::apply(first, value);
      return;
    }
    float both[8];
    Transform::apply(first, both);
    Transform::apply(row.block(block + 1), both + 4);
    // Indices that the compiler knows keep the values in registers.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value[i] = item.skip == 1 ? both[i + 1] : item.skip == 2 ? both[i + 2] : both[i + 3];
    }
  }
}

}  // namespace gencore::cuda
