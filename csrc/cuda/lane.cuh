// One thread's arithmetic: the operations that gencore/math.h is written in, and the elements of tensors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "gencore/math.h"
#include "gencore/types.h"
#include "ptx.cuh"

namespace gencore::cuda {

// As csrc/cpu/vec_scalar.h: every operation is the IEEE-754 one, rounded once, and never contracted with another.
struct Lane {
  using F = float;
  using U = std::uint32_t;

  static __device__ __forceinline__ F set(float x) { return x; }
  static __device__ __forceinline__ U set_bits(std::uint32_t x) { return x; }

  static __device__ __forceinline__ F add(F a, F b) { return __fadd_rn(a, b); }
  static __device__ __forceinline__ F sub(F a, F b) { return __fsub_rn(a, b); }
  static __device__ __forceinline__ F mul(F a, F b) { return __fmul_rn(a, b); }
  static __device__ __forceinline__ F fma(F a, F b, F c) { return __fmaf_rn(a, b, c); }
  static __device__ __forceinline__ F div(F a, F b) { return __fdiv_rn(a, b); }
  static __device__ __forceinline__ F sqrt(F a) { return ptx::sqrt_normal(a); }
  static __device__ __forceinline__ F min(F a, F b) { return ptx::min_nan(a, b); }
  static __device__ __forceinline__ F max(F a, F b) { return ptx::max_nan(a, b); }
  static __device__ __forceinline__ bool greater(F a, F b) { return a > b; }
  static __device__ __forceinline__ F scale(F x, F, U n) {
    const int half = static_cast<int>(n) >> 1, rest = static_cast<int>(n) - half;
    const F low = __uint_as_float(static_cast<U>(half + 127) << 23),
            high = __uint_as_float(static_cast<U>(rest + 127) << 23);
    return __fmul_rn(__fmul_rn(x, low), high);
  }

  static __device__ __forceinline__ F float_from_signed(U a) { return __int2float_rn(static_cast<int>(a)); }
  static __device__ __forceinline__ F float_from_unsigned(U a) { return __uint2float_rn(a); }
  static __device__ __forceinline__ F as_float(U a) { return __uint_as_float(a); }
  static __device__ __forceinline__ U as_bits(F a) { return __float_as_uint(a); }

