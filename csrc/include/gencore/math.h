// Per-element mathematics, written once as fixed sequences of correctly rounded binary32 operations.
//
// `V` names the operations: a SIMD level of the CPU kernels (csrc/cpu/vec_*.h), or one lane of a GPU. Every operation
// of V is the IEEE-754 one, rounded once, so the results are the same bits whatever V is. Nothing here may be
// contracted or reassociated by a compiler: multiply-adds that shall be fused say fma.
#pragma once

#include <math.h>

#include "gencore/types.h"

namespace gencore {

template <class V, int n>
GENCORE_INLINE typename V::F horner(typename V::F x, const float (&coefficient)[n]) {
  typename V::F value = V::set(coefficient[n - 1]);
  GENCORE_UNROLL
  for (int i = n - 2; i >= 0; --i) value = V::fma(value, x, V::set(coefficient[i]));
  return value;
}

// Two standard normals from two 32-bit words (Box and Muller 1958). The definition, step by step, is
// gencore.noise.box_muller; the comments there say why each step is as it is.
template <class V>
GENCORE_INLINE void box_muller(typename V::U word0, typename V::U word1, typename V::F& normal0,
                               typename V::F& normal1) {
  using F = typename V::F;
  using U = typename V::U;
  // -2 ln(1 + f) = -2 f + f^2 Q(f) on [sqrt(1/2) - 1, sqrt(2) - 1]; relative error 3.4e-8.
  constexpr float log_q[] = {0.9999998211860657f, -0.6666783690452576f,  0.5000360012054443f, -0.3992644250392914f,
                             0.3313974142074585f, -0.29812416434288025f, 0.2861766219139099f, -0.17537200450897217f};
  // sin(pi s / 2) = s S(s^2), cos(pi s / 2) = 1 + s^2 C(s^2) on [-1/2, 1/2]; relative errors 3.3e-9 and 3.9e-8.
  constexpr float sin_s[] = {1.5707963705062866f, -0.6459634900093079f, 0.07968003302812576f, -0.004601658321917057f};
  constexpr float cos_c[] = {-1.233697772026062f, 0.2536035478115082f, -0.020418191328644753f};

  const F u = V::fma(V::float_from_unsigned(word0), V::set(0x1p-32f), V::set(0x1p-33f));
  const U bits = V::as_bits(u);
  const U exponent = V::template shift_right_signed<23>(V::sub(bits, V::set_bits(0x3F3504F3u)));
  const F f = V::sub(V::as_float(V::sub(bits, V::template shift_left<23>(exponent))), V::set(1.0f));
  const F f_square = V::mul(f, f);
  const F tail = V::fma(f_square, horner<V>(f, log_q), V::mul(f, V::set(-2.0f)));
  const F radius = V::sqrt(V::fma(V::float_from_signed(exponent), V::set(-1.3862943649291992f), tail));
  const F turned = V::as_float(V::bit_xor(V::as_bits(radius), V::bit_and(word1, V::set_bits(0x80000000u))));

  const F s = V::mul(V::float_from_signed(V::template shift_left<2>(word1)), V::set(0x1p-32f));
  const F s_square = V::mul(s, s);
  const F sine = V::mul(s, horner<V>(s_square, sin_s));
  const F cosine = V::fma(s_square, horner<V>(s_square, cos_c), V::set(1.0f));
  const auto mirrored = V::any_bit(word1, V::set_bits(0x40000000u));
  normal0 = V::mul(turned, V::select(mirrored, sine, cosine));
  normal1 = V::mul(turned, V::select(mirrored, cosine, sine));
}

// Uniform in [0, 1) with 24 bits from a 32-bit word.
template <class V>
GENCORE_INLINE typename V::F unit_uniform(typename V::U word) {
  return V::mul(V::float_from_signed(V::template shift_right<8>(word)), V::set(0x1p-24f));
}

// e^x = 2^n (1 + fraction) for -104 <= x <= 89, and for x beyond as for the nearer of the two.
template <class V>
struct ExpParts {
  typename V::F fraction, n;
  typename V::U n_bits;
};

template <class V>
GENCORE_INLINE ExpParts<V> exp_parts(typename V::F x) {
  using F = typename V::F;
  // e^r = 1 + r + r^2 P(r) on |r| <= ln(2) / 2; relative error 3.1e-9.
  constexpr float p[] = {0.4999999403953552f, 0.1666652113199234f, 0.0416683629155159f, 0.00836868118494749f,
                         0.0013815740821883082f};
  // Beyond these the result is 0 or infinity. min and max give their second operand if one is NaN.
  x = V::max(V::set(-104.0f), V::min(V::set(89.0f), x));
  // Adding 1.5 * 2^23 rounds to an integer, which the low bits of the sum then hold.
  const F magic = V::set(12582912.0f);
  const F shifted = V::fma(x, V::set(1.4426950216293335f), magic);
  const F n = V::sub(shifted, magic);
  F r = V::fma(n, V::set(-0.693147182464599609375f), x);
  r = V::fma(n, V::set(1.904654299957767878541e-9f), r);
  return {V::fma(V::mul(r, r), horner<V>(r, p), r), n, V::sub(V::as_bits(shifted), V::as_bits(magic))};
}

// e^x, within 1.1 ulp of the real value; overflows to infinity, underflows gradually to 0, passes NaN on.
template <class V>
GENCORE_INLINE typename V::F exp(typename V::F x) {
  const ExpParts<V> parts = exp_parts<V>(x);
  return V::scale(V::add(V::set(1.0f), parts.fraction), parts.n, parts.n_bits);
}

// 2^-(n + f) for |f| <= 1/2, from f, and from -n as a float and as an integer.
template <class V>
GENCORE_INLINE typename V::F exp2_minus_parts(typename V::F f, typename V::F minus_n, typename V::U minus_n_bits) {
  // 2^-f; relative error 9.3e-8.
  constexpr float p[] = {1.0f,
                         -0.6931470036506653f,
                         0.24022246897220612f,
                         -0.0555071122944355f,
                         0.009671294130384922f,
                         -0.0013269407209008932f};
  return V::scale(horner<V>(f, p), minus_n, minus_n_bits);
}

// e^-x in fewer steps than exp: within 3 ulp for |x| up to 10, and |x| / 3 ulp beyond, as log2(e) is rounded.
template <class V>
GENCORE_INLINE typename V::F exp_minus(typename V::F x) {
  using F = typename V::F;
  const F log2_e = V::set(1.4426950216293335f);
  x = V::max(V::set(-104.0f), V::min(V::set(104.0f), x));
  const F magic = V::set(12582912.0f);
  const F shifted = V::fma(x, log2_e, magic);
  const F minus_n = V::sub(magic, shifted);
  return exp2_minus_parts<V>(V::fma(x, log2_e, minus_n), minus_n, V::sub(V::as_bits(magic), V::as_bits(shifted)));
}

// 2^-x for x >= 0, within 2 ulp; underflows gradually to 0, passes NaN on.
template <class V>
GENCORE_INLINE typename V::F exp2_minus(typename V::F x) {
  using F = typename V::F;
  x = V::min(V::set(151.0f), x);
  const F magic = V::set(12582912.0f);
  const F shifted = V::add(x, magic);
  const F minus_n = V::sub(magic, shifted);
  return exp2_minus_parts<V>(V::add(x, minus_n), minus_n, V::sub(V::as_bits(magic), V::as_bits(shifted)));
}

// e^x - 1 for x <= 0, within 2 ulp; passes NaN on.
template <class V>
GENCORE_INLINE typename V::F expm1_of_negative(typename V::F x) {
  const ExpParts<V> parts = exp_parts<V>(x);
  const typename V::F power = V::scale(V::set(1.0f), parts.n, parts.n_bits);
  return V::fma(power, parts.fraction, V::sub(power, V::set(1.0f)));
}

// ln(1 + x) for 0 <= x <= 1, within 3 ulp; passes NaN on.
template <class V>
GENCORE_INLINE typename V::F log1p_of_unit(typename V::F x) {
  using F = typename V::F;
  // ln(1 + x) = 2 artanh(z) = 2 z (1 + z^2 P(z^2)) with z = x / (2 + x) <= 1/3; relative error 5.6e-9.
  constexpr float p[] = {0.3333320915699005f, 0.20010769367218018f, 0.14000819623470306f, 0.14006394147872925f};
  const F z = V::div(x, V::add(V::set(2.0f), x)), square = V::mul(z, z);
  const F twice = V::add(z, z);
  return V::fma(V::mul(twice, square), horner<V>(square, p), twice);
}

// The standard normal distribution at x: its density, and how much of it lies beyond |x|.
template <class F>
struct NormalTail {
  F density, beyond;
};

template <class V>
GENCORE_INLINE NormalTail<typename V::F> normal_tail(typename V::F x) {
  using F = typename V::F;
  // beyond = e^(-x^2 / 2) k P(k) with k = 1 / (1 + 0.26 |x|); relative error 4.5e-8.
  constexpr float p[] = {0.10375702381134033f, 0.10305098444223404f,  0.10278859734535217f,
                         0.05196518078446388f, 0.15875785052776337f,  -0.1477879285812378f,
                         0.24873186647891998f, -0.15149374306201935f, 0.030230147764086723f};
  const F magnitude = V::max(x, V::sub(V::set(0.0f), x));
  // Where the density is 0 in any case, so that the square does not overflow. min gives its second operand for NaN.
  const F a = V::min(V::set(16.0f), magnitude);
  // e^(-x^2 / 2), with what the square's rounding left made up for: it counts where the square is large.
  const F square = V::mul(a, a), rest = V::fma(a, a, V::sub(V::set(0.0f), square));
  const F bell = exp<V>(V::mul(square, V::set(-0.5f)));
  const F density = V::fma(V::mul(bell, V::set(-0.5f)), rest, bell);
  const F k = V::div(V::set(1.0f), V::fma(a, V::set(0.26f), V::set(1.0f)));
  return {V::mul(density, V::set(0.3989422804f)), V::mul(V::mul(density, k), horner<V>(k, p))};
}

// The same in binary64.
GENCORE_INLINE NormalTail<double> normal_tail_of(double x) {
  return {0.39894228040143267794 * ::exp(-0.5 * x * x), 0.5 * ::erfc(::fabs(x) * 0.70710678118654752440)};
}

// What is above, for any arithmetic: one that has a function of its own of that name takes it, as that of binary64
// takes the library's.
#define GENCORE_EITHER(name, function)            \
  template <class P>                              \
  GENCORE_INLINE auto name(typename P::F x) {     \
    if constexpr (requires { P::function(x); }) { \
      return P::function(x);                      \
    } else {                                      \
      return function<P>(x);                      \
    }                                             \
  }
GENCORE_EITHER(exponential, exp)
GENCORE_EITHER(exponential_minus, exp_minus)
GENCORE_EITHER(exponential_less_one, expm1_of_negative)
GENCORE_EITHER(log_of_one_and, log1p_of_unit)
GENCORE_EITHER(normal_at, normal_tail)
#undef GENCORE_EITHER

// -log p of an 8-bit value x in [-1, 1], whose bin is 2/255 wide or, at either end, reaches to infinity, under a normal
// distribution, and its derivative by the logarithm of the variance (Ho et al. 2020, equation 13). p counts as 1e-12 at
// least. In binary64 and by the math library, as probabilities of bins are differences.
struct DecoderTerm {
  double value, derivative;
};

GENCORE_INLINE DecoderTerm decoder_term(double x, double mean, double log_variance) {
  constexpr double half_bin = 1.0 / 255, sqrt_half = 0.70710678118654752, density = 0.39894228040143268;
  const double deviation = ::exp(0.5 * log_variance), c = x - mean;
  const bool first = x < -0.999, last = x > 0.999;
  const double low = (c - half_bin) / deviation, high = (c + half_bin) / deviation;
  // Of the two tails of the distribution the one whose difference loses no digits.
  const bool upper = last || (!first && c > 0);
  const double near = upper ? low : -high, far = upper ? high : -low;
  const double p = 0.5 * (::erfc(near * sqrt_half) - (first || last ? 0 : ::erfc(far * sqrt_half)));
  if (p < 1e-12) return {-::log(1e-12), 0};
  const double at_high = last ? 0 : high * density * ::exp(-0.5 * high * high);
  const double at_low = first ? 0 : low * density * ::exp(-0.5 * low * low);
  return {-::log(p), 0.5 * (at_high - at_low) / p};
}

}  // namespace gencore
