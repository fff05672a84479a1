// Types shared by every op of the C++ API.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GENCORE_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Internal linkage: a copy compiled for a newer processor must never stand in for one compiled for an older.
#define GENCORE_HOST_DEVICE static inline
#endif

namespace gencore {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// What an op returns; `message` puts it in words. Nothing is written unless it is `ok`.
enum class Status : int { ok = 0, invalid_argument = 1, out_of_memory = 2 };

const char* message(Status status);

// Half types travel as their bits: no op does arithmetic in them, each converts to binary32 on loading.
struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

// What noise depends on besides the element index; all words are 64-bit integers.
struct NoiseKey {
  // rows == 0: {seed, stream, id of the first sample}; else one {seed, stream, sample id} per sample.
  const std::int64_t* words;
  std::int64_t rows;
};

// Which noise a tensor holds: `draws` x `samples` rows of `elements` values, one row after the other in memory.
// Draw d of a sample takes the elements from 4 * d * ceil(elements / 4) on, so every row begins a Philox block.
struct NoiseShape {
  std::int64_t samples;
  std::int64_t draws;
  std::int64_t elements;
  // 0 or 1: a row is in logical C order. Else a row is channels-last: logical element (c, p) of `channels` channels
  // and `elements / channels` pixels lies at p * channels + c. The values are the same either way.
  std::int64_t channels;
};

}  // namespace gencore
