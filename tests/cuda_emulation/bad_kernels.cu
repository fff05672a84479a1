// Kernels with one fault each, for the emulator only, and their twins without it. Each works on `n` floats.
#include <cuda_runtime.h>

#include <cstring>

#include "bad_kernels.h"
#include "ptx.cuh"

namespace bad {

namespace ptx = gencore::cuda::ptx;

constexpr int block_threads = 64, blocks = 2;
constexpr unsigned every_lane = 0xFFFFFFFFu;

__device__ inline int own_index() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

template <bool right>
__global__ void read_out_of_bounds(float* data, int n) {
  const int i = own_index();
  const float next = right ? (i + 1 < n ? data[i + 1] : 0.0f) : data[i + 1];
  if (next < 0) data[i] = next;
}

template <bool right>
__global__ void write_out_of_bounds(float* data, int n) {
  const int i = own_index() + (right ? 0 : 1);
  if (i <= n) data[i] = 1.0f;
}

template <bool right>
__global__ void write_before_buffer(float* data, int) {
  data[own_index() - (right ? 0 : 2)] = 1.0f;
}

template <bool right>
__global__ void copy_out_of_bounds(float* data, int n) {
  float part[3] = {};
  if (own_index() == 0) std::memcpy(part, data + n - (right ? 3 : 2), sizeof part);
  if (part[0] < 0) data[0] = part[0] + part[1] + part[2];
}

template <bool right>
__global__ void static_shared_out_of_bounds(float* data, int) {
  __shared__ float part[block_threads];
  part[threadIdx.x + (right ? 0 : 1)] = data[own_index()];
}

template <bool right>
__global__ void dynamic_shared_out_of_bounds(float* data, int) {
  float* const part = ptx::dynamic_shared<float>();
  part[threadIdx.x + (right ? 0 : 1)] = data[own_index()];
}

template <bool right>
__global__ void null_pointer(float* data, int) {
  float* const from = right ? data : nullptr;
  if (from[own_index()] < 0) data[0] = 0;
}

template <bool right>
__global__ void other_stack(float* data, int) {
  __shared__ const float* address;
  __shared__ float value;
  const float local[2] = {data[own_index()], 1.0f};
  if (threadIdx.x == 3) {
    address = local;
    value = local[0];
  }
  __syncthreads();
  const float* const from = right ? &value : address;
  if (*from < 0) data[own_index()] = 1.0f;
  __syncthreads();
}

template <bool right>
__global__ void missing_barrier(float* data, int) {
  __shared__ float part[block_threads];
  part[threadIdx.x] = data[own_index()];
  if (right) __syncthreads();
  data[own_index()] = part[threadIdx.x ^ 1];
}

// What is read in one round is overwritten in the next.
template <bool right>
__global__ void missing_second_barrier(float* data, int) {
  __shared__ float part;
  float sum = 0;
  for (int i = 0; i < 3; ++i) {
    if (threadIdx.x == 0) part = data[blockIdx.x * blockDim.x + i];
    __syncthreads();
    sum += part;
    if (right) __syncthreads();
  }
  if (threadIdx.x == 7) data[own_index()] = sum;
}

template <bool right>
__global__ void missing_syncwarp(float* data, int) {
  __shared__ float part[block_threads];
  part[threadIdx.x] = data[own_index()];
  if (right) __syncwarp();
  // A shuffle does not order accesses of memory.
  const float other = __shfl_xor_sync(every_lane, part[threadIdx.x ^ 1], 1);
  if (other < 0) data[own_index()] = other;
}

// __syncwarp does not order the threads of different warps.
template <bool right>
__global__ void syncwarp_across_warps(float* data, int) {
  __shared__ float part[block_threads];
  part[threadIdx.x] = data[own_index()];
  right ? __syncthreads() : __syncwarp();
  data[own_index()] = part[(threadIdx.x + 32) % block_threads];
}

template <bool right>
__global__ void syncwarp_of_some(float* data, int) {
  __shared__ float part[block_threads];
  part[threadIdx.x] = data[own_index()];
  if (threadIdx.x % 32 < 16) __syncwarp(0xFFFFu);
  if (right) __syncwarp();
  if (threadIdx.x % 32 < 8) data[own_index()] = part[threadIdx.x + 8] + part[threadIdx.x + 16];
}

template <bool right>
__global__ void adjacent_bytes(float* data, int) {
  __shared__ unsigned char bytes[block_threads + 1];
  unsigned char* const own = bytes + threadIdx.x;
  own[0] = 1;
  if (!right) own[1] = 1;
  if (*own == 0) data[0] = 1;
}

template <bool right>
__global__ void atomic_and_plain(float* data, int) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1);
  if (right) __syncthreads();
  if (threadIdx.x == 5) data[own_index()] = static_cast<float>(count);
}

