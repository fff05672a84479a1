// The gradients of attention of half types with the tensor cores. Two kernels of one form: a warp has its own queries
// or its own keys, adds up their gradients, and the others pass by it in tiles. So no two blocks add to the same
// element, and every sum has its order.
#pragma once

#include "attention_mma_forward.cuh"

namespace gencore::cuda {

template <class T>
struct MmaBackward {
  Heads<const T> grad_out, q, k, v;
  // Those whose data is null are not wanted.
  Heads<T> grad_q, grad_k, grad_v;
  QueryValues<float> of_queries;
  std::int64_t queries, keys;
  MmaWork work;
  // scale, and scale log2(e). The logarithms of `of_queries` are to base 2.
  float scale, exponent_scale;
};

// Blocks that are to share a multiprocessor; 0 leaves it to the compiler, which counts on three, and for this size
// spills registers to get there.
template <class Tiles>
constexpr int least_blocks = Tiles::channels == 64 ? 2 : 0;

// ds = p (dp - delta), of one element; p in the place of the dot product, ds in that of dp.
__device__ __forceinline__ void to_gradient(float& x, float& grad, float scale, float log_sum, float delta) {
  x = ptx::exp2_approx(__fmaf_rn(x, scale, -log_sum));
  grad = x * (grad - delta);
}

template <class T, class Tiles>
__global__ void __launch_bounds__(Tiles::most_threads, least_blocks<Tiles>)
    attention_mma_queries_kernel(const __grid_constant__ MmaBackward<T> args) {
  constexpr int blocks = Tiles::blocks, splits = Tiles::splits, channels = Tiles::channels, keys = Tiles::streamed;
  const int group = warp_index() / splits, split = warp_index() % splits, lane = lane_index();
  const int groups = static_cast<int>(blockDim.x) / (splits * warp_threads), queries = groups * blocks * 16;
  const int token = group * blocks * 16, channel = split * Tiles::part, size = args.work.size,
            tile = args.work.streamed;
  const int count = static_cast<int>((args.keys + keys - 1) / keys);
  const int last = static_cast<int>(args.keys - static_cast<std::int64_t>(count - 1) * keys);
  const bool two = args.work.stages == 2;
  T* const own_q = ptx::dynamic_shared<T>();
  T* const own_grad_out = own_q + args.work.own;
  T* const streamed = own_grad_out + args.work.own;
  float4* const exchange = reinterpret_cast<float4*>(streamed + args.work.stages * 2 * tile);

  for (MmaTask task(args.work); task.exists(args.work); task.go_on(args.work)) {
    const T* const k = args.k.plane(task.plane, args.work.heads);
    const T* const v = args.v.plane(task.plane, args.work.heads);
    const auto load_keys = [&](int which, T* to) {
      const std::int64_t at = static_cast<std::int64_t>(which) * keys;
      load_tile(to, keys, channels, args.k, k, at, args.keys, size);
      load_tile(to + tile, keys, channels, args.v, v, at, args.keys, size);
    };
    load_tile(own_q, queries, channels, args.q, args.q.plane(task.plane, args.work.heads), task.first(queries),
              args.queries, size);
    load_tile(own_grad_out, queries, channels, args.grad_out, args.grad_out.plane(task.plane, args.work.heads),
              task.first(queries), args.queries, size);
    if (count > 0) load_keys(0, streamed);
    ptx::cp_async_commit();
    float log_sum[blocks][2], delta[blocks][2];
#pragma unroll
    for (int i = 0; i < blocks; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        // Of queries that do not exist nothing is stored.
        const std::int64_t query = task.first(queries) + token + 16 * i + 8 * row + lane / 4;
        const bool exists = query < args.queries;
        log_sum[i][row] = exists ? args.of_queries.log_sums(task.plane)[query] : 0.0f;
        delta[i][row] = exists ? args.of_queries.deltas(task.plane)[query] : 0.0f;
      }
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    typename Tiles::Own q, grad_out;
    q.take(own_q, args.q.columns, queries, channels, token, channel);
    grad_out.take(own_grad_out, args.grad_out.columns, queries, channels, token, channel);

    float sums[blocks][Tiles::width][4] = {};
    bool second = false;
    for (int step = 0; step < count; ++step) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      const T* const current = streamed + (second ? 2 * tile : 0);
      const bool more = step + 1 < count;
      if (two) {
        second = !second;
        if (more) load_keys(step + 1, streamed + (second ? 2 * tile : 0));
        ptx::cp_async_commit();
      }
      float x[blocks][keys / 8][4] = {}, grad[blocks][keys / 8][4] = {};
      add_dot_products<channels, keys>(x, q, current, args.k.columns, channel);
      add_dot_products<channels, keys>(grad, grad_out, current + tile, args.v.columns, channel);
      add_splits<splits>(x, exchange);
      add_splits<splits>(grad, exchange + Tiles::exchanged(groups));
      // Keys that do not exist are zeros, but exp(0 - log_sum) may be anything.
      const int left = (more ? keys : last) - lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < blocks; ++i) {
#pragma unroll
        for (int n = 0; n < keys / 8; ++n) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            to_gradient(x[i][n][j], grad[i][n][j], args.exponent_scale, log_sum[i][j / 2], delta[i][j / 2]);
            if (8 * n + j % 2 >= left) grad[i][n][j] = 0;
          }
        }
      }
      Weights<blocks, keys> weights;
      to_weights<T, blocks, keys>(weights, grad);
      add_weighted<channels, keys>(sums, weights, current, args.k.columns, channel);
      if (!two && more) {
        __syncthreads();
        load_keys(step + 1, streamed);
        ptx::cp_async_commit();
      }
    }