  static __device__ __forceinline__ U add(U a, U b) { return a + b; }
  static __device__ __forceinline__ U sub(U a, U b) { return a - b; }
  static __device__ __forceinline__ U bit_and(U a, U b) { return a & b; }
  static __device__ __forceinline__ U bit_xor(U a, U b) { return a ^ b; }
  template <int n>
  static __device__ __forceinline__ U shift_left(U a) {
    return a << n;
  }
  template <int n>
  static __device__ __forceinline__ U shift_right(U a) {
    return a >> n;
  }
  template <int n>
  static __device__ __forceinline__ U shift_right_signed(U a) {
    return static_cast<U>(static_cast<int>(a) >> n);
  }
  static __device__ __forceinline__ bool any_bit(U a, U bits) { return (a & bits) != 0; }
  static __device__ __forceinline__ F select(bool mask, F yes, F no) { return mask ? yes : no; }
};

// The same interface for float64 tensors. They exist to check others by, not to be fast.
struct Double {
  using F = double;
  static __device__ __forceinline__ F set(double x) { return x; }
  static __device__ __forceinline__ F add(F a, F b) { return a + b; }
  static __device__ __forceinline__ F sub(F a, F b) { return a - b; }
  static __device__ __forceinline__ F mul(F a, F b) { return a * b; }
  static __device__ __forceinline__ F div(F a, F b) { return a / b; }
  static __device__ __forceinline__ F fma(F a, F b, F c) { return a * b + c; }
  // The second operand if one is NaN.
  static __device__ __forceinline__ F min(F a, F b) { return a < b ? a : b; }
  static __device__ __forceinline__ F max(F a, F b) { return a > b ? a : b; }
  static __device__ __forceinline__ bool greater(F a, F b) { return a > b; }
  static __device__ __forceinline__ F select(bool mask, F yes, F no) { return mask ? yes : no; }
  static __device__ __forceinline__ F exp(F x) { return ::exp(x); }
  static __device__ __forceinline__ F exp_minus(F x) { return ::exp(-x); }
  static __device__ __forceinline__ F expm1_of_negative(F x) { return ::expm1(x); }
  static __device__ __forceinline__ F log1p_of_unit(F x) { return ::log1p(x); }
  static __device__ __forceinline__ NormalTail<F> normal_tail(F x) { return normal_tail_of(x); }
};

// The arithmetic for exponentials and quotients of a half type. It has no use for the last bits of binary32, and takes
// the approximations of the hardware: a tenth of the instructions, of which there are else too many to keep up with
// memory.
struct Approximate : Lane {
  static __device__ __forceinline__ F exp(F x) { return ptx::exp2_approx(__fmul_rn(x, 1.44269504088896340736f)); }
  static __device__ __forceinline__ F exp_minus(F x) {
    return ptx::exp2_approx(__fmul_rn(x, -1.44269504088896340736f));
  }
  static __device__ __forceinline__ F div(F a, F b) { return __fmul_rn(a, ptx::reciprocal_approx(b)); }
};

// The arithmetic for elements of type T: binary64 for float64, binary32 for all others.
template <class T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, Double, Lane>;
// The same where exponentials are taken.
template <class T>
using FunctionsOf = std::conditional_t<sizeof(T) == 2, Approximate, Arithmetic<T>>;

// exp(log_variance / 2), for elements of type T; as in Approximate.
template <class T>
__device__ __forceinline__ auto standard_deviation(typename Arithmetic<T>::F log_variance) {
  if constexpr (std::is_same_v<T, double>) {
    return ::exp(log_variance * 0.5);
  } else if constexpr (sizeof(T) == 2) {
    constexpr float half_log2_e = 0.72134752044448170368f;
    return ptx::exp2_approx(__fmul_rn(log_variance, half_log2_e));
  } else {
    return gencore::exp<Lane>(__fmul_rn(log_variance, 0.5f));
  }
}

__device__ __forceinline__ float to_arithmetic(float x) { return x; }
__device__ __forceinline__ double to_arithmetic(double x) { return x; }
__device__ __forceinline__ float to_arithmetic(bfloat16 x) {
  return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_arithmetic(float16 x) { return __half2float(__ushort_as_half(x.bits)); }

__device__ __forceinline__ void from_arithmetic(float x, float& y) { y = x; }
__device__ __forceinline__ void from_arithmetic(double x, double& y) { y = x; }
__device__ __forceinline__ void from_arithmetic(float x, bfloat16& y) {
  y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ void from_arithmetic(float x, float16& y) { y.bits = __half_as_ushort(__float2half_rn(x)); }

// 16 bytes of elements: the widest access of a thread. The address must be a multiple of 16. These are the compiler's
// own vector types, because it may take a struct of one's own apart into narrower accesses.
template <class T>
struct Vector;

template <>
struct Vector<float> {
  using Memory = float4;
  static constexpr int size = 4;
  static __device__ __forceinline__ void unpack(Memory m, float* x) {
    x[0] = m.x;
    x[1] = m.y;
    x[2] = m.z;
    x[3] = m.w;
  }
  static __device__ __forceinline__ Memory pack(const float* x) { return make_float4(x[0], x[1], x[2], x[3]); }
};

template <>
struct Vector<double> {
  using Memory = double2;
  static constexpr int size = 2;
  static __device__ __forceinline__ void unpack(Memory m, double* x) {
    x[0] = m.x;
    x[1] = m.y;
  }
  // Noise comes as float.
  template <class A>
  static __device__ __forceinline__ Memory pack(const A* x) {
    return make_double2(x[0], x[1]);
  }
};

// Two half-size elements from and to the two halves of a word, the first one in the lower half.
template <class T>
struct Halves;

template <>
struct Halves<bfloat16> {
  static __device__ __forceinline__ void unpack(std::uint32_t word, float* x) {
    x[0] = __uint_as_float(word << 16);
    x[1] = __uint_as_float(word & 0xFFFF0000u);
  }
  static __device__ __forceinline__ std::uint32_t pack(const float* x) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
    std::uint32_t word;
    std::memcpy(&word, &pair, sizeof word);
    return word;
  }
};

template <>
struct Halves<float16> {
  static __device__ __forceinline__ void unpack(std::uint32_t word, float* x) {
    __half2 pair;
    std::memcpy(&pair, &word, sizeof word);
    const float2 both = __half22float2(pair);
    x[0] = both.x;
    x[1] = both.y;
  }
  static __device__ __forceinline__ std::uint32_t pack(const float* x) {
    const __half2 pair = __floats2half2_rn(x[0], x[1]);
    std::uint32_t word;
    std::memcpy(&word, &pair, sizeof word);
    return word;
  }
};

template <class T>
struct HalvesVector {
  using Memory = uint4;
  static constexpr int size = 8;
  static __device__ __forceinline__ void unpack(Memory m, float* x) {
    Halves<T>::unpack(m.x, x);
    Halves<T>::unpack(m.y, x + 2);
    Halves<T>::unpack(m.z, x + 4);
    Halves<T>::unpack(m.w, x + 6);
  }
  static __device__ __forceinline__ Memory pack(const float* x) {
    return make_uint4(Halves<T>::pack(x), Halves<T>::pack(x + 2), Halves<T>::pack(x + 4), Halves<T>::pack(x + 6));
  }
};

template <>
struct Vector<bfloat16> : HalvesVector<bfloat16> {};
template <>
struct Vector<float16> : HalvesVector<float16> {};

}  // namespace gencore::cuda
