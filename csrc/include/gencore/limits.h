// What one core can do at the SIMD level in use: the limits that benchmarks hold the noise kernels against.
#pragma once

namespace gencore::cpu {

// Products of two 32-bit integers into 64 bits, per second. Philox4x32-10 takes 5 per value.
double multiplications_per_second();

// Vector instructions issued per second, of the simplest kind and independent of one another.
double vector_instructions_per_second();

}  // namespace gencore::cpu
