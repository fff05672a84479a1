// Arithmetic of one thread, as the CUDA Math API documents it.
#pragma once

#include <math.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "emulation/interface.h"

#define GENCORE_INTRINSIC inline __attribute__((always_inline))

// Compiled with -ffp-contract=off, so each operation rounds once; fma is the machine's or the library's, both exact.
GENCORE_INTRINSIC float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
GENCORE_INTRINSIC float __fadd_rn(float a, float b) { return a + b; }
GENCORE_INTRINSIC float __fsub_rn(float a, float b) { return a - b; }
GENCORE_INTRINSIC float __fmul_rn(float a, float b) { return a * b; }
GENCORE_INTRINSIC float __fdiv_rn(float a, float b) { return a / b; }
GENCORE_INTRINSIC float __frcp_rn(float a) { return 1.0f / a; }
GENCORE_INTRINSIC float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
GENCORE_INTRINSIC double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
GENCORE_INTRINSIC double __dadd_rn(double a, double b) { return a + b; }
GENCORE_INTRINSIC double __dsub_rn(double a, double b) { return a - b; }
GENCORE_INTRINSIC double __dmul_rn(double a, double b) { return a * b; }
GENCORE_INTRINSIC double __ddiv_rn(double a, double b) { return a / b; }
GENCORE_INTRINSIC double __drcp_rn(double a) { return 1.0 / a; }
GENCORE_INTRINSIC double __dsqrt_rn(double a) { return __builtin_sqrt(a); }

// Approximate on the device, to a few units in the last place; as exact here as is simple.
GENCORE_INTRINSIC float rsqrtf(float a) { return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(a))); }
GENCORE_INTRINSIC double rsqrt(double a) { return 1.0 / __builtin_sqrt(a); }
GENCORE_INTRINSIC float __frsqrt_rn(float a) { return rsqrtf(a); }
GENCORE_INTRINSIC float __fdividef(float a, float b) { return a / b; }
GENCORE_INTRINSIC float __saturatef(float a) { return a >= 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
// The C library declares functions of these names.
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __powf(x, y) powf(x, y)

GENCORE_INTRINSIC std::uint32_t __float_as_uint(float a) { return std::bit_cast<std::uint32_t>(a); }
GENCORE_INTRINSIC int __float_as_int(float a) { return std::bit_cast<int>(a); }
GENCORE_INTRINSIC float __uint_as_float(std::uint32_t a) { return std::bit_cast<float>(a); }
GENCORE_INTRINSIC float __int_as_float(int a) { return std::bit_cast<float>(a); }
GENCORE_INTRINSIC long long __double_as_longlong(double a) { return std::bit_cast<long long>(a); }
GENCORE_INTRINSIC double __longlong_as_double(long long a) { return std::bit_cast<double>(a); }

GENCORE_INTRINSIC float __int2float_rn(int a) { return static_cast<float>(a); }
GENCORE_INTRINSIC float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
GENCORE_INTRINSIC float __ll2float_rn(long long a) { return static_cast<float>(a); }
GENCORE_INTRINSIC float __ull2float_rn(unsigned long long a) { return static_cast<float>(a); }
GENCORE_INTRINSIC double __int2double_rn(int a) { return static_cast<double>(a); }
GENCORE_INTRINSIC double __uint2double_rn(unsigned a) { return static_cast<double>(a); }
GENCORE_INTRINSIC double __ll2double_rn(long long a) { return static_cast<double>(a); }
GENCORE_INTRINSIC double __ull2double_rn(unsigned long long a) { return static_cast<double>(a); }
GENCORE_INTRINSIC float __double2float_rn(double a) { return static_cast<float>(a); }

namespace gencore_emulation {

// The device clamps what the integer cannot hold, and takes NaN to `of_nan`.
template <class Integer, class Float>
inline Integer clamped(Float integral, Integer of_nan) {
  using Limits = std::numeric_limits<Integer>;
  if (integral != integral) return of_nan;
  if (integral >= std::ldexp(Float(1), Limits::digits)) return Limits::max();
  if (integral <= static_cast<Float>(Limits::min())) return Limits::min();
  return static_cast<Integer>(integral);
}

}  // namespace gencore_emulation

#define GENCORE_TO_INTEGER(name, from, to, of_nan)                                                                 \
  GENCORE_INTRINSIC to __##name##_rn(from a) { return gencore_emulation::clamped<to>(std::nearbyint(a), of_nan); } \
  GENCORE_INTRINSIC to __##name##_rz(from a) { return gencore_emulation::clamped<to>(std::trunc(a), of_nan); }     \
  GENCORE_INTRINSIC to __##name##_rd(from a) { return gencore_emulation::clamped<to>(std::floor(a), of_nan); }     \
  GENCORE_INTRINSIC to __##name##_ru(from a) { return gencore_emulation::clamped<to>(std::ceil(a), of_nan); }
GENCORE_TO_INTEGER(float2int, float, int, 0)
GENCORE_TO_INTEGER(float2uint, float, unsigned, 0u)
GENCORE_TO_INTEGER(float2ll, float, long long, std::numeric_limits<long long>::min())
GENCORE_TO_INTEGER(float2ull, float, unsigned long long, 1ull << 63)
GENCORE_TO_INTEGER(double2int, double, int, std::numeric_limits<int>::min())
GENCORE_TO_INTEGER(double2uint, double, unsigned, 1u << 31)
GENCORE_TO_INTEGER(double2ll, double, long long, std::numeric_limits<long long>::min())
GENCORE_TO_INTEGER(double2ull, double, unsigned long long, 1ull << 63)
#undef GENCORE_TO_INTEGER

GENCORE_INTRINSIC unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}
GENCORE_INTRINSIC int __mulhi(int a, int b) { return static_cast<int>(static_cast<std::int64_t>(a) * b >> 32); }
GENCORE_INTRINSIC unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
GENCORE_INTRINSIC long long __mul64hi(long long a, long long b) {
  return static_cast<long long>(static_cast<__int128>(a) * b >> 64);
}
GENCORE_INTRINSIC int __popc(unsigned a) { return std::popcount(a); }
GENCORE_INTRINSIC int __popcll(unsigned long long a) { return std::popcount(a); }
GENCORE_INTRINSIC int __clz(int a) { return std::countl_zero(static_cast<unsigned>(a)); }
GENCORE_INTRINSIC int __clzll(long long a) { return std::countl_zero(static_cast<unsigned long long>(a)); }
GENCORE_INTRINSIC int __ffs(int a) { return __builtin_ffs(a); }
GENCORE_INTRINSIC int __ffsll(long long a) { return __builtin_ffsll(a); }
GENCORE_INTRINSIC unsigned __brev(unsigned a) {
  a = (a >> 1 & 0x55555555u) | (a & 0x55555555u) << 1;
  a = (a >> 2 & 0x33333333u) | (a & 0x33333333u) << 2;
  a = (a >> 4 & 0x0F0F0F0Fu) | (a & 0x0F0F0F0Fu) << 4;
  return __builtin_bswap32(a);
}
// Each hexadecimal digit of `selector` names one of the eight bytes of b:a; its high bit asks for the sign instead.
GENCORE_INTRINSIC unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned digit = selector >> (4 * i) & 15u;
    const unsigned byte = static_cast<unsigned>(bytes >> (8 * (digit & 7u))) & 0xFFu;
    result |= (digit & 8u ? (byte & 0x80u ? 0xFFu : 0u) : byte) << (8 * i);
  }
  return result;
}
GENCORE_INTRINSIC unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(high) << 32 | low) << (shift & 31u) >> 32);
}
GENCORE_INTRINSIC unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(high) << 32 | low) >> (shift & 31u));
}

