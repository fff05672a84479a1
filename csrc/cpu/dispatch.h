// How a public function reaches the kernel of the SIMD level in use.
//
// A kernel file ends with the public function, compiled with the scalar level only:
//
//   #if GENCORE_SIMD_NUMBER == 0
//   namespace gencore::cpu {
//   GENCORE_DECLARE_LEVELS(Status f(const Args& args, int threads))
//   Status f(const Args& args, int threads) { ...checks...; GENCORE_DISPATCH(f, args, threads); }
//   }
//   #endif
#pragma once

#include "gencore/simd.h"
#include "gencore/types.h"

namespace gencore::cpu {

// Whether the sizes are valid, the key is where the CPU can read it, and there is a thread to do the work.
bool is_valid(const NoiseShape& shape, const NoiseKey& key, int threads);

// Whether each of `samples` samples has a row, and the CPU can read it.
bool has_rows(const Coefficients& table, std::int64_t samples);

}  // namespace gencore::cpu

#ifdef GENCORE_X86_LEVELS
#define GENCORE_DECLARE_LEVELS(...) \
  namespace scalar {                \
  __VA_ARGS__;                      \
  }                                 \
  namespace avx2 {                  \
  __VA_ARGS__;                      \
  }                                 \
  namespace avx512 {                \
  __VA_ARGS__;                      \
  }
#define GENCORE_DISPATCH(function, ...)                           \
  switch (simd_level()) {                                         \
    case SimdLevel::avx512_bf16:                                  \
    case SimdLevel::avx512: return avx512::function(__VA_ARGS__); \
    case SimdLevel::avx2: return avx2::function(__VA_ARGS__);     \
    default: return scalar::function(__VA_ARGS__);                \
  }
#else
#define GENCORE_DECLARE_LEVELS(...) \
  namespace scalar {                \
  __VA_ARGS__;                      \
  }
#define GENCORE_DISPATCH(function, ...) return scalar::function(__VA_ARGS__)
#endif
