// Conversions of the half types: to nearest, ties to even. As on the device, every NaN becomes 0x7FFF.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace gencore_emulation {

// Rounds a double to a binary format of `digits` significant bits whose greatest exponent is `max_exponent` (the value
// is below 2^max_exponent); the sign is left out. Exact steps in integers, so that no double rounding happens.
template <int digits, int max_exponent>
inline std::uint16_t round_to_bits(double a) {
  const std::uint64_t bits = std::bit_cast<std::uint64_t>(a) & ~(std::uint64_t{1} << 63);
  constexpr std::uint64_t infinity = std::uint64_t{0x7FF} << 52;
  if (bits > infinity) return 0x7FFF;
  constexpr int min_exponent = 3 - max_exponent;  // normals are at least 2^(min_exponent - 1)
  const std::uint64_t inf_bits = std::uint64_t{2 * max_exponent - 1} << (digits - 1);
  if (bits == infinity) return static_cast<std::uint16_t>(inf_bits);
  const int exponent = static_cast<int>(bits >> 52) - 1022;  // the value is in [2^(exponent - 1), 2^exponent)
  if (exponent < min_exponent - digits) return 0;
  const std::uint64_t significand = (bits & ((std::uint64_t{1} << 52) - 1)) | std::uint64_t{1} << 52;
  const bool subnormal = exponent < min_exponent;
  const int shift = 53 - digits + (subnormal ? min_exponent - exponent : 0);
  const std::uint64_t kept = significand >> shift, rest = significand & ((std::uint64_t{1} << shift) - 1);
  const std::uint64_t half = std::uint64_t{1} << (shift - 1);
  const std::uint64_t rounded = kept + (rest > half || (rest == half && (kept & 1)));
  // Adding, not joining: a carry out of the significand goes on into the exponent, and may make infinity.
  const std::uint64_t biased = subnormal ? 0 : static_cast<std::uint64_t>(exponent - min_exponent);
  const std::uint64_t result = (biased << (digits - 1)) + rounded;
  return static_cast<std::uint16_t>(result < inf_bits ? result : inf_bits);
}

inline std::uint16_t sign_bit(double a) {
  return static_cast<std::uint16_t>(std::bit_cast<std::uint64_t>(a) >> 63 << 15);
}

inline std::uint16_t half_bits(double a) {
  return a != a ? std::uint16_t{0x7FFF} : static_cast<std::uint16_t>(sign_bit(a) | round_to_bits<11, 16>(a));
}

inline std::uint16_t bfloat16_bits(double a) {
  return a != a ? std::uint16_t{0x7FFF} : static_cast<std::uint16_t>(sign_bit(a) | round_to_bits<8, 128>(a));
}

inline float half_value(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t magnitude = bits & 0x7FFFu;
  if (magnitude > 0x7C00u) return std::bit_cast<float>(0x7FFFFFFFu);
  if (magnitude == 0x7C00u) return std::bit_cast<float>(sign | 0x7F800000u);
  if (magnitude >= 0x0400u) return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(subnormal));
}

inline float bfloat16_value(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

}  // namespace gencore_emulation
