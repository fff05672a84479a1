// The instructions that C++ has no words for, as the PTX ISA manual defines them. Nothing else in csrc/cuda says asm.
#pragma once

// The emulator of the tests (tests/cuda_emulation) names a header of its own with the same functions.
#ifdef GENCORE_PTX
#include GENCORE_PTX
#else

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "gencore/types.h"

namespace gencore::cuda::ptx {

// NaN if either is; -0 is less than 0.
__device__ __forceinline__ float min_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// 2^a, to 2^-22 of it; 0 where it is below 2^-126.
__device__ __forceinline__ float exp2_approx(float a) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}

// 1 / a, within 1 ulp of it; 0 where it is below 2^-126.
__device__ __forceinline__ float reciprocal_approx(float a) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}

// The square root, correctly rounded, of 0 or a number from 2^-100 to 2^100. It is what sqrt.rn.f32 does in that range,
// without the branch for the rest.
__device__ __forceinline__ float sqrt_normal(float a) {
  float reciprocal;
  // Of 0 this takes the root of 2^-100 instead: infinity times 0 would be NaN.
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(fmaxf(a, 0x1p-100f)));
  const float root = __fmul_rn(a, reciprocal), half = __fmul_rn(reciprocal, 0.5f);
  return __fmaf_rn(__fmaf_rn(-root, root, a), half, root);
}

// Writes 16 bytes with one instruction; a plain assignment of a struct may become several.
__device__ __forceinline__ void store(uint4* address, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ __forceinline__ void store(float4* address, float4 value) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "f"(value.x),
               "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}

__device__ __forceinline__ void store(double2* address, double2 value) {
  asm volatile("st.global.v2.f64 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(address)), "d"(value.x), "d"(value.y)
               : "memory");
}

// What is computed from the value stays behind this point of the program: with it the wait for the value, where it was
// loaded before.
__device__ __forceinline__ void keep_behind(uint4& value) {
  asm volatile("" : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w));
}
__device__ __forceinline__ void keep_behind(int& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void keep_behind(float& value) { asm volatile("" : "+f"(value)); }
__device__ __forceinline__ void keep_behind(double& value) { asm volatile("" : "+d"(value)); }
__device__ __forceinline__ void keep_behind(bfloat16& value) { asm volatile("" : "+h"(value.bits)); }
__device__ __forceinline__ void keep_behind(float16& value) { asm volatile("" : "+h"(value.bits)); }

// The shared memory whose size the launch gives; at a multiple of 16.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  static_assert(alignof(T) <= 16);
  extern __shared__ __align__(16) unsigned char gencore_dynamic_shared[];
  return reinterpret_cast<T*>(gencore_dynamic_shared);
}

__device__ __forceinline__ std::uint32_t shared_address(const void* address) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(address));
}

// The same as `store`, for shared memory.
__device__ __forceinline__ void store_shared(uint4* address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(address)), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ __forceinline__ void store_shared(float4* address, float4 value) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(address)), "f"(value.x), "f"(value.y),
               "f"(value.z), "f"(value.w)
               : "memory");
}

// Begins to copy 16 bytes from global to shared memory, both at multiples of 16; zeros if not valid, and `global` is
// not read then. They are there for this thread after cp_async_wait, for others after a barrier behind that.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}

// Makes a group of the copies that this thread began since the last.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all of this thread's groups but the n youngest have arrived.
template <int n>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// A warp loads 8x8 matrices of 16-bit elements from shared memory. Lanes 8 i to 8 i + 7 give the addresses of the rows
// of matrix i, multiples of 16. Lane l gets of each matrix the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, or of
// column l / 4 if transposed.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(std::uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(std::uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b by a warp: a is 16x16 and b 16x8, of float16 or bfloat16; d is 16x8. With g = lane / 4 and t = 2 (lane % 4),
// a lane holds a[g][t, t+1], a[g+8][t, t+1], a[g][t+8, t+9], a[g+8][t+8, t+9]; b[t, t+1][g], b[t+8, t+9][g];
// d[g][t], d[g][t+1], d[g+8][t], d[g+8][t+1].
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, float16> || std::is_same_v<T, bfloat16>);
  if constexpr (std::is_same_v<T, float16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace gencore::cuda::ptx

#endif
