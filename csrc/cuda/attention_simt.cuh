// Attention with the arithmetic of float32 and float64: the kernels for these types, whose products the tensor cores
// would round, and for half types with heads that are too large for them.
//
// A block of 16 x 16 threads has `side` tokens of its own and a part of their channels, and goes through the others in
// tiles of as many. Dot products are over all channels, a panel of them in shared memory at a time; so where a head has
// several parts, each makes them again.
#pragma once

#include "attention_tensors.cuh"

namespace gencore::cuda {

constexpr int simt_threads = 256, simt_edge = 16, panel_channels = 16;

template <class T, int part_>
struct SimtTiles {
  using Element = T;
  using P = Arithmetic<T>;
  using F = typename P::F;
  static constexpr int part = part_, side = sizeof(F) == 8 ? 32 : 64;
  // A thread has as many of the block's own tokens, and either as many of a tile's or so many channels.
  static constexpr int micro = side / simt_edge, width = part / simt_edge;
  // Rows are as much longer that they stay aligned for vectors but do not begin in the same bank.
  static constexpr int pitch = side + 16 / sizeof(F);

  struct Shared {
    union {
      F panels[2][panel_channels][pitch];
      F rows[panel_channels][part];
    };
    // weights[j][i] weighs token j of the tile for token i of the block.
    F weights[side][pitch];
  };
};

struct SimtWork {
  std::int64_t heads, tiles, parts, tasks;
  int size;
};

template <class T>
struct SimtForward {
  using F = typename Arithmetic<T>::F;
  Heads<const T> q, k, v;
  Heads<T> out;
  F* lse;
  std::int64_t queries, keys;
  SimtWork work;
  F scale;
};

template <class T>
struct SimtBackward {
  using F = typename Arithmetic<T>::F;
  Heads<const T> grad_out, q, k, v;
  // Those whose data is null are not wanted.
  Heads<T> grad_q, grad_k, grad_v;
  // The logarithms are natural ones.
  QueryValues<F> of_queries;
  std::int64_t queries, keys;
  SimtWork work;
  F scale;
};

__device__ __forceinline__ int edge_row() { return static_cast<int>(threadIdx.x) / simt_edge; }
__device__ __forceinline__ int edge_column() { return static_cast<int>(threadIdx.x) % simt_edge; }

// `channels` of `tokens` tokens, each from the first on given, to to[channel][token]; beyond the tensor zeros.
// Neighbours among the threads read neighbours in memory.
template <int tokens, int channels, class T, class F, int pitch>
__device__ __forceinline__ void load_panel(F (&to)[channels][pitch], const Heads<const T>& tensor, const T* plane,
                                           std::int64_t token, std::int64_t all_tokens, int channel, int size) {
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < tokens * channels; i += simt_threads) {
    const int t = tensor.columns ? i % tokens : i / channels, c = tensor.columns ? i / tokens : i % channels;
    const bool exists = token + t < all_tokens && channel + c < size;
    to[c][t] = exists
                   ? to_arithmetic(plane[(token + t) * tensor.token_stride() + (channel + c) * tensor.channel_stride()])
                   : F(0);
  }
}

// The same to to[token][channel].
template <int tokens, int channels, class T, class F>
__device__ __forceinline__ void load_token_rows(F (&to)[tokens][channels], const Heads<const T>& tensor, const T* plane,
                                                std::int64_t token, std::int64_t all_tokens, int channel, int size) {
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < tokens * channels; i += simt_threads) {
    const int t = tensor.columns ? i % tokens : i / channels, c = tensor.columns ? i / tokens : i % channels;
    const bool exists = token + t < all_tokens && channel + c < size;
    to[t][c] = exists
                   ? to_arithmetic(plane[(token + t) * tensor.token_stride() + (channel + c) * tensor.channel_stride()])
                   : F(0);
  }
}

