// What csrc/cuda/ptx.cuh says in PTX, for the emulator. The build names this file in GENCORE_PTX.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cuda_runtime.h"
#include "emulation/interface.h"
#include "gencore/types.h"

namespace gencore::cuda::ptx {

inline float min_nan(float a, float b) {
  if (a != a || b != b) return std::bit_cast<float>(0x7FFFFFFFu);
  return a < b || (a == b && std::signbit(a)) ? a : b;  // -0 is less than 0
}

inline float max_nan(float a, float b) {
  if (a != a || b != b) return std::bit_cast<float>(0x7FFFFFFFu);
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}

// The device's is an approximation within 2^-22; results below the normal numbers are flushed in both.
inline float exp2_approx(float a) {
  const float result = std::exp2(a);
  return result < 0x1p-126f ? 0.0f : result;
}

// The device's is within 1 ulp; numbers below the normal ones are flushed in both.
inline float reciprocal_approx(float a) {
  if (std::fabs(a) < 0x1p-126f) a = std::copysign(0.0f, a);
  const float result = 1.0f / a;
  return std::fabs(result) < 0x1p-126f ? std::copysign(0.0f, result) : result;
}

// The steps of the device, from a reciprocal root that is correctly rounded; the device's is an approximation.
inline float sqrt_normal(float a) {
  const float reciprocal = static_cast<float>(1.0 / std::sqrt(static_cast<double>(fmaxf(a, 0x1p-100f))));
  const float root = __fmul_rn(a, reciprocal), half = __fmul_rn(reciprocal, 0.5f);
  return __fmaf_rn(__fmaf_rn(-root, root, a), half, root);
}

template <class T>
GENCORE_INTRINSIC void store(T* address, T value) {
  static_assert(sizeof(T) == 16 && alignof(T) == 16);
  gencore_emulation::begin_global_store(address, sizeof(T));
  *address = value;
}

template <class T>
GENCORE_INTRINSIC void store_shared(T* address, T value) {
  static_assert(sizeof(T) == 16 && alignof(T) == 16);
  *address = value;
}

template <class T>
inline void keep_behind(T&) {}

template <class T>
inline T* dynamic_shared() {
  static_assert(alignof(T) <= 16);
  return static_cast<T*>(gencore_emulation::dynamic_shared_memory());
}

inline void cp_async_16(void* shared, const void* global, bool valid) {
  gencore_emulation::copy_async(shared, global, valid);
}
inline void cp_async_commit() { gencore_emulation::copy_async_commit(); }
template <int n>
inline void cp_async_wait() {
  gencore_emulation::copy_async_wait(n);
}

inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* row,
                        gencore_emulation::Where where = gencore_emulation::Where::current()) {
  gencore_emulation::load_matrices(r, 4, false, row, where);
}
inline void ldmatrix_x2(std::uint32_t (&r)[2], const void* row,
                        gencore_emulation::Where where = gencore_emulation::Where::current()) {
  gencore_emulation::load_matrices(r, 2, false, row, where);
}
inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* row,
                              gencore_emulation::Where where = gencore_emulation::Where::current()) {
  gencore_emulation::load_matrices(r, 4, true, row, where);
}
inline void ldmatrix_x2_trans(std::uint32_t (&r)[2], const void* row,
                              gencore_emulation::Where where = gencore_emulation::Where::current()) {
  gencore_emulation::load_matrices(r, 2, true, row, where);
}

template <class T>
inline void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                         gencore_emulation::Where where = gencore_emulation::Where::current()) {
  static_assert(std::is_same_v<T, float16> || std::is_same_v<T, bfloat16>);
  using gencore_emulation::MatrixType;
  gencore_emulation::multiply_matrices(std::is_same_v<T, float16> ? MatrixType::float16 : MatrixType::bfloat16, d, a, b,
                                       where);
}

}  // namespace gencore::cuda::ptx
