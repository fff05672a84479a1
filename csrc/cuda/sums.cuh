// Sums over the elements of a row, in an order that the row alone decides: over the items of a piece by the threads of
// a team, then over the pieces of a row.
#pragma once

#include "items.cuh"

namespace gencore::cuda {

// The sum of what the threads of each team hold; for all threads of a warp together.
template <class P>
__device__ __forceinline__ typename P::F sum_of_team(const Work& work, typename P::F sum) {
  for (int distance = 1 << work.team_log2 >> 1; distance > 0; distance /= 2) {
    sum = P::add(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, distance));
  }
  return sum;
}

// Whether this thread is the one of its team that writes.
__device__ __forceinline__ bool is_first_of_team(const Work& work) {
  return (threadIdx.x & ((1u << work.team_log2) - 1)) == 0;
}

// sums[row] = the sum of the row's pieces / divisor; a block takes a row at a time.
template <class A>
__global__ void __launch_bounds__(block_threads)
    sum_pieces_kernel(const A* pieces, A* sums, std::int64_t rows, std::int64_t pieces_per_row, double divisor) {
  constexpr int warps = block_threads / warp_threads;
  __shared__ double of_warp[warps];
  const int warp = static_cast<int>(threadIdx.x) / warp_threads, lane = static_cast<int>(threadIdx.x) % warp_threads;
  for (std::int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    double sum = 0;
    for (std::int64_t i = threadIdx.x; i < pieces_per_row; i += block_threads) {
      sum += static_cast<double>(pieces[row * pieces_per_row + i]);
    }
    for (int distance = warp_threads / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
    }
    if (lane == 0) of_warp[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 1; i < warps; ++i) sum += of_warp[i];
      sums[row] = static_cast<A>(sum / divisor);
    }
    __syncthreads();
  }
}

template <class A>
cudaError_t sum_pieces(const Work& work, const void* pieces, A* sums, double divisor, cudaStream_t stream) {
  return launch(sum_pieces_kernel<A>, blocks_for(work.rows * block_threads), block_threads, 0, stream,
                static_cast<const A*>(pieces), sums, work.rows, work.pieces_per_row, divisor);
}

}  // namespace gencore::cuda