// The last to count are of the warp that reads.
template <bool right>
__global__ void atomics_of_another_warp(float* data, int) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (!right || threadIdx.x >= 32) atomicAdd(&count, 1);
  __syncwarp();
  if (threadIdx.x == 32) data[own_index()] = static_cast<float>(count);
}

// Other blocks may count before this one reads, or after.
template <bool right>
__global__ void counter_of_all_blocks(float* data, int) {
  unsigned* const counter = reinterpret_cast<unsigned*>(data);
  if (threadIdx.x != 0) return;
  const unsigned old = atomicAdd(counter, 1u);
  if (blockIdx.x == 1 && (right ? old : *counter) == 9) data[1] = 1.0f;
}

template <bool right>
__global__ void two_blocks_write(float* data, int) {
  if (threadIdx.x == 0) data[right ? own_index() : 0] = 1.0f;
}

template <bool right>
__global__ void two_blocks_read_and_write(float* data, int n) {
  const int i = own_index(), other = n - 1 - i;
  const float sum = data[right ? i : other];
  data[i] = sum;
}

// __ldg is for memory that nobody writes in the whole launch, barriers or not.
template <bool right>
__global__ void ldg_after_write(float* data, int) {
  data[own_index()] = 1.0f;
  __syncthreads();
  const float* const other = data + (own_index() ^ 1);
  const float value = right ? *other : __ldg(other);
  __syncthreads();
  if (value < 0) data[own_index()] = value;
}

template <bool right>
__global__ void write_after_ldg(float* data, int) {
  const float* const other = data + (own_index() ^ 1);
  const float value = right ? *other : __ldg(other);
  __syncthreads();
  data[own_index()] = value + 1.0f;
}

template <bool right>
__global__ void ldg_from_shared(float* data, int) {
  float* const part = ptx::dynamic_shared<float>();
  part[threadIdx.x] = 1.0f;
  if (__ldg(right ? data + own_index() : part + threadIdx.x) < 0) part[threadIdx.x] = 0.0f;
}

template <bool right>
__global__ void store_to_shared(float* data, int) {
  float* const part = ptx::dynamic_shared<float>();
  float* const to = right ? data + blockIdx.x * blockDim.x : part;
  if (threadIdx.x % 4 == 0) ptx::store(reinterpret_cast<float4*>(to + threadIdx.x), make_float4(1, 2, 3, 4));
}

template <bool right>
__global__ void store_to_stack(float* data, int) {
  alignas(16) float local[4] = {};
  float* const to = right ? data + blockIdx.x * blockDim.x + threadIdx.x / 4 * 4 : local;
  if (threadIdx.x % 4 == 0) ptx::store(reinterpret_cast<float4*>(to), make_float4(1, 2, 3, 4));
}

