// The vector type `V` of the SIMD level this file is compiled for, and what every op needs around it.
//
// A kernel file is compiled once per level with GENCORE_SIMD naming the level. Its kernels live in the namespace of
// that name, so that no function compiled for a newer processor is ever linked into a path for an older one.
//
// V::F holds `width` binary32 values, V::U as many 32-bit integers; which operations there are, and that each is the
// correctly rounded IEEE-754 one, is listed by the one-lane version, vec_scalar.h. Three need words:
//
//   Wide            32-bit integers spread over the low halves of 64-bit lanes (the even lanes and the odd ones), where
//                   the full product of two of them is one instruction and needs no shuffle. High halves are garbage.
//   store_blocks    writes lane l of x0..x3 as four neighbours, the lanes in the order of block_of_lane: lane l holds
//                   block block_of_lane[l]. The order is the one in which the transpose costs no lane crossing.
//   scale(x, n, k)  x * 2^n, rounded once; n as a float, k the same integer.
//   transpose(x)    of `width` vectors: lane l of x[i] becomes lane i of x[l].
//   interleave(a, b, first, second)   a0 b0 a1 b1 ... in two vectors; deinterleave undoes it. The scalar level, whose
//                   vectors are one lane, has neither.
//   load_first, store_first   of fewer elements than a vector has, where there are instructions for it: see load_part.
#pragma once

#include "dispatch.h"

#ifdef __FAST_MATH__
#error "gencore's noise is defined operation by operation: build it without -ffast-math"
#endif

#define GENCORE_SIMD_IS_scalar 0
#define GENCORE_SIMD_IS_avx2 1
#define GENCORE_SIMD_IS_avx512 2
#define GENCORE_SIMD_IS_avx512_bf16 3
#define GENCORE_CONCAT_(a, b) a##b
#define GENCORE_CONCAT(a, b) GENCORE_CONCAT_(a, b)
#define GENCORE_SIMD_NUMBER GENCORE_CONCAT(GENCORE_SIMD_IS_, GENCORE_SIMD)

#if GENCORE_SIMD_NUMBER >= 2
#include "vec_avx512.h"
#elif GENCORE_SIMD_NUMBER == 1
#include "vec_avx2.h"
#else
#include "vec_scalar.h"
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "gencore/math.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// The same interface for float64 tensors, one lane wide: they exist to check others by, not to be fast.
struct Double {
  static constexpr int width = 1;
  using F = double;
  static F set(double x) { return x; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static bool greater(F a, F b) { return a > b; }
  static F select(bool mask, F yes, F no) { return mask ? yes : no; }
  static F exp(F x) { return std::exp(x); }
  static F exp_minus(F x) { return std::exp(-x); }
  static F expm1_of_negative(F x) { return std::expm1(x); }
  static F log1p_of_unit(F x) { return std::log1p(x); }
  static NormalTail<F> normal_tail(F x) { return normal_tail_of(x); }
  static F load(const double* p) { return *p; }
  static F load(const float* p) { return *p; }
  static void store(double* p, F x) { *p = x; }
  static void transpose(F (&)[width]) {}
};

// The arithmetic for elements of type T: binary64 for float64, binary32 for all others.
template <class T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, Double, V>;

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The vector at p of which `count` elements are inside the tensor; the others are zero, and are not written.
template <class P, class T>
inline typename P::F load_part(const T* p, std::int64_t count) {
  if (count >= P::width) return P::load(p);
  if constexpr (requires { P::load_first(p, count); }) return P::load_first(p, count);
  T part[P::width] = {};
  std::memcpy(part, p, static_cast<std::size_t>(count) * sizeof(T));
  return P::load(part);
}

template <class P, class T>
inline void store_part(T* p, typename P::F x, std::int64_t count) {
  if (count >= P::width) return P::store(p, x);
  if constexpr (requires { P::store_first(p, x, count); }) return P::store_first(p, x, count);
  T part[P::width];
  P::store(part, x);
  std::memcpy(p, part, static_cast<std::size_t>(count) * sizeof(T));
}

// Calls body(offset, count) for each vector of n elements; count is P::width but for the last.
template <class P, class Body>
inline void for_vectors(std::int64_t n, Body&& body) {
  std::int64_t i = 0;
  for (; i + P::width <= n; i += P::width) body(i, static_cast<std::int64_t>(P::width));
  if (i < n) body(i, n - i);
}

// Calls body(static_cast<T*>(nullptr)) with T the element type that dtype names.
template <class Body>
inline Status with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::float32: return body(static_cast<float*>(nullptr));
    case DType::float64: return body(static_cast<double*>(nullptr));
    case DType::bfloat16: return body(static_cast<bfloat16*>(nullptr));
    case DType::float16: return body(static_cast<float16*>(nullptr));
  }
  return Status::invalid_argument;
}

// The same in kernels that draw no noise. Those for float64 have no use for V, and are compiled with the scalar level
// alone: the public function calls them there at every level.
template <class Body>
inline Status with_type_of_level(DType dtype, Body&& body) {
  if constexpr (GENCORE_SIMD_NUMBER == 0) {
    return with_type(dtype, body);
  } else {
    switch (dtype) {
      case DType::float32: return body(static_cast<float*>(nullptr));
      case DType::bfloat16: return body(static_cast<bfloat16*>(nullptr));
      case DType::float16: return body(static_cast<float16*>(nullptr));
      default: return Status::invalid_argument;
    }
  }
}

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
