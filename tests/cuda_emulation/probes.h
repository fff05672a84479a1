// Small kernels that show what the emulator does; on a GPU, they show whether it is right. All return a cudaError_t,
// and wait for the kernel.
#pragma once

#include <cstddef>
#include <cstdint>

namespace probes {

const char* message(int error);

// How = 0..3: __shfl_sync, _up, _down, _xor. A lane of each warp takes n values of out, for operands 0 to n - 1.
int shuffle_int(const int* in, int* out, int warps, int how, int n, int width);
int shuffle_float(const float* in, float* out, int warps, int how, int n, int width);
int shuffle_double(const double* in, double* out, int warps, int how, int n, int width);
// The lower half of each warp goes up by one, the upper half down by one.
int shuffle_halves(const int* in, int* out, int warps);
// Each thread: ballot, all, any, match_any of in[thread].
int votes(const int* in, unsigned* out, int threads);
// Each thread: add, min, max of int; add, and, or, xor of unsigned.
int reductions(const int* in, int* out, int threads);

// Each block: the sum of its 256 elements, by static shared memory.
int block_sum(const float* in, float* out, int blocks);
// The same by __syncwarp within each warp.
int warp_sum(const float* in, float* out, int blocks);
// Each block reverses its elements, by dynamic shared memory.
int reverse(const float* in, float* out, int blocks, int threads);
// Each thread: __syncthreads_count, _and, _or.
int barrier_votes(const int* in, int* out, int threads);
// Each thread writes its place in the grid, so that all numbers from 0 on appear.
int indices(int* out, const unsigned (&grid)[3], const unsigned (&block)[3]);
int copy_vectors(const float* in, float* out, int vectors);
// Each thread gets a value from its neighbour.
int pass_on(const float* in, float* out, int threads);

// out: 256 counts, then add, min, max, and, or, xor, exchange, and what a lock made of compare-and-swap protects.
int atomics_int(const int* in, int* out, int n);
int atomic_sums(const float* in, float* out32, double* out64, int n);

// d (16x8) += a (16x16) b (16x8), of float16 or bfloat16. b is stored by columns, or by rows if `transposed`.
int matrix_product(const void* a, const void* b, float* d, bool is_half, bool transposed);
// out = in, but zeros from `valid` on, through a pipeline of two cp.async groups; n is a multiple of 128.
int copy_async(const float* in, float* out, int n, int valid);

// out = {half bits, bfloat16 bits} of in.
int to_halves(const float* in, unsigned short* half, unsigned short* bfloat16, int n);
int from_halves(const unsigned short* in, float* half, float* bfloat16, int n);
// For each pair of words: umulhi, mulhi, popc, clz, ffs, brev, byte_perm, funnelshift left and right.
int integer_functions(const unsigned* a, const unsigned* b, unsigned* out, int n);
// For each triple: fma, sqrt, sqrt_normal, min_nan, max_nan, division, rint to int, to unsigned.
int float_functions(const float* a, const float* b, const float* c, float* out, int n);

// How often sqrt_normal is not the root, correctly rounded, of 0 and the 2^24 numbers in [1, 4).
int square_roots(unsigned* wrong);

// Nothing but the check of the configuration.
int launch_only(int threads, std::size_t shared_bytes, std::size_t raised_limit);

}  // namespace probes