// products[i][j] = own token i . token j of the tile, for this thread's of both.
template <class Tiles>
__device__ __forceinline__ void make_dot_products(
    typename Tiles::F (&products)[Tiles::micro][Tiles::micro], typename Tiles::Shared& shared,
    const Heads<const typename Tiles::Element>& own, const typename Tiles::Element* own_plane, std::int64_t own_first,
    std::int64_t own_tokens, const Heads<const typename Tiles::Element>& other, const typename Tiles::Element* plane,
    std::int64_t first, std::int64_t tokens, int size) {
  using F = typename Tiles::F;
  constexpr int micro = Tiles::micro, side = Tiles::side;
#pragma unroll
  for (int i = 0; i < micro; ++i) {
#pragma unroll
    for (int j = 0; j < micro; ++j) products[i][j] = 0;
  }
  const int row = edge_row() * micro, column = edge_column() * micro;
  for (int channel = 0; channel < size; channel += panel_channels) {
    __syncthreads();
    load_panel<side>(shared.panels[0], own, own_plane, own_first, own_tokens, channel, size);
    load_panel<side>(shared.panels[1], other, plane, first, tokens, channel, size);
    __syncthreads();
#pragma unroll
    for (int c = 0; c < panel_channels; ++c) {
      F a[micro], b[micro];
#pragma unroll
      for (int i = 0; i < micro; ++i) a[i] = shared.panels[0][c][row + i];
#pragma unroll
      for (int j = 0; j < micro; ++j) b[j] = shared.panels[1][c][column + j];
#pragma unroll
      for (int i = 0; i < micro; ++i) {
#pragma unroll
        for (int j = 0; j < micro; ++j) products[i][j] = Tiles::P::fma(a[i], b[j], products[i][j]);
      }
    }
  }
}

// Hands a thread's weights on, rounded to the type; they are all there behind the next barrier.
template <class Tiles>
__device__ __forceinline__ void put_weights(typename Tiles::Shared& shared,
                                            const typename Tiles::F (&values)[Tiles::micro][Tiles::micro]) {
#pragma unroll
  for (int j = 0; j < Tiles::micro; ++j) {
#pragma unroll
    for (int i = 0; i < Tiles::micro; ++i) {
      shared.weights[edge_column() * Tiles::micro + j][edge_row() * Tiles::micro + i] =
          rounded_to<typename Tiles::Element>(values[i][j]);
    }
  }
}

// sums[i][n] += the sum over the tile's tokens of weight x channel, for this thread's own tokens and channels, which
// are edge_column() + 16 n of the block's part.
template <class Tiles>
__device__ __forceinline__ void add_weighted_tokens(typename Tiles::F (&sums)[Tiles::micro][Tiles::width],
                                                    typename Tiles::Shared& shared,
                                                    const Heads<const typename Tiles::Element>& other,
                                                    const typename Tiles::Element* plane, std::int64_t first,
                                                    std::int64_t tokens, int channel, int size) {
  using F = typename Tiles::F;
  for (int start = 0; start < Tiles::side && first + start < tokens; start += panel_channels) {
    __syncthreads();
    load_token_rows<panel_channels>(shared.rows, other, plane, first + start, tokens, channel, size);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < panel_channels; ++k) {
      F a[Tiles::micro], b[Tiles::width];
#pragma unroll
      for (int i = 0; i < Tiles::micro; ++i) a[i] = shared.weights[start + k][edge_row() * Tiles::micro + i];
#pragma unroll
      for (int n = 0; n < Tiles::width; ++n) b[n] = shared.rows[k][edge_column() + simt_edge * n];
#pragma unroll
      for (int i = 0; i < Tiles::micro; ++i) {
#pragma unroll
        for (int n = 0; n < Tiles::width; ++n) sums[i][n] = Tiles::P::fma(a[i], b[n], sums[i][n]);
      }
    }
  }
}

template <class Tiles>
__device__ __forceinline__ void store_tokens(const typename Tiles::F (&sums)[Tiles::micro][Tiles::width],
                                             const Heads<typename Tiles::Element>& tensor,
                                             typename Tiles::Element* plane, std::int64_t first, std::int64_t tokens,
                                             int channel, int size) {
#pragma unroll
  for (int i = 0; i < Tiles::micro; ++i) {
    const std::int64_t token = first + edge_row() * Tiles::micro + i;
#pragma unroll
    for (int n = 0; n < Tiles::width; ++n) {
      const int c = channel + edge_column() + simt_edge * n;
      if (token < tokens && c < size) {
        from_arithmetic(sums[i][n], plane[token * tensor.token_stride() + c * tensor.channel_stride()]);
      }
    }
  }
}

