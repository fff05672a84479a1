// The vector type of 8 lanes: AVX2, FMA and F16C. See vec.h for what each operation means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "gencore/types.h"

namespace gencore::cpu::GENCORE_SIMD {

struct V {
  static constexpr int width = 8;
  using F = __m256;
  struct U {
    __m256i v;
  };
  using Mask = __m256;

  static F set(float x) { return _mm256_set1_ps(x); }
  static U set_bits(std::uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static Mask greater(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static F scale(F x, F, U n) {
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256i half = _mm256_srai_epi32(n.v, 1), rest = _mm256_sub_epi32(n.v, half);
    const __m256 low = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    const __m256 high = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
    return _mm256_mul_ps(_mm256_mul_ps(x, low), high);
  }

  static F float_from_signed(U a) { return _mm256_cvtepi32_ps(a.v); }
  static F float_from_unsigned(U a) {
    // The halves convert exactly; their fma rounds once.
    const __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(a.v, 16));
    const __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(a.v, _mm256_set1_epi32(0xFFFF)));
    return _mm256_fmadd_ps(high, _mm256_set1_ps(65536.0f), low);
  }
  static F as_float(U a) { return _mm256_castsi256_ps(a.v); }
  static U as_bits(F a) { return {_mm256_castps_si256(a)}; }

  static U add(U a, U b) { return {_mm256_add_epi32(a.v, b.v)}; }
  static U sub(U a, U b) { return {_mm256_sub_epi32(a.v, b.v)}; }
  static U bit_and(U a, U b) { return {_mm256_and_si256(a.v, b.v)}; }
  static U bit_xor(U a, U b) { return {_mm256_xor_si256(a.v, b.v)}; }
  template <int n>
  static U shift_left(U a) {
    return {_mm256_slli_epi32(a.v, n)};
  }
  template <int n>
  static U shift_right(U a) {
    return {_mm256_srli_epi32(a.v, n)};
  }
  template <int n>
  static U shift_right_signed(U a) {
    return {_mm256_srai_epi32(a.v, n)};
  }
  // `bits` must be a single bit.
  static Mask any_bit(U a, U bits) {
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(a.v, bits.v), bits.v));
  }
  static F select(Mask mask, F yes, F no) { return _mm256_blendv_ps(no, yes, mask); }

  struct Wide {
    __m256i even, odd;
  };
  static Wide widen(U a) { return {a.v, _mm256_srli_epi64(a.v, 32)}; }
  static Wide wide_set(std::uint32_t x) {
    const __m256i all = _mm256_set1_epi32(static_cast<int>(x));
    return {all, all};
  }
  static Wide wide_add(Wide a, std::uint32_t x) {
    const __m256i all = _mm256_set1_epi32(static_cast<int>(x));
    return {_mm256_add_epi32(a.even, all), _mm256_add_epi32(a.odd, all)};
  }
  static void wide_mul(Wide a, std::uint32_t x, Wide& high, Wide& low) {
    const __m256i all = _mm256_set1_epi32(static_cast<int>(x));
    low = {_mm256_mul_epu32(a.even, all), _mm256_mul_epu32(a.odd, all)};
    high = {_mm256_srli_epi64(low.even, 32), _mm256_srli_epi64(low.odd, 32)};
  }
  static Wide wide_xor(Wide a, Wide b, Wide c) {
    return {_mm256_xor_si256(_mm256_xor_si256(a.even, b.even), c.even),
            _mm256_xor_si256(_mm256_xor_si256(a.odd, b.odd), c.odd)};
  }
  static U narrow(Wide a) { return {_mm256_blend_epi32(a.even, _mm256_slli_epi64(a.odd, 32), 0xAA)}; }

  static U load_bits(const std::uint32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const bfloat16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static F load(const float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void store(bfloat16* p, F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i tie = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), tie);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const __m256i chosen =
        _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), is_nan));
    const __m256i high = _mm256_srli_epi32(chosen, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static void store(float16* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  static void transpose(F (&x)[width]) {
    F pairs[width], fours[width];
    for (int i = 0; i < 4; ++i) {
      pairs[2 * i] = _mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]);
      pairs[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) {
        fours[4 * i + 2 * j] = _mm256_shuffle_ps(pairs[4 * i + j], pairs[4 * i + 2 + j], 0x44);
        fours[4 * i + 2 * j + 1] = _mm256_shuffle_ps(pairs[4 * i + j], pairs[4 * i + 2 + j], 0xEE);
      }
    }
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x20);
      x[4 + i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x31);
    }
  }

  static void interleave(F a, F b, F& first, F& second) {
    const F low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    first = _mm256_permute2f128_ps(low, high, 0x20);
    second = _mm256_permute2f128_ps(low, high, 0x31);
  }
  static void deinterleave(F first, F second, F& a, F& b) {
    const F low = _mm256_permute2f128_ps(first, second, 0x20), high = _mm256_permute2f128_ps(first, second, 0x31);
    a = _mm256_shuffle_ps(low, high, 0x88);
    b = _mm256_shuffle_ps(low, high, 0xDD);
  }

  static constexpr int block_of_lane[width] = {0, 2, 4, 6, 1, 3, 5, 7};
  static void store_blocks(float* p, F x0, F x1, F x2, F x3) {
    const __m256 a = _mm256_unpacklo_ps(x0, x1), b = _mm256_unpackhi_ps(x0, x1);
    const __m256 c = _mm256_unpacklo_ps(x2, x3), d = _mm256_unpackhi_ps(x2, x3);
    _mm256_storeu_ps(p, _mm256_shuffle_ps(a, c, 0x44));
    _mm256_storeu_ps(p + 8, _mm256_shuffle_ps(a, c, 0xEE));
    _mm256_storeu_ps(p + 16, _mm256_shuffle_ps(b, d, 0x44));
    _mm256_storeu_ps(p + 24, _mm256_shuffle_ps(b, d, 0xEE));
  }
};

}  // namespace gencore::cpu::GENCORE_SIMD