template <bool right>
__global__ void copy_from_shared(float* data, int) {
  float* const part = ptx::dynamic_shared<float>();
  const bool copies = threadIdx.x < 32 && threadIdx.x % 4 == 0;
  if (threadIdx.x >= 32) part[threadIdx.x] = 1.0f;
  __syncthreads();
  if (copies) ptx::cp_async_16(part + threadIdx.x, right ? data + own_index() : part + 32 + threadIdx.x, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

template <bool right>
__global__ void divergent_barrier(float* data, int) {
  if (right || threadIdx.x < 40) __syncthreads();
  data[own_index()] = 1.0f;
}

template <bool right>
__global__ void two_barriers(float* data, int) {
  if (right || threadIdx.x < 32) {
    __syncthreads();
    data[own_index()] = 1.0f;
  } else {
    __syncthreads();
    data[own_index()] = 2.0f;
  }
}

template <bool right>
__global__ void barrier_after_return(float* data, int n) {
  if (!right && own_index() >= n - 10) return;
  data[own_index()] = 1.0f;
  __syncthreads();
}

template <bool right>
__global__ void static_shared_unwritten(float* data, int) {
  __shared__ float part[block_threads];
  if (right || threadIdx.x != 9) part[threadIdx.x] = 1.0f;
  __syncthreads();
  data[own_index()] = part[block_threads - 1 - threadIdx.x];
}

template <bool right>
__global__ void dynamic_shared_unwritten(float* data, int) {
  float* const part = ptx::dynamic_shared<float>();
  if (right || threadIdx.x != 9) part[threadIdx.x] = 1.0f;
  __syncthreads();
  data[own_index()] = part[block_threads - 1 - threadIdx.x];
}

// What another block wrote there does not count.
template <bool right>
__global__ void shared_of_another_block(float* data, int) {
  __shared__ float part[block_threads];
  if (right || blockIdx.x == 0) part[threadIdx.x] = 1.0f;
  __syncthreads();
  data[own_index()] = part[block_threads - 1 - threadIdx.x];
}

template <bool right>
__global__ void shuffle_after_return(float* data, int) {
  float value = data[own_index()];
  if (!right && threadIdx.x % 32 == 31) return;
  value += __shfl_down_sync(every_lane, value, 1);
  data[own_index()] = value;
}

template <bool right>
__global__ void shuffle_against_barrier(float* data, int) {
  float value = data[own_index()];
  if (right || threadIdx.x < 20) value += __shfl_xor_sync(every_lane, value, 1);
  __syncthreads();
  data[own_index()] = value;
}

template <bool right>
__global__ void shuffle_without_caller(float* data, int) {
  data[own_index()] = __shfl_sync(right ? every_lane : 0xFFFFu, data[own_index()], 0);
}

template <bool right>
__global__ void different_shuffles(float* data, int) {
  float value = data[own_index()];
  if (right || threadIdx.x % 32 < 16) {
    value = __shfl_xor_sync(every_lane, value, 1);
  } else {
    value = __shfl_down_sync(every_lane, value, 1);
  }
  data[own_index()] = value;
}

// Lanes may come to different __syncwarp, if all give the same mask.
template <bool right>
__global__ void different_syncwarps(float* data, int) {
  __shared__ float part[block_threads];
  part[threadIdx.x] = data[own_index()];
  float value;
  if (threadIdx.x % 32 < 16) {
    __syncwarp();
    value = part[threadIdx.x + 16];
  } else {
    __syncwarp(right ? every_lane : 0xFFFF0000u);
    value = part[threadIdx.x - 16];
  }
  data[own_index()] = value;
}

template <bool right>
__global__ void too_many_syncwarps(float* data, int) {
  if (threadIdx.x != 0) return;
  for (int i = 0; i < (right ? 100 : 131072); ++i) __syncwarp(1u);
  data[own_index()] = 1.0f;
}

template <bool right>
__global__ void active_lanes(float* data, int) {
  if (threadIdx.x % 32 < 5) data[own_index()] = __shfl_sync(right ? 31u : __activemask(), data[own_index()], 0);
}

template <bool right>
__global__ void lane_that_does_not_exist(float* data, int) {
  data[own_index()] = __shfl_sync(right ? 0x0000FFFFu : every_lane, data[own_index()], 0);
}

template <bool right>
__global__ void misaligned_load(float* data, int) {
  const float4 value = *reinterpret_cast<const float4*>(data + (right ? 4 : 1));
  if (value.x + value.w < 0) data[own_index()] = value.y;
}

template <bool right>
__global__ void misaligned_store(float* data, int) {
  if (own_index() == 0) *reinterpret_cast<float2*>(data + (right ? 2 : 1)) = make_float2(1.0f, 2.0f);
}

template <bool right>
__global__ void misaligned_row(float* data, int) {
  // Rows of ldmatrix begin at multiples of 16 bytes.
  constexpr int pitch = right ? 24 : 20;
  __shared__ __align__(16) unsigned short tile[8 * 24];
  for (unsigned i = threadIdx.x; i < 8 * 24; i += blockDim.x) tile[i] = 0;
  __syncthreads();
  std::uint32_t part[2];
  ptx::ldmatrix_x2(part, tile + threadIdx.x % 8 * pitch);
  if (part[0] != 0) data[own_index()] = 1.0f;
}

template <bool right>
__global__ void copy_not_waited_for(float* data, int) {
  float* const part = ptx::dynamic_shared<float>();
  if (threadIdx.x % 4 == 0) ptx::cp_async_16(part + threadIdx.x, data + own_index(), true);
  ptx::cp_async_commit();
  // Two groups; the first is waited for.
  ptx::cp_async_commit();
  right ? ptx::cp_async_wait<1>() : ptx::cp_async_wait<2>();
  __syncthreads();
  data[own_index()] = part[threadIdx.x] + 1.0f;
}

// The thread that copied has waited, but others do not know.
template <bool right>
__global__ void copy_without_barrier(float* data, int) {
  float* const part = ptx::dynamic_shared<float>();
  if (threadIdx.x % 4 == 0) ptx::cp_async_16(part + threadIdx.x, data + own_index(), true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  if (right) __syncthreads();
  if (part[threadIdx.x] < 0) data[own_index()] = 1.0f;
}

template <bool right>
__global__ void copy_from_beyond(float* data, int n) {
  float* const part = ptx::dynamic_shared<float>();
  const int at = 4 * own_index();
  if (at <= n && threadIdx.x < 16) ptx::cp_async_16(part + 4 * threadIdx.x, data + n - 12 + at, right ? at < 12 : true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

template <bool right>
__global__ void endless_wait(float* data, int) {
  __shared__ unsigned flag;
  if (threadIdx.x == 0) flag = right ? 1u : 0u;
  __syncthreads();
  while (atomicAdd(&flag, 0u) == 0u) {
  }
  data[own_index()] = 1.0f;
}

// Lane 0 waits for 1, 1 for 2, 2 for 0.
template <bool right>
__global__ void circle(float* data, int) {
  if (threadIdx.x < 3) {
    const unsigned next = (threadIdx.x + 1) % 3;
    __syncwarp(right ? 7u : 1u << threadIdx.x | 1u << next);
  }
  data[own_index()] = 1.0f;
}

template <bool right>
__global__ void local_array_out_of_bounds(float* data, int) {
  float part[4] = {};
  volatile int last = right ? 3 : 4;
  for (int i = 0; i <= last; ++i) part[i] = data[i];
  if (part[0] + part[3] < 0) data[own_index()] = 1.0f;
}

namespace {

struct Entry {
  const char* name;
  void (*kernel[2])(float*, int);
  int threads = block_threads;
};

#define ENTRY(name)                    \
  {                                    \
    #name, { name<false>, name<true> } \
  }

constexpr Entry entries[] = {
    ENTRY(read_out_of_bounds),
    ENTRY(write_out_of_bounds),
    ENTRY(write_before_buffer),
    ENTRY(copy_out_of_bounds),
    ENTRY(static_shared_out_of_bounds),
    ENTRY(dynamic_shared_out_of_bounds),
    ENTRY(null_pointer),
    ENTRY(other_stack),
    ENTRY(missing_barrier),
    ENTRY(missing_second_barrier),
    ENTRY(missing_syncwarp),
    ENTRY(syncwarp_across_warps),
    ENTRY(syncwarp_of_some),
    ENTRY(adjacent_bytes),
    ENTRY(atomic_and_plain),
    ENTRY(atomics_of_another_warp),
    ENTRY(counter_of_all_blocks),
    ENTRY(two_blocks_write),
    ENTRY(two_blocks_read_and_write),
    ENTRY(ldg_after_write),
    ENTRY(write_after_ldg),
    ENTRY(ldg_from_shared),
    ENTRY(store_to_shared),
    ENTRY(store_to_stack),
    ENTRY(copy_from_shared),
    ENTRY(divergent_barrier),
    ENTRY(two_barriers),
    ENTRY(barrier_after_return),
    ENTRY(static_shared_unwritten),
    ENTRY(dynamic_shared_unwritten),
    ENTRY(shared_of_another_block),
    ENTRY(shuffle_after_return),
    ENTRY(shuffle_against_barrier),
    ENTRY(shuffle_without_caller),
    ENTRY(different_shuffles),
    ENTRY(different_syncwarps),
    ENTRY(too_many_syncwarps),
    ENTRY(active_lanes),
    {"lane_that_does_not_exist", {lane_that_does_not_exist<false>, lane_that_does_not_exist<true>}, 16},
    ENTRY(misaligned_load),
    ENTRY(misaligned_store),
    ENTRY(misaligned_row),
    ENTRY(copy_not_waited_for),
    ENTRY(copy_without_barrier),
    ENTRY(copy_from_beyond),
    ENTRY(endless_wait),
    ENTRY(circle),
    ENTRY(local_array_out_of_bounds),
};

}  // namespace

const char* message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int run(const char* name, bool right, float* data, int n) {
  for (const Entry& entry : entries) {
    if (std::strcmp(entry.name, name) != 0) continue;
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = static_cast<unsigned>(entry.threads);
    config.dynamicSmemBytes = block_threads * sizeof(float);
    return cudaLaunchKernelEx(&config, entry.kernel[right], data, n);
  }
  return cudaErrorInvalidValue;
}

}  // namespace bad