// Of the 16 threads that have a token: body(a, b) of what all of them hold.
template <class F, class Body>
__device__ __forceinline__ F reduced_over_row(F value, Body&& body) {
#pragma unroll
  for (int distance = simt_edge / 2; distance > 0; distance /= 2) {
    value = body(value, __shfl_xor_sync(0xFFFFFFFFu, value, distance));
  }
  return value;
}

__device__ __forceinline__ float natural_log(float x) { return ::logf(x); }
__device__ __forceinline__ double natural_log(double x) { return ::log(x); }

template <class Tiles>
__global__ void __launch_bounds__(simt_threads)
    attention_simt_kernel(const __grid_constant__ SimtForward<typename Tiles::Element> args) {
  using F = typename Tiles::F;
  using P = typename Tiles::P;
  using T = typename Tiles::Element;
  constexpr int micro = Tiles::micro, side = Tiles::side;
  __shared__ typename Tiles::Shared shared;
  const int size = args.work.size;
  for (std::int64_t task = blockIdx.x; task < args.work.tasks; task += gridDim.x) {
    const std::int64_t all_tiles = task / args.work.parts, number = all_tiles / args.work.tiles;
    const std::int64_t first = (all_tiles - number * args.work.tiles) * side;
    const int channel = static_cast<int>(task - all_tiles * args.work.parts) * Tiles::part;
    const T* const q = args.q.plane(number, args.work.heads);
    const T* const k = args.k.plane(number, args.work.heads);
    const T* const v = args.v.plane(number, args.work.heads);
    F sums[micro][Tiles::width] = {}, maximum[micro], denominator[micro];
#pragma unroll
    for (int i = 0; i < micro; ++i) {
      maximum[i] = -F(INFINITY);
      denominator[i] = 0;
    }
    for (std::int64_t at = 0; at < args.keys; at += side) {
      F x[micro][micro];
      make_dot_products<Tiles>(x, shared, args.q, q, first, args.queries, args.k, k, at, args.keys, size);
#pragma unroll
      for (int i = 0; i < micro; ++i) {
        F most = maximum[i];
#pragma unroll
        for (int j = 0; j < micro; ++j) {
          const bool exists = at + edge_column() * micro + j < args.keys;
          x[i][j] = exists ? x[i][j] * args.scale : -F(INFINITY);
          most = x[i][j] > most ? x[i][j] : most;
        }
        most = reduced_over_row(most, [](F a, F b) { return a > b ? a : b; });
        // Where all are minus infinity, their differences would be NaN.
        const F offset = most == -F(INFINITY) ? F(0) : most;
        const F change = exponential<P>(P::sub(maximum[i], offset));
        maximum[i] = most;
        denominator[i] *= change;
#pragma unroll
        for (int n = 0; n < Tiles::width; ++n) sums[i][n] *= change;
#pragma unroll
        for (int j = 0; j < micro; ++j) {
          x[i][j] = exponential<P>(P::sub(x[i][j], offset));
          denominator[i] += x[i][j];
        }
      }
      put_weights<Tiles>(shared, x);
      add_weighted_tokens<Tiles>(sums, shared, args.v, v, at, args.keys, channel, size);
    }
#pragma unroll
    for (int i = 0; i < micro; ++i) {
      const F sum = reduced_over_row(denominator[i], [](F a, F b) { return a + b; });
      const std::int64_t query = first + edge_row() * micro + i;
      if (args.lse != nullptr && channel == 0 && edge_column() == 0 && query < args.queries) {
        args.lse[number * args.queries + query] = maximum[i] + natural_log(sum);
      }
      // Without keys, what was added up is 0 and stays so.
#pragma unroll
      for (int n = 0; n < Tiles::width; ++n) sums[i][n] = P::div(sums[i][n], args.keys > 0 ? sum : F(1));
    }
    store_tokens<Tiles>(sums, args.out, args.out.plane(number, args.work.heads), first, args.queries, channel, size);
  }
}

