// Tiles of tensors of a half type in shared memory, and what a warp multiplies of them.
//
// A tile keeps the layout of its tensor, so that nothing is permuted on the way: a row of shared memory is a token or,
// in columns, a channel. The matrices of `mma` are read from either by ldmatrix, in the one transposed where in the
// other not. Beyond the tensor's tokens and channels a tile is zero.
#pragma once

#include "attention_tensors.cuh"

namespace gencore::cuda {

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % warp_threads; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / warp_threads; }

// The same, for addresses that are to be made anew where they are used. Else the compiler makes all of them before a
// loop over tiles, and has no registers left for what the loop adds up.
__device__ __forceinline__ int thread_here() {
  int thread = static_cast<int>(threadIdx.x);
  ptx::keep_behind(thread);
  return thread;
}

// The elements from one row of a tile to the next.
__host__ __device__ constexpr int tile_pitch(bool columns, int tokens, int channels) {
  return (columns ? tokens : channels) + chunk_elements;
}

// The elements of a tile; `columns` says whether it may be in columns, or else in rows only.
constexpr int tile_elements(int tokens, int channels, bool columns) {
  return tokens * channels + chunk_elements * (columns && channels > tokens ? channels : tokens);
}

// Copies rows of `elements` elements, of which the first `valid` of the first `valid_rows` are in the tensor. Aligned
// rows have arrived after ptx::cp_async_wait and a barrier, others after the barrier.
template <class T>
__device__ __forceinline__ void load_rows(T* tile, int rows, int elements, const T* tensor, std::int64_t stride,
                                          int valid_rows, int valid, bool aligned) {
  // As many threads to a row as divide it evenly: then each has the same part of every row that it comes to.
  const int chunks = elements / chunk_elements, lanes = min(chunks & -chunks, warp_threads), each = chunks / lanes;
  const int thread = thread_here(), first = thread % lanes * chunk_elements;
  // Not unrolled: the registers are for the sums that live on meanwhile.
#pragma unroll 1
  for (int row = thread / lanes; row < rows; row += static_cast<int>(blockDim.x) / lanes) {
    T* const to = tile + row * (elements + chunk_elements);
    const T* const from = tensor + row * stride;
    const int count = row < valid_rows ? valid : 0;
    if (aligned) {
#pragma unroll
      for (int j = 0; j < each; ++j) {
        const int i = first + j * lanes * chunk_elements;
        ptx::cp_async_16(to + i, from + i, i < count);
      }
    } else {
#pragma unroll 1
      for (int i = first; i < elements; i += lanes * chunk_elements) {
        std::uint32_t words[chunk_elements / 2];
#pragma unroll
        for (int j = 0; j < chunk_elements; j += 2) {
          const std::uint32_t low = i + j < count ? from[i + j].bits : 0,
                              high = i + j + 1 < count ? from[i + j + 1].bits : 0;
          words[j / 2] = low | high << 16;
        }
        ptx::store_shared(reinterpret_cast<uint4*>(to + i), make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
  }
}

// The tokens from `first` on of a plane; all threads of the block together.
template <class T>
__device__ __forceinline__ void load_tile(T* tile, int tokens, int channels, const Heads<const T>& tensor,
                                          const T* plane, std::int64_t first, std::int64_t all_tokens, int size) {
  const int left = static_cast<int>(all_tokens - first < tokens ? all_tokens - first : tokens);
  if (tensor.columns) {
    load_rows(tile, channels, tokens, plane + first, tensor.row, size, left, tensor.aligned);
  } else {
    load_rows(tile, tokens, channels, plane + first * tensor.row, tensor.row, left, size, tensor.aligned);
  }
}

template <class T>
__device__ __forceinline__ void store_rows(const T* tile, int rows, int elements, T* tensor, std::int64_t stride,
                                           int valid, bool aligned) {
  const int chunks = elements / chunk_elements, lanes = min(chunks & -chunks, warp_threads);
  const int thread = thread_here(), first = thread % lanes * chunk_elements;
#pragma unroll 1
  for (int row = thread / lanes; row < rows; row += static_cast<int>(blockDim.x) / lanes) {
    const T* const from = tile + row * (elements + chunk_elements);
    T* const to = tensor + row * stride;
    for (int i = first; i < valid; i += lanes * chunk_elements) {
      if (aligned) {
        ptx::store(reinterpret_cast<uint4*>(to + i), *reinterpret_cast<const uint4*>(from + i));
      } else {
#pragma unroll
        for (int j = 0; j < chunk_elements; ++j) {
          if (i + j < valid) to[i + j] = from[i + j];
        }
      }
    }
  }
}

// Where a lane's row begins of the four matrices of 16 tokens x 16 channels at the beginning of a tile. The second of
// the four has the other tokens of the same channels, or else the other channels of the same tokens.
template <bool columns, bool tokens_first>
__device__ __forceinline__ int lane_offset(int pitch) {
  const int lane = thread_here() % warp_threads, second = lane / 8 % 2 * 8, last = lane / 16 * 8;
  const int token = tokens_first ? second : last, channel = tokens_first ? last : second;
  return columns ? (channel + lane % 8) * pitch + token : (token + lane % 8) * pitch + channel;
}

// What a warp has of the tokens of its block, as the first factor of products: `blocks` times 16 tokens, of 16 `steps`
// channels. In registers if they are `kept` there; else in shared memory as the registers would be, whatever the layout
// was.
template <int blocks, int steps, bool kept>
struct Fragments {
  std::uint32_t registers[kept ? blocks : 1][kept ? steps : 1][4];
  const uint4* place;

  // From a tile that has arrived, of `tokens` tokens and `channels` channels, beginning with those given; all threads
  // of the block together, for the tile is overwritten.
  template <class T>
  __device__ __forceinline__ void take(T* tile, bool columns, int tokens, int channels, int token, int channel) {
    const int pitch = tile_pitch(columns, tokens, channels);
    std::uint32_t taken[blocks][steps][4];
    if (columns) {
      const T* const row = tile + lane_offset<true, true>(pitch) + channel * pitch + token;
#pragma unroll
      for (int i = 0; i < blocks; ++i) {
#pragma unroll
        for (int k = 0; k < steps; ++k) ptx::ldmatrix_x4_trans(taken[i][k], row + 16 * k * pitch + 16 * i);
      }
    } else {
      const T* const row = tile + lane_offset<false, true>(pitch) + token * pitch + channel;
#pragma unroll
      for (int i = 0; i < blocks; ++i) {
#pragma unroll
        for (int k = 0; k < steps; ++k) ptx::ldmatrix_x4(taken[i][k], row + 16 * i * pitch + 16 * k);
      }
    }
    if constexpr (!kept) {
      __syncthreads();
      uint4* const own = reinterpret_cast<uint4*>(tile) + warp_index() * (blocks * steps * warp_threads) + lane_index();
      place = own;
#pragma unroll
      for (int i = 0; i < blocks; ++i) {
#pragma unroll
        for (int k = 0; k < steps; ++k) {
          const std::uint32_t (&word)[4] = taken[i][k];
          // Each lane reads only what it wrote itself.
          ptx::store_shared(own + (i * steps + k) * warp_threads, make_uint4(word[0], word[1], word[2], word[3]));
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < blocks; ++i) {
#pragma unroll
        for (int k = 0; k < steps; ++k) {
#pragma unroll
          for (int j = 0; j < 4; ++j) registers[i][k][j] = taken[i][k][j];
        }
      }
    }
  }

  __device__ __forceinline__ void get(std::uint32_t (&a)[4], int block, int step) const {
    if constexpr (kept) {
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = registers[block][step][j];
    } else {
      const uint4 word = place[(block * steps + step) * warp_threads];
      a[0] = word.x;
      a[1] = word.y;
      a[2] = word.z;
      a[3] = word.w;
    }
  }
};

// What a warp adds up: 16 tokens x 8 columns in four registers of each lane, as `mma` has them. With g = lane / 4 and
// t = 2 (lane % 4), element 2 i + j belongs to token g + 8 i and column t + j.
template <int blocks, int columns>
using Sums = float[blocks][columns / 8][4];

// sums += own x tile^T over the channels of the warp: a column of the sums for each of the tile's tokens.
template <bool columns, int channels, int tokens, class T, int blocks, int steps, bool kept>
__device__ __forceinline__ void add_dot_products_of(Sums<blocks, tokens>& sums,
                                                    const Fragments<blocks, steps, kept>& own, const T* tile,
                                                    int channel) {
  constexpr int pitch = tile_pitch(columns, tokens, channels);
  const T* const row = tile + lane_offset<columns, false>(pitch) + channel * (columns ? pitch : 1);
#pragma unroll
  for (int k = 0; k < steps; ++k) {
    std::uint32_t a[blocks][4];
#pragma unroll
    for (int i = 0; i < blocks; ++i) own.get(a[i], i, k);
#pragma unroll
    for (int n = 0; n < tokens / 16; ++n) {
      std::uint32_t b[4];
      if constexpr (columns) {
        ptx::ldmatrix_x4_trans(b, row + 16 * k * pitch + 16 * n);
      } else {
        ptx::ldmatrix_x4(b, row + 16 * n * pitch + 16 * k);
      }
      const std::uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < blocks; ++i) {
        ptx::mma_m16n8k16<T>(sums[i][2 * n], a[i], low);
        ptx::mma_m16n8k16<T>(sums[i][2 * n + 1], a[i], high);
      }
    }
  }
}

template <int channels, int tokens, class T, int blocks, int steps, bool kept>
__device__ __forceinline__ void add_dot_products(Sums<blocks, tokens>& sums, const Fragments<blocks, steps, kept>& own,
                                                 const T* tile, bool columns, int channel) {
  // Once per tile and the same for all threads: inside of the loops it would keep their loads from overlapping.
  if (columns) {
    add_dot_products_of<true, channels, tokens>(sums, own, tile, channel);
  } else {
    add_dot_products_of<false, channels, tokens>(sums, own, tile, channel);
  }
}

// Weights, a column for each token of a tile, rounded to T: the first factor of a product.
template <int blocks, int tokens>
using Weights = std::uint32_t[blocks][tokens / 16][4];

template <class T, int blocks, int tokens>
__device__ __forceinline__ void to_weights(Weights<blocks, tokens>& weights,
                                           const float (&values)[blocks][tokens / 8][4]) {
#pragma unroll
  for (int i = 0; i < blocks; ++i) {
#pragma unroll
    for (int k = 0; k < tokens / 16; ++k) {
#pragma unroll
      for (int j = 0; j < 4; ++j) weights[i][k][j] = Halves<T>::pack(values[i][2 * k + j / 2] + j % 2 * 2);
    }
  }
}

// sums += weights x tile: a column of the sums for each of the warp's channels.
template <bool columns, int channels, int tokens, class T, int blocks, int width>
__device__ __forceinline__ void add_weighted_of(float (&sums)[blocks][width][4], const Weights<blocks, tokens>& weights,
                                                const T* tile, int channel) {
  constexpr int pitch = tile_pitch(columns, tokens, channels);
  const T* const row = tile + lane_offset<columns, true>(pitch) + channel * (columns ? pitch : 1);
#pragma unroll
  for (int k = 0; k < tokens / 16; ++k) {
#pragma unroll
    for (int n = 0; n < width / 2; ++n) {
      std::uint32_t b[4];
      if constexpr (columns) {
        ptx::ldmatrix_x4(b, row + 16 * n * pitch + 16 * k);
      } else {
        ptx::ldmatrix_x4_trans(b, row + 16 * k * pitch + 16 * n);
      }
      const std::uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < blocks; ++i) {
        ptx::mma_m16n8k16<T>(sums[i][2 * n], weights[i][k], low);
        ptx::mma_m16n8k16<T>(sums[i][2 * n + 1], weights[i][k], high);
      }
    }
  }
}

template <int channels, int tokens, class T, int blocks, int width>
__device__ __forceinline__ void add_weighted(float (&sums)[blocks][width][4], const Weights<blocks, tokens>& weights,
                                             const T* tile, bool columns, int channel) {
  if (columns) {
    add_weighted_of<true, channels, tokens>(sums, weights, tile, channel);
  } else {
    add_weighted_of<false, channels, tokens>(sums, weights, tile, channel);
  }
}

// Where several warps share their tokens and each has a part of the channels: the sums over all channels, in one order
// and so with the same bits for each of those warps. All threads of the block together; `exchange` may be used again
// behind the next barrier.
template <int splits, int blocks, int width>
__device__ __forceinline__ void add_splits(float (&sums)[blocks][width][4], float4* exchange) {
  if constexpr (splits > 1) {
    constexpr int words = blocks * width * warp_threads;
    const int warp = warp_index(), lane = lane_index();
#pragma unroll
    for (int i = 0; i < blocks; ++i) {
#pragma unroll
      for (int n = 0; n < width; ++n) {
        const float (&sum)[4] = sums[i][n];
        exchange[warp * words + (i * width + n) * warp_threads + lane] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      }
    }
    __syncthreads();
    const float4* const first = exchange + warp / splits * splits * words + lane;
#pragma unroll
    for (int i = 0; i < blocks; ++i) {
#pragma unroll
      for (int n = 0; n < width; ++n) {
        float (&sum)[4] = sums[i][n];
        const float4 word = first[(i * width + n) * warp_threads];
        sum[0] = word.x;
        sum[1] = word.y;
        sum[2] = word.z;
        sum[3] = word.w;
#pragma unroll
        for (int split = 1; split < splits; ++split) {
          const float4 other = first[split * words + (i * width + n) * warp_threads];
          sum[0] += other.x;
          sum[1] += other.y;
          sum[2] += other.z;
          sum[3] += other.w;
        }
      }
    }
  }
}

// Writes what the warps of a block added up for their tokens, through a tile in the layout of the tensor; all threads
// of the block together.
template <class T, int blocks, int width>
__device__ __forceinline__ void store_sums(const float (&sums)[blocks][width][4], T* tile, int tokens, int channels,
                                           int token, int channel, const Heads<T>& tensor, T* plane, std::int64_t first,
                                           std::int64_t all_tokens, int size) {
  const int lane = thread_here() % warp_threads, pitch = tile_pitch(tensor.columns, tokens, channels);
  const int left = static_cast<int>(all_tokens - first < tokens ? all_tokens - first : tokens);
  // Of what lies in the tile nothing is needed any more.
  __syncthreads();
#pragma unroll
  for (int i = 0; i < blocks; ++i) {
#pragma unroll
    for (int n = 0; n < width; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = token + 16 * i + 8 * half + lane / 4, c = channel + 8 * n + lane % 4 * 2;
        const std::uint32_t word = Halves<T>::pack(sums[i][n] + 2 * half);
        if (tensor.columns) {
          tile[c * pitch + t].bits = static_cast<std::uint16_t>(word);
          tile[(c + 1) * pitch + t].bits = static_cast<std::uint16_t>(word >> 16);
        } else {
          *reinterpret_cast<std::uint32_t*>(tile + t * pitch + c) = word;
        }
      }
    }
  }
  __syncthreads();
  if (tensor.columns) {
    store_rows(tile, size, tokens, plane + first, tensor.row, left, tensor.aligned);
  } else {
    store_rows(tile, left, channels, plane + first * tensor.row, tensor.row, size, tensor.aligned);
  }
}

}  // namespace gencore::cuda