// Loads and stores with a wish about caches.
#define GENCORE_LOAD(name)                     \
  template <class T>                           \
  GENCORE_INTRINSIC T name(const T* address) { \
    return *address;                           \
  }
#define GENCORE_STORE(name)                          \
  template <class T>                                 \
  GENCORE_INTRINSIC void name(T* address, T value) { \
    *address = value;                                \
  }
GENCORE_LOAD(__ldca)
GENCORE_LOAD(__ldcg)
GENCORE_LOAD(__ldcs)
GENCORE_LOAD(__ldlu)
GENCORE_LOAD(__ldcv)
GENCORE_STORE(__stwb)
GENCORE_STORE(__stcg)
GENCORE_STORE(__stcs)
GENCORE_STORE(__stwt)
#undef GENCORE_LOAD
#undef GENCORE_STORE

// For global memory that nobody writes while the kernel runs.
template <class T>
GENCORE_INTRINSIC T __ldg(const T* address) {
  gencore_emulation::begin_cached_load(address, sizeof(T));
  return *address;
}

#define GENCORE_MIN_MAX(type)                                                    \
  GENCORE_INTRINSIC constexpr type min(type a, type b) { return b < a ? b : a; } \
  GENCORE_INTRINSIC constexpr type max(type a, type b) { return a < b ? b : a; }
GENCORE_MIN_MAX(int)
GENCORE_MIN_MAX(unsigned)
GENCORE_MIN_MAX(long)
GENCORE_MIN_MAX(unsigned long)
GENCORE_MIN_MAX(long long)
GENCORE_MIN_MAX(unsigned long long)
#undef GENCORE_MIN_MAX
GENCORE_INTRINSIC float min(float a, float b) { return fminf(a, b); }
GENCORE_INTRINSIC float max(float a, float b) { return fmaxf(a, b); }
GENCORE_INTRINSIC double min(double a, double b) { return fmin(a, b); }
GENCORE_INTRINSIC double max(double a, double b) { return fmax(a, b); }
