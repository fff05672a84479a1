#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <utility>

#include "gencore/types.h"
#include "probes.h"
#include "ptx.cuh"

namespace probes {

namespace ptx = gencore::cuda::ptx;

constexpr unsigned every_lane = 0xFFFFFFFFu;
constexpr int block_threads = 256;

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (error == cudaSuccess) error = cudaStreamSynchronize(nullptr);
  cudaGetLastError();
  return error;
}

const char* message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

template <class T>
__global__ void shuffle_kernel(const T* in, T* out, int how, int n, int width) {
  const int thread = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const T value = in[thread];
  for (int i = 0; i < n; ++i) {
    T result{};
    if (how == 0) result = __shfl_sync(every_lane, value, i, width);
    if (how == 1) result = __shfl_up_sync(every_lane, value, static_cast<unsigned>(i), width);
    if (how == 2) result = __shfl_down_sync(every_lane, value, static_cast<unsigned>(i), width);
    if (how == 3) result = __shfl_xor_sync(every_lane, value, i, width);
    out[thread * n + i] = result;
  }
}

int shuffle_int(const int* in, int* out, int warps, int how, int n, int width) {
  return launch(shuffle_kernel<int>, 1, 32 * warps, 0, in, out, how, n, width);
}
int shuffle_float(const float* in, float* out, int warps, int how, int n, int width) {
  return launch(shuffle_kernel<float>, 1, 32 * warps, 0, in, out, how, n, width);
}
int shuffle_double(const double* in, double* out, int warps, int how, int n, int width) {
  return launch(shuffle_kernel<double>, 1, 32 * warps, 0, in, out, how, n, width);
}

__global__ void shuffle_halves_kernel(const int* in, int* out) {
  const int value = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) {
    out[threadIdx.x] = __shfl_up_sync(0x0000FFFFu, value, 1u, 16);
  } else {
    out[threadIdx.x] = __shfl_down_sync(0xFFFF0000u, value, 1u, 16);
  }
}

int shuffle_halves(const int* in, int* out, int warps) {
  return launch(shuffle_halves_kernel, 1, 32 * warps, 0, in, out);
}

__global__ void votes_kernel(const int* in, unsigned* out) {
  const int value = in[threadIdx.x];
  unsigned* const own = out + 4 * threadIdx.x;
  own[0] = __ballot_sync(every_lane, value);
  own[1] = static_cast<unsigned>(__all_sync(every_lane, value));
  own[2] = static_cast<unsigned>(__any_sync(every_lane, value));
  own[3] = __match_any_sync(every_lane, value);
}

int votes(const int* in, unsigned* out, int threads) { return launch(votes_kernel, 1, threads, 0, in, out); }

__global__ void reductions_kernel(const int* in, int* out) {
  const int value = in[threadIdx.x];
  const auto bits = static_cast<unsigned>(value);
  int* const own = out + 7 * threadIdx.x;
  own[0] = __reduce_add_sync(every_lane, value);
  own[1] = __reduce_min_sync(every_lane, value);
  own[2] = __reduce_max_sync(every_lane, value);
  own[3] = static_cast<int>(__reduce_add_sync(every_lane, bits));
  own[4] = static_cast<int>(__reduce_and_sync(every_lane, bits));
  own[5] = static_cast<int>(__reduce_or_sync(every_lane, bits));
  own[6] = static_cast<int>(__reduce_xor_sync(every_lane, bits));
}

int reductions(const int* in, int* out, int threads) { return launch(reductions_kernel, 1, threads, 0, in, out); }

__global__ void block_sum_kernel(const float* in, float* out) {
  __shared__ float part[block_threads];
  part[threadIdx.x] = in[blockIdx.x * block_threads + threadIdx.x];
  for (unsigned half = block_threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = part[0];
}

int block_sum(const float* in, float* out, int blocks) {
  return launch(block_sum_kernel, blocks, block_threads, 0, in, out);
}

__global__ void warp_sum_kernel(const float* in, float* out) {
  __shared__ float part[block_threads];
  float* const own = part + (threadIdx.x & ~31u);
  const unsigned lane = threadIdx.x & 31u;
  own[lane] = in[blockIdx.x * block_threads + threadIdx.x];
  for (unsigned half = 16; half > 0; half /= 2) {
    __syncwarp();
    const float sum = lane < half ? own[lane] + own[lane + half] : 0.0f;
    __syncwarp();
    if (lane < half) own[lane] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < block_threads; i += 32) sum += part[i];
    out[blockIdx.x] = sum;
  }
}

int warp_sum(const float* in, float* out, int blocks) {
  return launch(warp_sum_kernel, blocks, block_threads, 0, in, out);
}

__global__ void reverse_kernel(const float* in, float* out) {
  float* const part = ptx::dynamic_shared<float>();
  const unsigned start = blockIdx.x * blockDim.x;
  part[threadIdx.x] = in[start + threadIdx.x];
  __syncthreads();
  out[start + threadIdx.x] = part[blockDim.x - 1 - threadIdx.x];
}

