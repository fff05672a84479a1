// Types shared by every op of the C++ API.
#pragma once

#include <cstdint>

// What kernels share: nvcc compiles it for the device, other compilers for the host.
#if defined(__CUDACC__)
#define GENCORE_INLINE __device__ __forceinline__
#define GENCORE_MEMBER __device__ __forceinline__
#define GENCORE_UNROLL _Pragma("unroll")
#else
// Internal linkage: a copy compiled for a newer processor must never stand in for one compiled for an older.
#define GENCORE_INLINE static inline
#define GENCORE_MEMBER inline
#define GENCORE_UNROLL _Pragma("GCC unroll 16")
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
  // For CUDA: the words lie in device memory, and kernels read them when they run, so that new words give new noise
  // when a captured graph is replayed. Else they lie in host memory and are read at the call; CUDA then takes rows == 0
  // only.
  bool on_device = false;
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

// Coefficients that differ from sample to sample: a table of float64 rows, of as many columns as the op says. Sample b
// takes row index[b]; without an index row b, or the only row if there is one.
struct Coefficients {
  const double* values;
  std::int64_t rows;
  const std::int64_t* index;
  // For CUDA: both lie in device memory and are read when kernels run. Else they lie in host memory and are read at the
  // call; CUDA then takes a single row. The index of a GPU is not looked at before the launch: a sample whose row is
  // not in the table becomes NaN.
  bool on_device = false;
};

// Whether there is a row for each of `samples` samples.
static inline bool is_valid(const Coefficients& table, std::int64_t samples) {
  if (samples == 0) return true;
  if (table.values == nullptr || table.rows < 1) return false;
  return table.index != nullptr || table.rows == 1 || table.rows == samples;
}

// Whether the sizes fit together and in the counters: at most 2^34 values per sample, and key rows for every sample.
static inline bool is_valid(const NoiseShape& shape, const NoiseKey& key) {
  if (shape.samples < 0 || shape.draws < 0 || shape.elements < 0 || shape.channels < 0) return false;
  if (shape.channels > 1 && shape.elements % shape.channels != 0) return false;
  if (key.rows != 0 && key.rows != shape.samples) return false;
  if (key.words == nullptr && shape.samples != 0) return false;
  constexpr std::int64_t most_blocks = std::int64_t{1} << 32;
  std::int64_t rows, total;
  if (shape.elements > 4 * most_blocks) return false;
  const std::int64_t blocks = (shape.elements + 3) / 4;
  if (shape.draws > 1 && blocks > most_blocks / shape.draws) return false;
  return !__builtin_mul_overflow(shape.samples, shape.draws, &rows) &&
         !__builtin_mul_overflow(rows, shape.elements, &total);
}

}  // namespace gencore
