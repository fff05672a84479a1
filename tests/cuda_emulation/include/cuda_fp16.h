// Stands in for CUDA's header of this name: binary16 as its bits, and the conversions.
#pragma once

#include "cuda_runtime.h"
#include "emulation/half_bits.h"

struct __half_raw {
  unsigned short x;
};

struct alignas(2) __half {
  unsigned short bits;
  __half() = default;
  __half(__half_raw raw) : bits(raw.x) {}
  __half(float a) : bits(gencore_emulation::half_bits(a)) {}
  __half(double a) : bits(gencore_emulation::half_bits(a)) {}
  operator float() const { return gencore_emulation::half_value(bits); }
  operator __half_raw() const { return {bits}; }
};

// The device rounds each result to the half type. Through the conversion to float it would not be, so there is none.
__half operator+(__half, __half) = delete;
__half operator-(__half, __half) = delete;
__half operator*(__half, __half) = delete;
__half operator/(__half, __half) = delete;

struct alignas(4) __half2 {
  __half x, y;
};

using half = __half;
using half2 = __half2;

GENCORE_INTRINSIC __half __ushort_as_half(unsigned short a) { return __half(__half_raw{a}); }
GENCORE_INTRINSIC __half __short_as_half(short a) { return __ushort_as_half(static_cast<unsigned short>(a)); }
GENCORE_INTRINSIC unsigned short __half_as_ushort(__half a) { return a.bits; }
GENCORE_INTRINSIC short __half_as_short(__half a) { return static_cast<short>(a.bits); }

GENCORE_INTRINSIC __half __float2half(float a) { return __half(a); }
GENCORE_INTRINSIC __half __float2half_rn(float a) { return __half(a); }
GENCORE_INTRINSIC __half __double2half(double a) { return __half(a); }
GENCORE_INTRINSIC float __half2float(__half a) { return a; }

GENCORE_INTRINSIC __half2 __halves2half2(__half low, __half high) { return {low, high}; }
GENCORE_INTRINSIC __half2 make_half2(__half x, __half y) { return {x, y}; }
GENCORE_INTRINSIC __half2 __half2half2(__half a) { return {a, a}; }
GENCORE_INTRINSIC __half2 __float2half2_rn(float a) { return {__half(a), __half(a)}; }
GENCORE_INTRINSIC __half2 __floats2half2_rn(float low, float high) { return {__half(low), __half(high)}; }
GENCORE_INTRINSIC __half2 __float22half2_rn(float2 a) { return {__half(a.x), __half(a.y)}; }
GENCORE_INTRINSIC float2 __half22float2(__half2 a) { return {a.x, a.y}; }
GENCORE_INTRINSIC __half __low2half(__half2 a) { return a.x; }
GENCORE_INTRINSIC __half __high2half(__half2 a) { return a.y; }
GENCORE_INTRINSIC float __low2float(__half2 a) { return a.x; }
GENCORE_INTRINSIC float __high2float(__half2 a) { return a.y; }
