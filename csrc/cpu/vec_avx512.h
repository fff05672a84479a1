// The vector type of 16 lanes: AVX-512 F, BW, DQ and VL (x86-64-v4). See vec.h for what each operation means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "gencore/types.h"

namespace gencore::cpu::GENCORE_SIMD {

struct V {
  static constexpr int width = 16;
  using F = __m512;
  struct U {
    __m512i v;
  };
  using Mask = __mmask16;

  static F set(float x) { return _mm512_set1_ps(x); }
  static U set_bits(std::uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static Mask greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  // vscalefps rounds once, as the two multiplications of the other levels do: only their second can be inexact.
  static F scale(F x, F n, U) { return _mm512_scalef_ps(x, n); }

  static F float_from_signed(U a) { return _mm512_cvtepi32_ps(a.v); }
  static F float_from_unsigned(U a) { return _mm512_cvtepu32_ps(a.v); }
  static F as_float(U a) { return _mm512_castsi512_ps(a.v); }
  static U as_bits(F a) { return {_mm512_castps_si512(a)}; }

  static U add(U a, U b) { return {_mm512_add_epi32(a.v, b.v)}; }
  static U sub(U a, U b) { return {_mm512_sub_epi32(a.v, b.v)}; }
  static U bit_and(U a, U b) { return {_mm512_and_si512(a.v, b.v)}; }
  static U bit_xor(U a, U b) { return {_mm512_xor_si512(a.v, b.v)}; }
  template <int n>
  static U shift_left(U a) {
    return {_mm512_slli_epi32(a.v, n)};
  }
  template <int n>
  static U shift_right(U a) {
    return {_mm512_srli_epi32(a.v, n)};
  }
  template <int n>
  static U shift_right_signed(U a) {
    return {_mm512_srai_epi32(a.v, n)};
  }
  static Mask any_bit(U a, U bits) { return _mm512_test_epi32_mask(a.v, bits.v); }
  static F select(Mask mask, F yes, F no) { return _mm512_mask_blend_ps(mask, no, yes); }

  struct Wide {
    __m512i even, odd;
  };
  static Wide widen(U a) { return {a.v, _mm512_srli_epi64(a.v, 32)}; }
  static Wide wide_set(std::uint32_t x) {
    const __m512i all = _mm512_set1_epi32(static_cast<int>(x));
    return {all, all};
  }
  static Wide wide_add(Wide a, std::uint32_t x) {
    const __m512i all = _mm512_set1_epi32(static_cast<int>(x));
    return {_mm512_add_epi32(a.even, all), _mm512_add_epi32(a.odd, all)};
  }
  static void wide_mul(Wide a, std::uint32_t x, Wide& high, Wide& low) {
    const __m512i all = _mm512_set1_epi32(static_cast<int>(x));
    low = {_mm512_mul_epu32(a.even, all), _mm512_mul_epu32(a.odd, all)};
    high = {_mm512_srli_epi64(low.even, 32), _mm512_srli_epi64(low.odd, 32)};
  }
  static Wide wide_xor(Wide a, Wide b, Wide c) {
    return {_mm512_ternarylogic_epi64(a.even, b.even, c.even, 0x96),
            _mm512_ternarylogic_epi64(a.odd, b.odd, c.odd, 0x96)};
  }
  static U narrow(Wide a) { return {_mm512_mask_shuffle_epi32(a.even, 0xAAAA, a.odd, _MM_PERM_CCAA)}; }

  static U load_bits(const std::uint32_t* p) { return {_mm512_loadu_si512(p)}; }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const bfloat16* p) {
    // Words l to the upper halves of lanes l, with one shuffle.
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i spread =
        _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 16);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, spread, twice));
  }
  static F load(const float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(bfloat16* p, F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i down = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
    const __m512i rounded = _mm512_mask_add_epi32(down, is_odd, bits, _mm512_set1_epi32(0x8000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    // The upper halves of lanes l to words l, with one shuffle.
    const __m512i gather = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x1F001D, 0x1B0019, 0x170015, 0x130011, 0x0F000D,
                                            0x0B0009, 0x070005, 0x030001);
    const __m512i words = _mm512_permutexvar_epi16(gather, chosen);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(words));
  }
  static void store(float16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  static F load_first(const float* p, std::int64_t count) { return _mm512_maskz_loadu_ps(first(count), p); }
  static void store_first(float* p, F x, std::int64_t count) { _mm512_mask_storeu_ps(p, first(count), x); }

  static void transpose(F (&x)[width]) {
    F pairs[width], fours[width];
    for (int i = 0; i < 8; ++i) {
      pairs[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
      pairs[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
    // Lane l of 128 bits of fours[4 i + j] then has column 4 l + j of rows 4 i to 4 i + 3.
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 2; ++j) {
        fours[4 * i + 2 * j] = _mm512_shuffle_ps(pairs[4 * i + j], pairs[4 * i + 2 + j], 0x44);
        fours[4 * i + 2 * j + 1] = _mm512_shuffle_ps(pairs[4 * i + j], pairs[4 * i + 2 + j], 0xEE);
      }
    }
    for (int j = 0; j < 4; ++j) {
      const F a = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x44);
      const F b = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xEE);
      const F c = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x44);
      const F d = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xEE);
      x[j] = _mm512_shuffle_f32x4(a, c, 0x88);
      x[4 + j] = _mm512_shuffle_f32x4(a, c, 0xDD);
      x[8 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
      x[12 + j] = _mm512_shuffle_f32x4(b, d, 0xDD);
    }
  }

  static void interleave(F a, F b, F& first, F& second) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    first = _mm512_permutex2var_ps(a, low, b);
    second = _mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
  }
  static void deinterleave(F first, F second, F& a, F& b) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    a = _mm512_permutex2var_ps(first, even, second);
    b = _mm512_permutex2var_ps(first, _mm512_add_epi32(even, _mm512_set1_epi32(1)), second);
  }

  static constexpr int block_of_lane[width] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  static void store_blocks(float* p, F x0, F x1, F x2, F x3) {
    const __m512 a = _mm512_unpacklo_ps(x0, x1), b = _mm512_unpackhi_ps(x0, x1);
    const __m512 c = _mm512_unpacklo_ps(x2, x3), d = _mm512_unpackhi_ps(x2, x3);
    _mm512_storeu_ps(p, _mm512_shuffle_ps(a, c, 0x44));
    _mm512_storeu_ps(p + 16, _mm512_shuffle_ps(a, c, 0xEE));
    _mm512_storeu_ps(p + 32, _mm512_shuffle_ps(b, d, 0x44));
    _mm512_storeu_ps(p + 48, _mm512_shuffle_ps(b, d, 0xEE));
  }

 private:
  static Mask first(std::int64_t count) { return static_cast<Mask>((1u << count) - 1); }
};

}  // namespace gencore::cpu::GENCORE_SIMD