// The gradients of keys and values, with keys as the block's own tokens, or those of queries.
template <class Tiles, bool of_keys>
__global__ void __launch_bounds__(simt_threads, 1)
    attention_simt_backward_kernel(const __grid_constant__ SimtBackward<typename Tiles::Element> args) {
  using F = typename Tiles::F;
  using P = typename Tiles::P;
  using T = typename Tiles::Element;
  constexpr int micro = Tiles::micro, side = Tiles::side;
  __shared__ typename Tiles::Shared shared;
  const int size = args.work.size;
  // What of the tensors is the block's own, and what comes in tiles.
  const Heads<const T>&own = of_keys ? args.k : args.q, &own_other = of_keys ? args.v : args.grad_out;
  const Heads<const T>&other = of_keys ? args.q : args.k, &other_other = of_keys ? args.grad_out : args.v;
  const std::int64_t own_tokens = of_keys ? args.keys : args.queries, tokens = of_keys ? args.queries : args.keys;
  for (std::int64_t task = blockIdx.x; task < args.work.tasks; task += gridDim.x) {
    const std::int64_t all_tiles = task / args.work.parts, number = all_tiles / args.work.tiles;
    const std::int64_t first = (all_tiles - number * args.work.tiles) * side;
    const int channel = static_cast<int>(task - all_tiles * args.work.parts) * Tiles::part;
    const T* const own_plane = own.plane(number, args.work.heads);
    const T* const own_other_plane = own_other.plane(number, args.work.heads);
    const T* const plane = other.plane(number, args.work.heads);
    const T* const other_plane = other_other.plane(number, args.work.heads);
    const F *const log_sums = args.of_queries.log_sums(number), *const deltas = args.of_queries.deltas(number);
    F sums[micro][Tiles::width] = {}, sums_v[of_keys ? micro : 1][of_keys ? Tiles::width : 1] = {};
    for (std::int64_t at = 0; at < tokens; at += side) {
      F x[micro][micro], grad[micro][micro];
      make_dot_products<Tiles>(x, shared, own, own_plane, first, own_tokens, other, plane, at, tokens, size);
      make_dot_products<Tiles>(grad, shared, own_other, own_other_plane, first, own_tokens, other_other, other_plane,
                               at, tokens, size);
#pragma unroll
      for (int i = 0; i < micro; ++i) {
#pragma unroll
        for (int j = 0; j < micro; ++j) {
          const std::int64_t own_token = first + edge_row() * micro + i, token = at + edge_column() * micro + j;
          const bool exists = own_token < own_tokens && token < tokens;
          const std::int64_t query = of_keys ? token : own_token;
          x[i][j] = exists ? exponential<P>(P::sub(x[i][j] * args.scale, log_sums[query])) : F(0);
          grad[i][j] = exists ? x[i][j] * (grad[i][j] - deltas[query]) : F(0);
        }
      }
      if constexpr (of_keys) {
        put_weights<Tiles>(shared, x);
        add_weighted_tokens<Tiles>(sums_v, shared, other_other, other_plane, at, tokens, channel, size);
        __syncthreads();
      }
      put_weights<Tiles>(shared, grad);
      add_weighted_tokens<Tiles>(sums, shared, other, plane, at, tokens, channel, size);
    }
#pragma unroll
    for (int i = 0; i < micro; ++i) {
#pragma unroll
      for (int n = 0; n < Tiles::width; ++n) sums[i][n] *= args.scale;
    }
    const Heads<T>& grads = of_keys ? args.grad_k : args.grad_q;
    if (grads.data != nullptr) {
      store_tokens<Tiles>(sums, grads, grads.plane(number, args.work.heads), first, own_tokens, channel, size);
    }
    if constexpr (of_keys) {
      if (args.grad_v.data != nullptr) {
        store_tokens<Tiles>(sums_v, args.grad_v, args.grad_v.plane(number, args.work.heads), first, own_tokens, channel,
                            size);
      }
    }
  }
}

}  // namespace gencore::cuda
