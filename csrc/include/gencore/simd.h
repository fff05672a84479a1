// Which SIMD level the CPU kernels run at.
#pragma once

namespace gencore::cpu {

// avx512_bf16 is avx512 with the dot product of bfloat16, which attention in bfloat16 uses; all else is as at avx512.
enum class SimdLevel : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
constexpr int simd_levels = 4;

const char* name(SimdLevel level);

// Whether the level was compiled into this library, and whether this machine's processor has it.
bool is_compiled(SimdLevel level);
bool is_supported(SimdLevel level);

// The level in use: the highest that is compiled and supported, or the one the environment variable GENCORE_SIMD
// names ("scalar", "avx2", "avx512" or "avx512_bf16") when the library is loaded.
SimdLevel simd_level();

// Changes the level for the whole process; false, and no change, if it is not compiled or not supported.
bool set_simd_level(SimdLevel level);

}  // namespace gencore::cpu
