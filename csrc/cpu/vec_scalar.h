// The vector type of one lane: any processor. See vec.h for what each operation means.
#pragma once

#include <cmath>
#include <cstdint>

#include "half.h"

namespace gencore::cpu::GENCORE_SIMD {

struct V {
  static constexpr int width = 1;
  using F = float;
  using U = std::uint32_t;
  using Mask = bool;

  static F set(float x) { return x; }
  static U set_bits(std::uint32_t x) { return x; }

  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F sqrt(F a) { return std::sqrt(a); }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F fma(F a, F b, F c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    // The product is exact in binary64. The sum is rounded to odd by its TwoSum error, so that the conversion to
    // binary32 rounds once (Boldo and Melquiond, 2008). Faster than a library's fmaf without the instruction.
    const double product = static_cast<double>(a) * b, addend = c;
    double total = product + addend;
    const double virtual_ = total - product;
    const double error = (product - (total - virtual_)) + (addend - virtual_);
    std::int64_t bits;
    std::memcpy(&bits, &total, sizeof bits);
    if (error != 0 && !(bits & 1) && std::isfinite(total)) {
      bits += (error > 0) == (total > 0) ? 1 : -1;
      std::memcpy(&total, &bits, sizeof bits);
    }
    return static_cast<float>(total);
#endif
  }
  static Mask greater(F a, F b) { return a > b; }
  static F scale(F x, F, U n) {
    const std::int32_t half = static_cast<std::int32_t>(n) >> 1, rest = static_cast<std::int32_t>(n) - half;
    return x * float_of(static_cast<U>(half + 127) << 23) * float_of(static_cast<U>(rest + 127) << 23);
  }

  static F float_from_signed(U a) { return static_cast<float>(static_cast<std::int32_t>(a)); }
  static F float_from_unsigned(U a) { return static_cast<float>(a); }
  static F as_float(U a) { return float_of(a); }
  static U as_bits(F a) { return bits_of(a); }

  static U add(U a, U b) { return a + b; }
  static U sub(U a, U b) { return a - b; }
  static U bit_and(U a, U b) { return a & b; }
  static U bit_xor(U a, U b) { return a ^ b; }
  template <int n>
  static U shift_left(U a) {
    return a << n;
  }
  template <int n>
  static U shift_right(U a) {
    return a >> n;
  }
  template <int n>
  static U shift_right_signed(U a) {
    return static_cast<U>(static_cast<std::int32_t>(a) >> n);
  }
  static Mask any_bit(U a, U bits) { return (a & bits) != 0; }
  static F select(Mask mask, F yes, F no) { return mask ? yes : no; }

  using Wide = std::uint32_t;
  static Wide widen(U a) { return a; }
  static Wide wide_set(std::uint32_t x) { return x; }
  static Wide wide_add(Wide a, std::uint32_t x) { return a + x; }
  static void wide_mul(Wide a, std::uint32_t x, Wide& high, Wide& low) {
    const std::uint64_t product = static_cast<std::uint64_t>(a) * x;
    high = static_cast<std::uint32_t>(product >> 32);
    low = static_cast<std::uint32_t>(product);
  }
  static Wide wide_xor(Wide a, Wide b, Wide c) { return a ^ b ^ c; }
  static U narrow(Wide a) { return a; }

  static U load_bits(const std::uint32_t* p) { return *p; }
  static F load(const float* p) { return *p; }
  static F load(const bfloat16* p) { return to_float(*p); }
  static F load(const float16* p) { return to_float(*p); }
  static void store(float* p, F x) { *p = x; }
  static void store(bfloat16* p, F x) { *p = to_bfloat16(x); }
  static void store(float16* p, F x) { *p = to_float16(x); }

  static void transpose(F (&)[width]) {}

  static constexpr int block_of_lane[width] = {0};
  static void store_blocks(float* p, F x0, F x1, F x2, F x3) {
    p[0] = x0;
    p[1] = x1;
    p[2] = x2;
    p[3] = x3;
  }
};

}  // namespace gencore::cpu::GENCORE_SIMD
