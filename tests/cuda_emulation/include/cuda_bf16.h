// Stands in for CUDA's header of this name: bfloat16 as its bits, and the conversions.
#pragma once

#include "cuda_runtime.h"
#include "emulation/half_bits.h"

struct __nv_bfloat16_raw {
  unsigned short x;
};

struct alignas(2) __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(__nv_bfloat16_raw raw) : bits(raw.x) {}
  __nv_bfloat16(float a) : bits(gencore_emulation::bfloat16_bits(a)) {}
  __nv_bfloat16(double a) : bits(gencore_emulation::bfloat16_bits(a)) {}
  operator float() const { return gencore_emulation::bfloat16_value(bits); }
  operator __nv_bfloat16_raw() const { return {bits}; }
};

// The device rounds each result to the half type. Through the conversion to float it would not be, so there is none.
__nv_bfloat16 operator+(__nv_bfloat16, __nv_bfloat16) = delete;
__nv_bfloat16 operator-(__nv_bfloat16, __nv_bfloat16) = delete;
__nv_bfloat16 operator*(__nv_bfloat16, __nv_bfloat16) = delete;
__nv_bfloat16 operator/(__nv_bfloat16, __nv_bfloat16) = delete;

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

GENCORE_INTRINSIC __nv_bfloat16 __ushort_as_bfloat16(unsigned short a) { return __nv_bfloat16(__nv_bfloat16_raw{a}); }
GENCORE_INTRINSIC __nv_bfloat16 __short_as_bfloat16(short a) {
  return __ushort_as_bfloat16(static_cast<unsigned short>(a));
}
GENCORE_INTRINSIC unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
GENCORE_INTRINSIC short __bfloat16_as_short(__nv_bfloat16 a) { return static_cast<short>(a.bits); }

GENCORE_INTRINSIC __nv_bfloat16 __float2bfloat16(float a) { return __nv_bfloat16(a); }
GENCORE_INTRINSIC __nv_bfloat16 __float2bfloat16_rn(float a) { return __nv_bfloat16(a); }
GENCORE_INTRINSIC __nv_bfloat16 __double2bfloat16(double a) { return __nv_bfloat16(a); }
GENCORE_INTRINSIC float __bfloat162float(__nv_bfloat16 a) { return a; }

GENCORE_INTRINSIC __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 low, __nv_bfloat16 high) { return {low, high}; }
GENCORE_INTRINSIC __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
GENCORE_INTRINSIC __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return {a, a}; }
GENCORE_INTRINSIC __nv_bfloat162 __float2bfloat162_rn(float a) { return {__nv_bfloat16(a), __nv_bfloat16(a)}; }
GENCORE_INTRINSIC __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {__nv_bfloat16(low), __nv_bfloat16(high)};
}
GENCORE_INTRINSIC __nv_bfloat162 __float22bfloat162_rn(float2 a) { return {__nv_bfloat16(a.x), __nv_bfloat16(a.y)}; }
GENCORE_INTRINSIC float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x, a.y}; }
GENCORE_INTRINSIC __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
GENCORE_INTRINSIC __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }
GENCORE_INTRINSIC float __low2float(__nv_bfloat162 a) { return a.x; }
GENCORE_INTRINSIC float __high2float(__nv_bfloat162 a) { return a.y; }
