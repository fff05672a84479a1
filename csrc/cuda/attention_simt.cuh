// Attention with the arithmetic of float32 and float64: the kernels for these types, whose products the tensor cores
// would round, and for half types with heads that are too large for them.
//
// A block of 16 x 16 threads has `side` tokens of its own and a part of their channels, and goes through the others in
// tiles of as many. Dot products are over all channels, a panel of them in shared memory at a time; so where a head has
// several parts, each makes them again.
#pragma once

#include <algorithm>

#include "attention_seen.cuh"
#include "attention_tensors.cuh"

namespace gencore::cuda {

constexpr int simt_threads = 256, simt_edge = 16, panel_channels = 16;

// `panels_`: how many there are at once.
template <class T, int part_, int panels_ = 2>
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
      F panels[panels_][panel_channels][pitch];
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

template <class T, class Sees = EveryKey>
struct SimtForward {
  using F = typename Arithmetic<T>::F;
  Heads<const T> q, k, v;
  Heads<T> out;
  F* lse;
  std::int64_t queries, keys;
  SimtWork work;
  F scale;
  Sees sees;
};

template <class T, class Sees = EveryKey>
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
  Sees sees;
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

// Hands a thread's weights on, as they are after rounding to the type if `rounds`; they are all there behind the next
// barrier.
template <class Tiles, bool rounds = true>
__device__ __forceinline__ void put_weights(typename Tiles::Shared& shared,
                                            const typename Tiles::F (&values)[Tiles::micro][Tiles::micro]) {
  using T = typename Tiles::Element;
#pragma unroll
  for (int j = 0; j < Tiles::micro; ++j) {
#pragma unroll
    for (int i = 0; i < Tiles::micro; ++i) {
      shared.weights[edge_column() * Tiles::micro + j][edge_row() * Tiles::micro + i] =
          rounds ? rounded_to<T>(values[i][j]) : values[i][j];
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

template <class Tiles, class Sees>
__global__ void __launch_bounds__(simt_threads)
    attention_simt_kernel(const __grid_constant__ SimtForward<typename Tiles::Element, Sees> args) {
  using F = typename Tiles::F;
  using P = typename Tiles::P;
  using T = typename Tiles::Element;
  constexpr int micro = Tiles::micro, side = Tiles::side;
  __shared__ typename Tiles::Shared shared;
  const int size = args.work.size, value_size = args.sees.value_size(size);
  for (std::int64_t task = blockIdx.x; task < args.work.tasks; task += gridDim.x) {
    const std::int64_t all_tiles = task / args.work.parts, number = all_tiles / args.work.tiles;
    const std::int64_t first = (all_tiles - number * args.work.tiles) * side;
    const int channel = static_cast<int>(task - all_tiles * args.work.parts) * Tiles::part;
    const std::int64_t group = args.sees.group(), of_keys = number / group, key_heads = args.work.heads / group;
    const T* const q = args.q.plane(number, args.work.heads);
    const T* const k = args.k.plane(of_keys, key_heads);
    const T* const v = args.v.plane(of_keys, key_heads);
    Sight<Tiles, false, Sees> sight(args.sees, first, edge_row() * micro, edge_column() * micro, args.queries,
                                    args.keys, number);
    sight.begin_head(number);
    F sums[micro][Tiles::width] = {}, maximum[micro], denominator[micro];
#pragma unroll
    for (int i = 0; i < micro; ++i) {
      maximum[i] = -F(INFINITY);
      denominator[i] = 0;
    }
    for (std::int64_t at = sight.begin(); at < sight.end(); at += side) {
      if (sight.skips(at)) continue;
      F x[micro][micro];
      make_dot_products<Tiles>(x, shared, args.q, q, first, args.queries, args.k, k, at, sight.keys(), size);
#pragma unroll
      for (int i = 0; i < micro; ++i) {
        sight.make_logits(x[i], i, args.scale);
        F most = maximum[i];
#pragma unroll
        for (int j = 0; j < micro; ++j) {
          x[i][j] = sight.template sees<true>(i, j) ? x[i][j] : -F(INFINITY);
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
          x[i][j] = sight.left(x[i][j], i, j);
        }
      }
      put_weights<Tiles>(shared, x);
      add_weighted_tokens<Tiles>(sums, shared, args.v, v, at, sight.keys(), channel, value_size);
    }
#pragma unroll
    for (int i = 0; i < micro; ++i) {
      const F sum = reduced_over_row(denominator[i], [](F a, F b) { return a + b; });
      const std::int64_t query = first + edge_row() * micro + i;
      if (args.lse != nullptr && channel == 0 && edge_column() == 0 && query < args.queries) {
        args.lse[number * args.queries + query] = maximum[i] + natural_log(sum);
      }
      // Where no key is seen, what was added up is 0 and stays so.
      const bool sees_some = Sees::is_plain ? args.keys > 0 : sum != F(0);
#pragma unroll
      for (int n = 0; n < Tiles::width; ++n) sums[i][n] = P::div(sums[i][n], sees_some ? sum : F(1));
    }
    store_tokens<Tiles>(sums, args.out, args.out.plane(number, args.work.heads), first, args.queries, channel,
                        value_size);
  }
}

// The gradients of keys and values, with keys as the block's own tokens, or those of queries.
template <class Tiles, bool of_keys, class Sees>
__global__ void __launch_bounds__(simt_threads, 1)
    attention_simt_backward_kernel(const __grid_constant__ SimtBackward<typename Tiles::Element, Sees> args) {
  using F = typename Tiles::F;
  using P = typename Tiles::P;
  using T = typename Tiles::Element;
  constexpr int micro = Tiles::micro, side = Tiles::side;
  __shared__ typename Tiles::Shared shared;
  const int size = args.work.size, value_size = args.sees.value_size(size);
  // What of the tensors is the block's own, and what comes in tiles.
  const Heads<const T>&own = of_keys ? args.k : args.q, &own_other = of_keys ? args.v : args.grad_out;
  const Heads<const T>&other = of_keys ? args.q : args.k, &other_other = of_keys ? args.grad_out : args.v;
  const std::int64_t group = args.sees.group(), key_heads = args.work.heads / group;
  const std::int64_t own_heads = of_keys ? key_heads : args.work.heads, heads = of_keys ? args.work.heads : key_heads;
  for (std::int64_t task = blockIdx.x; task < args.work.tasks; task += gridDim.x) {
    const std::int64_t all_tiles = task / args.work.parts, number = all_tiles / args.work.tiles;
    const std::int64_t first = (all_tiles - number * args.work.tiles) * side;
    const int channel = static_cast<int>(task - all_tiles * args.work.parts) * Tiles::part;
    const T* const own_plane = own.plane(number, own_heads);
    const T* const own_other_plane = own_other.plane(number, own_heads);
    Sight<Tiles, of_keys, Sees> sight(args.sees, first, edge_row() * micro, edge_column() * micro, args.queries,
                                      args.keys, of_keys ? number * group : number);
    const std::int64_t own_tokens = of_keys ? sight.keys() : args.queries;
    const std::int64_t tokens = of_keys ? args.queries : sight.keys();
    F sums[micro][Tiles::width] = {}, sums_v[of_keys ? micro : 1][of_keys ? Tiles::width : 1] = {};
    // Keys have the gradients of all heads of queries that share them.
    for (std::int64_t member = 0; member < (of_keys ? group : 1); ++member) {
      const std::int64_t of_queries = of_keys ? number * group + member : number;
      const std::int64_t of_tiles = of_keys ? of_queries : number / group;
      const T* const plane = other.plane(of_tiles, heads);
      const T* const other_plane = other_other.plane(of_tiles, heads);
      const F *const log_sums = args.of_queries.log_sums(of_queries), *const deltas =
                                                                          args.of_queries.deltas(of_queries);
      sight.begin_head(of_queries);
      for (std::int64_t at = sight.begin(); at < sight.end(); at += side) {
        if (sight.skips(at)) continue;
        F x[micro][micro], grad[micro][micro];
        make_dot_products<Tiles>(x, shared, own, own_plane, first, own_tokens, other, plane, at, tokens, size);
        make_dot_products<Tiles>(grad, shared, own_other, own_other_plane, first, own_tokens, other_other, other_plane,
                                 at, tokens, value_size);
#pragma unroll
        for (int i = 0; i < micro; ++i) {
          sight.make_logits(x[i], i, args.scale);
#pragma unroll
          for (int j = 0; j < micro; ++j) {
            const bool exists = sight.template sees<false>(i, j);
            const std::int64_t query = of_keys ? at + edge_column() * micro + j : first + edge_row() * micro + i;
            x[i][j] = exists ? exponential<P>(P::sub(x[i][j], log_sums[query])) : F(0);
            grad[i][j] = exists ? x[i][j] * (sight.left(grad[i][j], i, j) - deltas[query]) : F(0);
            x[i][j] = sight.left(x[i][j], i, j);
          }
        }
        if constexpr (of_keys) {
          put_weights<Tiles>(shared, x);
          add_weighted_tokens<Tiles>(sums_v, shared, other_other, other_plane, at, tokens, channel, value_size);
          __syncthreads();
        }
        put_weights<Tiles>(shared, grad);
        add_weighted_tokens<Tiles>(sums, shared, other, plane, at, tokens, channel, size);
      }
    }
#pragma unroll
    for (int i = 0; i < micro; ++i) {
#pragma unroll
      for (int n = 0; n < Tiles::width; ++n) sums[i][n] *= args.scale;
    }
    const Heads<T>& grads = of_keys ? args.grad_k : args.grad_q;
    if (grads.data != nullptr) {
      store_tokens<Tiles>(sums, grads, grads.plane(number, own_heads), first, of_keys ? args.keys : args.queries,
                          channel, size);
    }
    if constexpr (of_keys) {
      if (args.grad_v.data != nullptr) {
        store_tokens<Tiles>(sums_v, args.grad_v, args.grad_v.plane(number, own_heads), first, args.keys, channel,
                            value_size);
      }
    }
  }
}

// Calls body(Tiles{}) with the tiles of a head's size; larger ones are cut into several parts. Calls that are not
// everyday ones have fewer kernels.
template <class T, class Sees, class Body>
cudaError_t with_parts(std::int64_t size, Body&& body) {
  if constexpr (!is_half<T>) {
    if constexpr (Sees::is_plain) {
      if (size <= 32) return body(SimtTiles<T, 32>{});
    }
    if (size <= 64) return body(SimtTiles<T, 64>{});
  }
  return body(SimtTiles<T, std::is_same_v<T, double> ? 64 : 128>{});
}

// For `own` tokens of each of `heads` heads, and results of so many channels.
template <class Tiles>
SimtWork simt_work(const AttentionShape& shape, std::int64_t heads, std::int64_t own, std::int64_t channels) {
  SimtWork work{};
  work.heads = shape.heads;
  work.tiles = (own + Tiles::side - 1) / Tiles::side;
  work.parts = (channels + Tiles::part - 1) / Tiles::part;
  work.tasks = shape.batch * heads * work.tiles * work.parts;
  work.size = static_cast<int>(shape.size);
  return work;
}

template <class T, class Sees>
cudaError_t attention_simt(const Attention& args, const Sees& sees, cudaStream_t stream) {
  using F = typename Arithmetic<T>::F;
  const AttentionShape shape = completed(args.shape);
  SimtForward<T, Sees> given{};
  if (!make_heads(args.q, shape, shape.queries, given.q) ||
      !make_heads(args.k, with_heads(shape, shape.key_heads, shape.size), shape.keys, given.k) ||
      !make_heads(args.v, with_heads(shape, shape.key_heads, shape.value_size), shape.keys, given.v) ||
      !make_heads(args.out, with_heads(shape, shape.heads, shape.value_size), shape.queries, given.out)) {
    return cudaErrorInvalidValue;
  }
  given.sees = sees;
  given.lse = static_cast<F*>(args.lse);
  given.queries = shape.queries;
  given.keys = shape.keys;
  given.scale = static_cast<F>(args.scale);
  return with_parts<T, Sees>(shape.value_size, [&](auto tiles) {
    using Tiles = decltype(tiles);
    given.work = simt_work<Tiles>(shape, shape.heads, shape.queries, shape.value_size);
    return launch(attention_simt_kernel<Tiles, Sees>, blocks_of(given.work.tasks), simt_threads, 0, stream, given);
  });
}

template <class T, class Sees>
cudaError_t attention_simt_backward(const AttentionBackward& args,
                                    const QueryValues<typename Arithmetic<T>::F>& of_queries, const Sees& sees,
                                    cudaStream_t stream) {
  using F = typename Arithmetic<T>::F;
  const AttentionShape shape = completed(args.shape);
  const AttentionShape of_keys = with_heads(shape, shape.key_heads, shape.size);
  const AttentionShape of_values = with_heads(shape, shape.key_heads, shape.value_size);
  SimtBackward<T, Sees> given{};
  const auto wanted = [](const HeadsTensor& tensor, const AttentionShape& of, std::int64_t tokens, Heads<T>& heads) {
    return tensor.data == nullptr || make_heads(tensor, of, tokens, heads);
  };
  if (!make_heads(args.grad_out, with_heads(shape, shape.heads, shape.value_size), shape.queries, given.grad_out) ||
      !make_heads(args.q, shape, shape.queries, given.q) || !make_heads(args.k, of_keys, shape.keys, given.k) ||
      !make_heads(args.v, of_values, shape.keys, given.v) || !wanted(args.grad_q, shape, shape.queries, given.grad_q) ||
      !wanted(args.grad_k, of_keys, shape.keys, given.grad_k) ||
      !wanted(args.grad_v, of_values, shape.keys, given.grad_v)) {
    return cudaErrorInvalidValue;
  }
  given.sees = sees;
  given.of_queries = of_queries;
  given.queries = shape.queries;
  given.keys = shape.keys;
  given.scale = static_cast<F>(args.scale);
  const std::int64_t most_channels = std::max(shape.size, shape.value_size);
  return with_parts<T, Sees>(most_channels, [&](auto tiles) {
    using Tiles = decltype(tiles);
    cudaError_t error = cudaSuccess;
    if (given.grad_q.data != nullptr && shape.queries > 0) {
      given.work = simt_work<Tiles>(shape, shape.heads, shape.queries, shape.size);
      error = launch(attention_simt_backward_kernel<Tiles, false, Sees>, blocks_of(given.work.tasks), simt_threads, 0,
                     stream, given);
    }
    if (error == cudaSuccess && (given.grad_k.data != nullptr || given.grad_v.data != nullptr) && shape.keys > 0) {
      given.work = simt_work<Tiles>(shape, shape.key_heads, shape.keys, most_channels);
      error = launch(attention_simt_backward_kernel<Tiles, true, Sees>, blocks_of(given.work.tasks), simt_threads, 0,
                     stream, given);
    }
    return error;
  });
}

}  // namespace gencore::cuda