int reverse(const float* in, float* out, int blocks, int threads) {
  return launch(reverse_kernel, blocks, threads, static_cast<std::size_t>(threads) * sizeof(float), in, out);
}

__global__ void barrier_votes_kernel(const int* in, int* out) {
  const int value = in[threadIdx.x];
  out[3 * threadIdx.x] = __syncthreads_count(value);
  out[3 * threadIdx.x + 1] = __syncthreads_and(value);
  out[3 * threadIdx.x + 2] = __syncthreads_or(value);
}

int barrier_votes(const int* in, int* out, int threads) { return launch(barrier_votes_kernel, 1, threads, 0, in, out); }

__global__ void indices_kernel(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned number = block * blockDim.x * blockDim.y * blockDim.z + thread;
  out[number] = static_cast<int>(number);
}

int indices(int* out, const unsigned (&grid)[3], const unsigned (&block)[3]) {
  return launch(indices_kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0, out);
}

__global__ void copy_vectors_kernel(const float4* in, float4* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) ptx::store(out + i, __ldg(in + i));
}

int copy_vectors(const float* in, float* out, int vectors) {
  return launch(copy_vectors_kernel, (vectors + 31) / 32, 32, 0, reinterpret_cast<const float4*>(in),
                reinterpret_cast<float4*>(out), vectors);
}

__global__ void pass_on_kernel(const float* in, float* out) {
  __shared__ float value[1024];
  value[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = value[(threadIdx.x + 1) % blockDim.x];
}

int pass_on(const float* in, float* out, int threads) { return launch(pass_on_kernel, 1, threads, 0, in, out); }

__global__ void atomics_kernel(const int* in, int* out, int n) {
  __shared__ int counts[256];
  counts[threadIdx.x] = 0;
  __syncthreads();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) {
    const int value = in[i];
    atomicAdd(&counts[value & 255], 1);
    int* const result = out + 256;
    atomicAdd(&result[0], value);
    atomicMin(&result[1], value);
    atomicMax(&result[2], value);
    atomicAnd(&result[3], value);
    atomicOr(&result[4], value);
    atomicXor(&result[5], value);
    atomicExch(&result[6], value);
    // A sum by compare-and-swap.
    int old = atomicAdd(&result[7], 0);
    for (int seen = old + 1; seen != old;) {
      seen = old;
      old = atomicCAS(&result[7], seen, seen + value);
    }
  }
  __syncthreads();
  if (counts[threadIdx.x] != 0) atomicAdd(&out[threadIdx.x], counts[threadIdx.x]);
}

int atomics_int(const int* in, int* out, int n) { return launch(atomics_kernel, (n + 255) / 256, 256, 0, in, out, n); }

__global__ void atomic_sums_kernel(const float* in, float* out32, double* out64, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  atomicAdd(out32, in[i]);
  atomicAdd(out64, static_cast<double>(in[i]));
}

int atomic_sums(const float* in, float* out32, double* out64, int n) {
  return launch(atomic_sums_kernel, (n + 255) / 256, 256, 0, in, out32, out64, n);
}

// A warp copies the matrices to shared memory with rows 16 bytes apart from where the last ends, loads and multiplies.
template <class T, bool transposed>
__global__ void matrix_product_kernel(const T* a, const T* b, float* d) {
  constexpr int b_rows = transposed ? 16 : 8, b_columns = transposed ? 8 : 16, gap = 8;
  __shared__ __align__(16) T a_tile[16][16 + gap];
  __shared__ __align__(16) T b_tile[b_rows][b_columns + gap];
  const int lane = static_cast<int>(threadIdx.x);
  ptx::cp_async_16(&a_tile[lane / 2][lane % 2 * 8], a + lane * 8, true);
  if (lane < 16) ptx::cp_async_16(&b_tile[lane * 8 / b_columns][lane * 8 % b_columns], b + lane * 8, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  std::uint32_t a_part[4], b_part[2];
  ptx::ldmatrix_x4(a_part, &a_tile[lane % 16][lane / 16 * 8]);
  if constexpr (transposed) {
    ptx::ldmatrix_x2_trans(b_part, &b_tile[lane % 16][0]);
  } else {
    ptx::ldmatrix_x2(b_part, &b_tile[lane % 8][lane / 8 % 2 * 8]);
  }
  const int row = lane / 4, column = lane % 4 * 2;
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = d[(row + i / 2 * 8) * 8 + column + i % 2];
  ptx::mma_m16n8k16<T>(sum, a_part, b_part);
  for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + column + i % 2] = sum[i];
}

template <class T>
int matrix_product_of(const void* a, const void* b, float* d, bool transposed) {
  const auto kernel = transposed ? matrix_product_kernel<T, true> : matrix_product_kernel<T, false>;
  return launch(kernel, 1, 32, 0, static_cast<const T*>(a), static_cast<const T*>(b), d);
}

int matrix_product(const void* a, const void* b, float* d, bool is_half, bool transposed) {
  return is_half ? matrix_product_of<gencore::float16>(a, b, d, transposed)
                 : matrix_product_of<gencore::bfloat16>(a, b, d, transposed);
}

