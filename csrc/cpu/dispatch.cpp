// Chooses the SIMD level once, when the library is loaded.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace gencore {

const char* message(Status status) {
  switch (status) {
    case Status::ok: return "ok";
    case Status::invalid_argument: return "invalid argument: a size, a type or a pointer is not one the op takes";
    case Status::out_of_memory: return "out of memory for the op's workspace";
  }
  return "unknown status";
}

namespace cpu {
namespace {

SimdLevel choose() {
  SimdLevel best = SimdLevel::scalar;
  for (int i = 0; i < simd_levels; ++i) {
    const SimdLevel level = static_cast<SimdLevel>(i);
    if (!is_compiled(level) || !is_supported(level)) continue;
    best = level;
    const char* wanted = std::getenv("GENCORE_SIMD");
    if (wanted != nullptr && std::strcmp(wanted, name(level)) == 0) break;
  }
  return best;
}

std::atomic<SimdLevel> chosen{choose()};

}  // namespace

const char* name(SimdLevel level) {
  switch (level) {
    case SimdLevel::scalar: return "scalar";
    case SimdLevel::avx2: return "avx2";
    case SimdLevel::avx512: return "avx512";
    case SimdLevel::avx512_bf16: return "avx512_bf16";
  }
  return "unknown";
}

bool is_compiled([[maybe_unused]] SimdLevel level) {
#ifdef GENCORE_X86_LEVELS
  return true;
#else
  return level == SimdLevel::scalar;
#endif
}

bool is_supported(SimdLevel level) {
#ifdef GENCORE_X86_LEVELS
  // These ask the operating system too, whether it saves the registers. Every processor with FMA has F16C.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level == SimdLevel::avx2) return avx2;
  if (level == SimdLevel::avx512 || level == SimdLevel::avx512_bf16) {
    if (level == SimdLevel::avx512_bf16 && !__builtin_cpu_supports("avx512bf16")) return false;
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
#endif
  return level == SimdLevel::scalar;
}

bool is_valid(const NoiseShape& shape, const NoiseKey& key, int threads) {
  return threads >= 1 && !key.on_device && gencore::is_valid(shape, key);
}

bool has_rows(const Coefficients& table, std::int64_t samples) {
  if (table.on_device || !gencore::is_valid(table, samples)) return false;
  for (std::int64_t b = 0; table.index != nullptr && b < samples; ++b) {
    if (table.index[b] < 0 || table.index[b] >= table.rows) return false;
  }
  return true;
}

SimdLevel simd_level() { return chosen.load(std::memory_order_relaxed); }

bool set_simd_level(SimdLevel level) {
  if (!is_compiled(level) || !is_supported(level)) return false;
  chosen.store(level, std::memory_order_relaxed);
  return true;
}

}  // namespace cpu
}  // namespace gencore
