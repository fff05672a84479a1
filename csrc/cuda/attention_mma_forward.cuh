// Attention of half types with the tensor cores, forward: FlashAttention-2's division of the work. A warp has its own
// queries, and all keys pass by it in tiles, which its block shares.
#pragma once

#include "attention_tiles.cuh"

namespace gencore::cuda {

// A block of 32 x `splits` x groups threads: `groups` times 16 x `blocks` queries, each with `splits` warps, that take
// a part of the channels each. `streamed` keys are in shared memory at a time, or twice as many, if they fit. `kept`
// says that a warp has its queries in registers.
template <int channels_, int blocks_, int splits_, int streamed_, bool kept_>
struct MmaTiles {
  static constexpr int channels = channels_, blocks = blocks_, splits = splits_, streamed = streamed_;
  static constexpr bool kept = kept_;
  static constexpr int most_groups = splits > 2 ? 2 : 4, most_threads = most_groups * splits * warp_threads;
  // Of a warp: how many channels, in how many steps of `mma`, in how many of its columns.
  static constexpr int part = channels / splits, steps = part / 16, width = part / 8;
  using Own = Fragments<blocks, steps, kept>;

  static __host__ __device__ constexpr int own_tokens(int groups) { return groups * blocks * 16; }
  // The float4 of add_splits.
  static __host__ __device__ constexpr int exchanged(int groups) {
    return splits > 1 ? groups * splits * blocks * (streamed / 8) * warp_threads : 0;
  }
};

// What a kernel needs to know of its launch. A plane's own tokens are cut into `tiles`.
struct MmaWork {
  std::int64_t heads, planes;
  int tiles, size;
  // The elements of a tile of the block's own tokens, and of others.
  int own, streamed;
  // Tiles of others that are in shared memory: 2, of which one arrives while the other is worked on, or 1.
  int stages;
};

// What a block works on at a time. No more is kept of it than must be: the registers are needed.
struct MmaTask {
  std::int64_t plane;
  int tile;

  explicit __device__ __forceinline__ MmaTask(const MmaWork& work) { go_to(work, blockIdx.x); }
  __device__ __forceinline__ bool exists(const MmaWork& work) const { return plane < work.planes; }
  __device__ __forceinline__ void go_on(const MmaWork& work) { go_to(work, plane * work.tiles + tile + gridDim.x); }
  __device__ __forceinline__ std::int64_t first(int tokens) const { return static_cast<std::int64_t>(tile) * tokens; }

 private:
  __device__ __forceinline__ void go_to(const MmaWork& work, std::int64_t number) {
    plane = number / work.tiles;
    tile = static_cast<int>(number - plane * work.tiles);
  }
};

template <class T>
struct MmaForward {
  Heads<const T> q, k, v;
  Heads<T> out;
  float* lse;
  std::int64_t queries, keys;
  MmaWork work;
  // |scale| log2(e), but not 0, because that times minus infinity is NaN; and whether scale is less than 0.
  float scale;
  bool negative;
};

// The softmax of rows that come in tiles. A lane has two rows of each block of 16 tokens, and of them the columns that
// `mma` gives it.
template <int blocks>
struct OnlineSoftmax {
  float maximum[blocks][2], sum[blocks][2];

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < blocks; ++i) {
      maximum[i][0] = maximum[i][1] = -INFINITY;
      sum[i][0] = sum[i][1] = 0;
    }
  }

  // Turns dot products into probabilities that lack the denominator, and `sums` to what they are to the new maximum.
  template <int columns, int width>
  __device__ __forceinline__ void take(float (&x)[blocks][columns][4], float (&sums)[blocks][width][4], float scale) {
#pragma unroll
    for (int i = 0; i < blocks; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float before = maximum[i][row];
        float most = before;
#pragma unroll
        for (int n = 0; n < columns; ++n) most = fmaxf(most, fmaxf(x[i][n][2 * row], x[i][n][2 * row + 1]));
        most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 2));
        maximum[i][row] = most;
        // The difference first: so the largest has exactly the probability 1, and large ones lose no digits to `scale`.
        const float offset = offset_of(most), change = ptx::exp2_approx(__fmul_rn(before - offset, scale));
        float total = __fmul_rn(sum[i][row], change);
#pragma unroll
        for (int n = 0; n < columns; ++n) {
#pragma unroll
          for (int j = 2 * row; j < 2 * row + 2; ++j) {
            x[i][n][j] = ptx::exp2_approx(__fmul_rn(x[i][n][j] - offset, scale));
            total += x[i][n][j];
          }
        }
        sum[i][row] = total;
#pragma unroll
        for (int n = 0; n < width; ++n) {
          sums[i][n][2 * row] *= change;
          sums[i][n][2 * row + 1] *= change;
        }
      }
    }
  }

  // Adds up what the four lanes of a row have of it.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < blocks; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        sum[i][row] += __shfl_xor_sync(0xFFFFFFFFu, sum[i][row], 1);
        sum[i][row] += __shfl_xor_sync(0xFFFFFFFFu, sum[i][row], 2);
      }
    }
  }

  // Where all are minus infinity, their differences would be NaN.
  static __device__ __forceinline__ float offset_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

  __device__ __forceinline__ float log_sum(int block, int row, float scale) const {
    const float exponent = __fmaf_rn(offset_of(maximum[block][row]), scale, ::log2f(sum[block][row]));
    return __fmul_rn(exponent, static_cast<float>(log_of_2));
  }
};