#pragma unroll
    for (int i = 0; i < blocks * Tiles::width * 4; ++i) {
      sums[i / (Tiles::width * 4)][i / 4 % Tiles::width][i % 4] *= args.scale;
    }
    store_sums(sums, own_q, queries, channels, token, channel, args.grad_q,
               args.grad_q.plane(task.plane, args.work.heads), task.first(queries), args.queries, size);
    __syncthreads();
  }
}

template <class T, class Tiles>
__global__ void __launch_bounds__(Tiles::most_threads)
    attention_mma_keys_kernel(const __grid_constant__ MmaBackward<T> args) {
  constexpr int blocks = Tiles::blocks, splits = Tiles::splits, channels = Tiles::channels, queries = Tiles::streamed;
  const int group = warp_index() / splits, split = warp_index() % splits;
  const int groups = static_cast<int>(blockDim.x) / (splits * warp_threads), keys = groups * blocks * 16;
  const int token = group * blocks * 16, channel = split * Tiles::part, size = args.work.size,
            tile = args.work.streamed;
  const int count = static_cast<int>((args.queries + queries - 1) / queries);
  const bool two = args.work.stages == 2;
  T* const own_k = ptx::dynamic_shared<T>();
  T* const own_v = own_k + args.work.own;
  T* const streamed = own_v + args.work.own;
  float4* const exchange = reinterpret_cast<float4*>(streamed + args.work.stages * 2 * tile);
  // The logarithms of a tile's queries, then their deltas.
  float* const values = reinterpret_cast<float*>(exchange + 2 * Tiles::exchanged(groups));

  for (MmaTask task(args.work); task.exists(args.work); task.go_on(args.work)) {
    const T* const q = args.q.plane(task.plane, args.work.heads);
    const T* const grad_out = args.grad_out.plane(task.plane, args.work.heads);
    const auto load_queries = [&](int which, int stage) {
      const std::int64_t at = static_cast<std::int64_t>(which) * queries;
      T* const to = streamed + stage * 2 * tile;
      load_tile(to, queries, channels, args.q, q, at, args.queries, size);
      load_tile(to + tile, queries, channels, args.grad_out, grad_out, at, args.queries, size);
      for (int j = thread_here(); j < queries / 2; j += static_cast<int>(blockDim.x)) {
        const std::int64_t query = at + j % (queries / 4) * 4;
        ptx::cp_async_16(
            values + (stage * queries / 2 + j) * 4,
            (j < queries / 4 ? args.of_queries.log_sums(task.plane) : args.of_queries.deltas(task.plane)) + query,
            query < args.of_queries.padded);
      }
    };
    load_tile(own_k, keys, channels, args.k, args.k.plane(task.plane, args.work.heads), task.first(keys), args.keys,
              size);
    load_tile(own_v, keys, channels, args.v, args.v.plane(task.plane, args.work.heads), task.first(keys), args.keys,
              size);
    if (count > 0) load_queries(0, 0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    typename Tiles::Own k, v;
    k.take(own_k, args.k.columns, keys, channels, token, channel);
    v.take(own_v, args.v.columns, keys, channels, token, channel);

    float sums_k[blocks][Tiles::width][4] = {}, sums_v[blocks][Tiles::width][4] = {};
    int stage = 0;
    for (int step = 0; step < count; ++step) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      const T* const current = streamed + stage * 2 * tile;
      const float* const current_values = values + stage * 2 * queries + lane_index() % 4 * 2;
      const bool more = step + 1 < count;
      if (two) {
        stage = 1 - stage;
        if (more) load_queries(step + 1, stage);
        ptx::cp_async_commit();
      }
      float x[blocks][queries / 8][4] = {}, grad[blocks][queries / 8][4] = {};
      add_dot_products<channels, queries>(x, k, current, args.q.columns, channel);
      add_dot_products<channels, queries>(grad, v, current + tile, args.grad_out.columns, channel);
      add_splits<splits>(x, exchange);
      add_splits<splits>(grad, exchange + Tiles::exchanged(groups));
#pragma unroll
      for (int n = 0; n < queries / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float log_sum = current_values[8 * n + j], delta = current_values[queries + 8 * n + j];
#pragma unroll
          for (int i = 0; i < blocks; ++i) {
            to_gradient(x[i][n][j], grad[i][n][j], args.exponent_scale, log_sum, delta);
            to_gradient(x[i][n][2 + j], grad[i][n][2 + j], args.exponent_scale, log_sum, delta);
          }
        }
      }
      if (!more) {
        // Queries that do not exist are zeros, but an infinite key makes NaN of them, which times zero is NaN too.
        const int left =
            static_cast<int>(args.queries - static_cast<std::int64_t>(step) * queries) - lane_index() % 4 * 2;
#pragma unroll
        for (int n = 0; n < queries / 8; ++n) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int i = 0; i < blocks; ++i) {
              if (8 * n + j % 2 >= left) x[i][n][j] = grad[i][n][j] = 0;
            }
          }
        }
      }
      Weights<blocks, queries> weights;
      to_weights<T, blocks, queries>(weights, x);
      add_weighted<channels, queries>(sums_v, weights, current + tile, args.grad_out.columns, channel);
      to_weights<T, blocks, queries>(weights, grad);
      add_weighted<channels, queries>(sums_k, weights, current, args.q.columns, channel);
      if (!two && more) {
        __syncthreads();
        load_queries(step + 1, 0);
        ptx::cp_async_commit();
      }
    }

    if (args.grad_k.data != nullptr) {
#pragma unroll
      for (int i = 0; i < blocks * Tiles::width * 4; ++i) {
        sums_k[i / (Tiles::width * 4)][i / 4 % Tiles::width][i % 4] *= args.scale;
      }
      store_sums(sums_k, own_k, keys, channels, token, channel, args.grad_k,
                 args.grad_k.plane(task.plane, args.work.heads), task.first(keys), args.keys, size);
    }
    if (args.grad_v.data != nullptr) {
      store_sums(sums_v, own_v, keys, channels, token, channel, args.grad_v,
                 args.grad_v.plane(task.plane, args.work.heads), task.first(keys), args.keys, size);
    }
    __syncthreads();
  }
}

}  // namespace gencore::cuda
