// What one core can do at the SIMD level in use: the limits that benchmarks hold the kernels against.
#pragma once

namespace gencore::cpu {

// Products of two 32-bit integers into 64 bits, per second. Philox4x32-10 takes 5 per value.
double multiplications_per_second();

// Vector instructions issued per second, of the simplest kind and independent of one another.
double vector_instructions_per_second();

// Multiply-adds of binary32, or of bfloat16 with sums in binary32 where there are instructions for them, per second: a
// bound for matrix products.
double multiply_adds_per_second(bool of_bfloat16);

}  // namespace gencore::cpu