__global__ void copy_async_kernel(const float* in, float* out, int parts, int valid) {
  constexpr int part = 128;
  float* const stage = ptx::dynamic_shared<float>();
  const int at = 4 * static_cast<int>(threadIdx.x);
  const auto begin = [&](int i) {
    if (i < parts) ptx::cp_async_16(stage + i % 2 * part + at, in + i * part + at, i * part + at < valid);
    ptx::cp_async_commit();
  };
  begin(0);
  for (int i = 0; i < parts; ++i) {
    begin(i + 1);
    ptx::cp_async_wait<1>();
    __syncthreads();
    for (int j = 0; j < 4; ++j) {
      const int reversed = part - 1 - (at + j);  // so that other threads' copies are read
      out[i * part + reversed] = stage[i % 2 * part + reversed];
    }
    __syncthreads();
  }
}

int copy_async(const float* in, float* out, int n, int valid) {
  return launch(copy_async_kernel, 1, 32, 2 * 128 * sizeof(float), in, out, n / 128, valid);
}

__global__ void to_halves_kernel(const float* in, unsigned short* half, unsigned short* bfloat16, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  half[i] = __half_as_ushort(__float2half_rn(in[i]));
  bfloat16[i] = __bfloat16_as_ushort(__float2bfloat16_rn(in[i]));
}

int to_halves(const float* in, unsigned short* half, unsigned short* bfloat16, int n) {
  return launch(to_halves_kernel, (n + 255) / 256, 256, 0, in, half, bfloat16, n);
}

__global__ void from_halves_kernel(const unsigned short* in, float* half, float* bfloat16, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  half[i] = __half2float(__ushort_as_half(in[i]));
  bfloat16[i] = __bfloat162float(__ushort_as_bfloat16(in[i]));
}

int from_halves(const unsigned short* in, float* half, float* bfloat16, int n) {
  return launch(from_halves_kernel, (n + 255) / 256, 256, 0, in, half, bfloat16, n);
}

__global__ void integer_functions_kernel(const unsigned* a, const unsigned* b, unsigned* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const unsigned x = a[i], y = b[i];
  unsigned* const own = out + 9 * i;
  own[0] = __umulhi(x, y);
  own[1] = static_cast<unsigned>(__mulhi(static_cast<int>(x), static_cast<int>(y)));
  own[2] = static_cast<unsigned>(__popc(x));
  own[3] = static_cast<unsigned>(__clz(static_cast<int>(x)));
  own[4] = static_cast<unsigned>(__ffs(static_cast<int>(x)));
  own[5] = __brev(x);
  own[6] = __byte_perm(x, y, 0x7351u);
  own[7] = __funnelshift_l(x, y, y & 63u);
  own[8] = __funnelshift_r(x, y, y & 63u);
}

int integer_functions(const unsigned* a, const unsigned* b, unsigned* out, int n) {
  return launch(integer_functions_kernel, (n + 255) / 256, 256, 0, a, b, out, n);
}

__global__ void float_functions_kernel(const float* a, const float* b, const float* c, float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const float x = a[i], y = b[i], z = c[i];
  float* const own = out + 8 * i;
  own[0] = __fmaf_rn(x, y, z);
  own[1] = __fsqrt_rn(fabsf(x));
  own[2] = ptx::sqrt_normal(fabsf(x));
  own[3] = ptx::min_nan(x, y);
  own[4] = ptx::max_nan(x, y);
  own[5] = __fdiv_rn(x, y);
  own[6] = __int_as_float(__float2int_rn(x));
  own[7] = __uint_as_float(__float2uint_rz(x));
}

int float_functions(const float* a, const float* b, const float* c, float* out, int n) {
  return launch(float_functions_kernel, (n + 255) / 256, 256, 0, a, b, c, out, n);
}

// The root in double precision is near enough that rounding it again gives the rounded root.
__global__ void square_roots_kernel(unsigned* wrong) {
  constexpr unsigned count = 1u << 24, one = 0x3F800000u;
  const unsigned first = blockIdx.x * blockDim.x + threadIdx.x;
  unsigned own = 0;
  for (unsigned i = first; i <= count; i += gridDim.x * blockDim.x) {
    const float x = i == count ? 0.0f : __uint_as_float(one + i);
    const float root = static_cast<float>(__dsqrt_rn(static_cast<double>(x)));
    own += __float_as_uint(ptx::sqrt_normal(x)) != __float_as_uint(root);
  }
  if (own != 0) atomicAdd(wrong, own);
}

int square_roots(unsigned* wrong) { return launch(square_roots_kernel, 8, block_threads, 0, wrong); }

__global__ void empty_kernel() {}

int launch_only(int threads, std::size_t shared_bytes, std::size_t raised_limit) {
  const auto limit = static_cast<int>(raised_limit);
  const cudaError_t error = cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  cudaGetLastError();
  return error == cudaSuccess ? launch(empty_kernel, 1, threads, shared_bytes) : error;
}

}  // namespace probes