template <class T, class Tiles>
__global__ void __launch_bounds__(Tiles::most_threads)
    attention_mma_kernel(const __grid_constant__ MmaForward<T> args) {
  constexpr int blocks = Tiles::blocks, splits = Tiles::splits, channels = Tiles::channels, keys = Tiles::streamed;
  const int group = warp_index() / splits, split = warp_index() % splits;
  const int groups = static_cast<int>(blockDim.x) / (splits * warp_threads), queries = groups * blocks * 16;
  const int token = group * blocks * 16, channel = split * Tiles::part, size = args.work.size,
            tile = args.work.streamed;
  // The tiles of keys, and the keys of the last.
  const int count = static_cast<int>((args.keys + keys - 1) / keys);
  const int last = static_cast<int>(args.keys - static_cast<std::int64_t>(count - 1) * keys);
  const bool two = args.work.stages == 2;
  T* const own = ptx::dynamic_shared<T>();
  T* const streamed = own + args.work.own;
  float4* const exchange = reinterpret_cast<float4*>(streamed + args.work.stages * 2 * tile);

  for (MmaTask task(args.work); task.exists(args.work); task.go_on(args.work)) {
    const T* const q = args.q.plane(task.plane, args.work.heads);
    const T* const k = args.k.plane(task.plane, args.work.heads);
    const T* const v = args.v.plane(task.plane, args.work.heads);
    const auto load_keys = [&](int which, int stage) {
      load_tile(streamed + stage * 2 * tile, keys, channels, args.k, k, static_cast<std::int64_t>(which) * keys,
                args.keys, size);
    };
    const auto load_values = [&](int which, int stage) {
      load_tile(streamed + (stage * 2 + 1) * tile, keys, channels, args.v, v, static_cast<std::int64_t>(which) * keys,
                args.keys, size);
    };
    load_tile(own, queries, channels, args.q, q, task.first(queries), args.queries, size);
    if (count > 0) {
      load_keys(0, 0);
      load_values(0, 0);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    typename Tiles::Own queries_of_warp;
    queries_of_warp.take(own, args.q.columns, queries, channels, token, channel);

    float sums[blocks][Tiles::width][4] = {};
    OnlineSoftmax<blocks> softmax;
    int stage = 0;
    for (int step = 0; step < count; ++step) {
      const bool more = step + 1 < count;
      const T* const current = streamed + stage * 2 * tile;
      if (two) {
        // This tile has arrived, and no thread is at the one before any more.
        ptx::cp_async_wait<0>();
        __syncthreads();
        stage = 1 - stage;
        if (more) {
          load_keys(step + 1, stage);
          load_values(step + 1, stage);
        }
        ptx::cp_async_commit();
      } else {
        // The keys have arrived; the values may still be under way.
        ptx::cp_async_wait<1>();
        __syncthreads();
      }
      float x[blocks][keys / 8][4] = {};
      add_dot_products<channels, keys>(x, queries_of_warp, current, args.k.columns, channel);
      add_splits<splits>(x, exchange);
      if (!two) {
        __syncthreads();
        if (more) load_keys(step + 1, 0);
        ptx::cp_async_commit();
      }
      if (args.negative) {
#pragma unroll
        for (int i = 0; i < blocks * keys / 2; ++i) x[i / (keys / 2)][i / 4 % (keys / 8)][i % 4] *= -1.0f;
      }
      if (!more) {
        const int left = last - lane_index() % 4 * 2;
#pragma unroll
        for (int i = 0; i < blocks; ++i) {
#pragma unroll
          for (int n = 0; n < keys / 8; ++n) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              if (8 * n + j % 2 >= left) x[i][n][j] = -INFINITY;
            }
          }
        }
      }
      softmax.take(x, sums, args.scale);
      Weights<blocks, keys> weights;
      to_weights<T, blocks, keys>(weights, x);
      if (!two) {
        ptx::cp_async_wait<1>();
        __syncthreads();
      }
      add_weighted<channels, keys>(sums, weights, current + tile, args.v.columns, channel);
      if (!two) {
        __syncthreads();
        if (more) load_values(step + 1, 0);
        ptx::cp_async_commit();
      }
    }

    softmax.finish();
    const int lane = lane_index();
#pragma unroll
    for (int i = 0; i < blocks; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const std::int64_t query = task.first(queries) + token + 16 * i + 8 * row + lane / 4;
        if (args.lse != nullptr && split == 0 && lane % 4 == 0 && query < args.queries) {
          args.lse[task.plane * args.queries + query] = softmax.log_sum(i, row, args.scale);
        }
        // Without keys, what was added up is 0 and stays so.
        const float factor = args.keys > 0 ? __fdiv_rn(1.0f, softmax.sum[i][row]) : 1.0f;
#pragma unroll
        for (int n = 0; n < Tiles::width; ++n) {
          sums[i][n][2 * row] *= factor;
          sums[i][n][2 * row + 1] *= factor;
        }
      }
    }
    store_sums(sums, own, queries, channels, token, channel, args.out, args.out.plane(task.plane, args.work.heads),
               task.first(queries), args.queries, size);
    __syncthreads();
  }
}

}  // namespace gencore::cuda
