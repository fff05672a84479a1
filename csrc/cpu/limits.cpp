#include "gencore/limits.h"

#include <chrono>

#include "vec.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// As many as hide the latency of an instruction, and fit in the registers, two for each: AVX2 has 16.
[[maybe_unused]] constexpr int chains = GENCORE_SIMD_NUMBER == 2 ? 10 : 6;

// Makes the compiler believe that the value is needed and was changed, without an instruction.
#if GENCORE_SIMD_NUMBER == 0
#define GENCORE_KEEP(x) asm volatile("" : "+r"(x))
#elif GENCORE_SIMD_NUMBER == 1
#define GENCORE_KEEP(x) asm volatile("" : "+x"((x).v))
#else
#define GENCORE_KEEP(x) asm volatile("" : "+v"((x).v))
#endif

// The best of several short runs: a limit is what the machine does undisturbed.
template <class Body>
double per_second(double work, Body&& body) {
  double best = 0;
  for (int run = 0; run < 20; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    body();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    if (work / seconds > best) best = work / seconds;
  }
  return best;
}

constexpr int repeats = 100'000;

}  // namespace

#if GENCORE_SIMD_NUMBER < 3
double multiplications_per_second() {
  // A wide product is as many products as lanes: two instructions, one for the even and one for the odd ones.
  return per_second(static_cast<double>(repeats) * chains * V::width, [] {
    V::Wide state[chains];
#pragma GCC unroll 16
    for (int i = 0; i < chains; ++i) state[i] = V::wide_set(static_cast<std::uint32_t>(i) + 0x9E3779B9u);
    for (int repeat = 0; repeat < repeats; ++repeat) {
#pragma GCC unroll 16
      for (int i = 0; i < chains; ++i) {
        V::Wide high;
        V::wide_mul(state[i], 0xD2511F53u, high, state[i]);
#if GENCORE_SIMD_NUMBER == 0
        GENCORE_KEEP(state[i]);
#elif GENCORE_SIMD_NUMBER == 1
        asm volatile("" : "+x"(state[i].even), "+x"(state[i].odd));
#else
        asm volatile("" : "+v"(state[i].even), "+v"(state[i].odd));
#endif
      }
    }
  });
}

double vector_instructions_per_second() {
  return per_second(static_cast<double>(repeats) * chains, [] {
    V::U state[chains];
#pragma GCC unroll 16
    for (int i = 0; i < chains; ++i) state[i] = V::set_bits(static_cast<std::uint32_t>(i));
    const V::U step = V::set_bits(0x9E3779B9u);
    for (int repeat = 0; repeat < repeats; ++repeat) {
#pragma GCC unroll 16
      for (int i = 0; i < chains; ++i) {
        state[i] = V::add(state[i], step);
        GENCORE_KEEP(state[i]);
      }
    }
  });
}
#endif

double multiply_adds_per_second(bool of_bfloat16) {
  const bool is_dot = GENCORE_SIMD_NUMBER == 3 && of_bfloat16;
  // Two units of a latency of four, or of five, cycles.
  constexpr int sums = 12;
  return per_second(static_cast<double>(repeats) * sums * V::width * (is_dot ? 2 : 1), [&] {
    V::F state[sums];
#pragma GCC unroll 16
    for (int i = 0; i < sums; ++i) state[i] = V::set(1.0f);
    V::F factor = V::set(0.5f);
    for (int repeat = 0; repeat < repeats; ++repeat) {
#pragma GCC unroll 16
      for (int i = 0; i < sums; ++i) {
#if GENCORE_SIMD_NUMBER == 3
        if (is_dot) {
          state[i] = _mm512_dpbf16_ps(state[i], reinterpret_cast<__m512bh>(factor), reinterpret_cast<__m512bh>(factor));
        } else {
          state[i] = V::fma(factor, factor, state[i]);
        }
#else
        state[i] = V::fma(factor, factor, state[i]);
#endif
#if GENCORE_SIMD_NUMBER >= 2
        asm volatile("" : "+v"(state[i]));
#elif defined(__x86_64__)
        asm volatile("" : "+x"(state[i]));
#elif defined(__aarch64__)
        asm volatile("" : "+w"(state[i]));
#else
        asm volatile("" : "+g"(state[i]));
#endif
      }
    }
  });
}

}  // namespace gencore::cpu::GENCORE_SIMD

#if GENCORE_SIMD_NUMBER == 0
namespace gencore::cpu {

GENCORE_DECLARE_LEVELS(double multiplications_per_second())
GENCORE_DECLARE_LEVELS(double vector_instructions_per_second())
GENCORE_DECLARE_LEVELS(double multiply_adds_per_second(bool of_bfloat16))
#ifdef GENCORE_X86_LEVELS
namespace avx512_bf16 {
double multiply_adds_per_second(bool of_bfloat16);
}
#endif

double multiplications_per_second() { GENCORE_DISPATCH(multiplications_per_second); }
double vector_instructions_per_second() { GENCORE_DISPATCH(vector_instructions_per_second); }
double multiply_adds_per_second(bool of_bfloat16) {
#ifdef GENCORE_X86_LEVELS
  if (simd_level() == SimdLevel::avx512_bf16) return avx512_bf16::multiply_adds_per_second(of_bfloat16);
#endif
  GENCORE_DISPATCH(multiply_adds_per_second, of_bfloat16);
}

}  // namespace gencore::cpu
#endif
