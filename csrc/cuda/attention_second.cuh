// Attention's derivative along a direction, and the gradient of its gradient, as AttentionJvp and
// AttentionDoubleBackward say them: blocks as in attention_simt.cuh, for all types.
//
// The first pass, with queries as the block's own tokens, finds the change of the results and what the logits' second
// derivative has for all keys of a query. The others, as the gradient's, go over the queries and over the keys. What is
// multiplied by each thread is not rounded to a half type first.
#pragma once

#include "attention_simt.cuh"

namespace gencore::cuda {

// A tensor and how it changes, which is 0 where there is no data.
template <class T>
struct Moving {
  Heads<const T> value, change;

  __device__ __forceinline__ bool moves() const { return change.data != nullptr; }
};

// What there is of every query, batch x heads x queries of each: the logarithm of its denominator and that one's
// change, and the sums over its keys of p dp and of p w.
template <class F>
struct QueryMoments {
  const F* lse;
  F *d_lse, *delta, *second;
};

// Of these, d_out may have no data, and grad_out neither: then delta and second are not made.
template <class T, class Sees>
struct SimtTangent {
  using F = typename Arithmetic<T>::F;
  Moving<T> q, k, v;
  Heads<const T> grad_out, out;
  Heads<T> d_out;
  QueryMoments<F> of_queries;
  std::int64_t queries, keys;
  SimtWork work;
  F scale;
  Sees sees;
};

template <class T, class Sees>
struct SimtSecond {
  using F = typename Arithmetic<T>::F;
  Moving<T> q, k, v;
  Heads<const T> grad_out;
  // Those whose data is null are not wanted.
  Heads<T> grad_q, grad_k, grad_v;
  QueryMoments<F> of_queries;
  std::int64_t queries, keys;
  SimtWork work;
  F scale;
  Sees sees;
};

// Planes of a tensor and of its change, which is not to be read if there is none.
template <class T>
struct MovingPlane {
  const Moving<T>& of;
  const T *value, *change;

  __device__ __forceinline__ MovingPlane(const Moving<T>& tensor, std::int64_t number, std::int64_t heads)
      : of(tensor),
        value(tensor.value.plane(number, heads)),
        change(tensor.moves() ? tensor.change.plane(number, heads) : nullptr) {}
};

// products[i][j] = own token i . token j of the tile, for this thread's of both, and in `changes` what they change by.
template <class Tiles>
__device__ __forceinline__ void make_moving_products(typename Tiles::F (&products)[Tiles::micro][Tiles::micro],
                                                     typename Tiles::F (&changes)[Tiles::micro][Tiles::micro],
                                                     typename Tiles::Shared& shared,
                                                     const MovingPlane<typename Tiles::Element>& own,
                                                     std::int64_t own_first, std::int64_t own_tokens,
                                                     const MovingPlane<typename Tiles::Element>& other,
                                                     std::int64_t first, std::int64_t tokens, int size) {
  using F = typename Tiles::F;
  using P = typename Tiles::P;
  constexpr int micro = Tiles::micro, side = Tiles::side;
#pragma unroll
  for (int i = 0; i < micro; ++i) {
#pragma unroll
    for (int j = 0; j < micro; ++j) products[i][j] = changes[i][j] = 0;
  }
  const int row = edge_row() * micro, column = edge_column() * micro;
  const bool own_moves = own.change != nullptr, other_moves = other.change != nullptr;
  for (int channel = 0; channel < size; channel += panel_channels) {
    __syncthreads();
    load_panel<side>(shared.panels[0], own.of.value, own.value, own_first, own_tokens, channel, size);
    load_panel<side>(shared.panels[1], other.of.value, other.value, first, tokens, channel, size);
    if (own_moves) load_panel<side>(shared.panels[2], own.of.change, own.change, own_first, own_tokens, channel, size);
    if (other_moves) load_panel<side>(shared.panels[3], other.of.change, other.change, first, tokens, channel, size);
    __syncthreads();
#pragma unroll 4
    for (int c = 0; c < panel_channels; ++c) {
      F a[micro], b[micro];
      const auto add = [&](F(&to)[micro][micro]) {
#pragma unroll
        for (int i = 0; i < micro; ++i) {
#pragma unroll
          for (int j = 0; j < micro; ++j) to[i][j] = P::fma(a[i], b[j], to[i][j]);
        }
      };
      const auto read = [&](F(&to)[micro], int panel, int at) {
#pragma unroll
        for (int i = 0; i < micro; ++i) to[i] = shared.panels[panel][c][at + i];
      };
      read(a, 0, row);
      if (other_moves) {
        read(b, 3, column);
        add(changes);
      }
      read(b, 1, column);
      add(products);
      if (own_moves) {
        read(a, 2, row);
        add(changes);
      }
    }
  }
}

template <class F>
__device__ __forceinline__ F sum_over_row(F value) {
  return reduced_over_row(value, [](F a, F b) { return a + b; });
}

template <class Tiles, class Sees>
__global__ void __launch_bounds__(simt_threads, 1)
    attention_tangent_kernel(const __grid_constant__ SimtTangent<typename Tiles::Element, Sees> args) {
  using F = typename Tiles::F;
  using P = typename Tiles::P;
  using T = typename Tiles::Element;
  constexpr int micro = Tiles::micro, side = Tiles::side;
  __shared__ typename Tiles::Shared shared;
  const int size = args.work.size, value_size = args.sees.value_size(size);
  const bool with_second = args.grad_out.data != nullptr, with_out = args.d_out.data != nullptr;
  for (std::int64_t task = blockIdx.x; task < args.work.tasks; task += gridDim.x) {
    const std::int64_t all_tiles = task / args.work.parts, number = all_tiles / args.work.tiles;
    const std::int64_t first = (all_tiles - number * args.work.tiles) * side;
    const int channel = static_cast<int>(task - all_tiles * args.work.parts) * Tiles::part;
    const std::int64_t group = args.sees.group(), of_keys = number / group, key_heads = args.work.heads / group;
    const MovingPlane<T> q(args.q, number, args.work.heads), k(args.k, of_keys, key_heads),
        v(args.v, of_keys, key_heads);
    const T* const grad_out = with_second ? args.grad_out.plane(number, args.work.heads) : nullptr;
    Sight<Tiles, false, Sees> sight(args.sees, first, edge_row() * micro, edge_column() * micro, args.queries,
                                    args.keys, number);
    sight.begin_head(number);
    // What all logits of a query change by alike changes nothing, and is left out of sums: a large one would take their
    // digits. The first key tells about how much that is.
    F lse[micro], shift[micro] = {}, mean[micro] = {}, delta[micro] = {}, squares[micro] = {};
    F sums[micro][Tiles::width] = {};
#pragma unroll
    for (int i = 0; i < micro; ++i) {
      const std::int64_t query = first + edge_row() * micro + i;
      lse[i] = query < args.queries ? args.of_queries.lse[number * args.queries + query] : F(0);
    }
    bool begun = false;
    for (std::int64_t at = sight.begin(); at < sight.end(); at += side) {
      if (sight.skips(at)) continue;
      F p[micro][micro], moved[micro][micro];
      make_moving_products<Tiles>(p, moved, shared, q, first, args.queries, k, at, sight.keys(), size);
#pragma unroll
      for (int i = 0; i < micro; ++i) {
        if (!begun) {
          const F t = __shfl_sync(0xFFFFFFFFu, args.scale * moved[i][0], 0, simt_edge);
          // A key that is hidden may hold anything.
          shift[i] = t - t == F(0) ? t : F(0);
        }
        sight.make_logits(p[i], i, args.scale);
#pragma unroll
        for (int j = 0; j < micro; ++j) {
          const bool seen = sight.template sees<false>(i, j);
          p[i][j] = seen ? exponential<P>(P::sub(p[i][j], lse[i])) : F(0);
          moved[i][j] = seen ? p[i][j] * (args.scale * moved[i][j] - shift[i]) : F(0);
          mean[i] += moved[i][j];
          p[i][j] = sight.left(p[i][j], i, j);
          moved[i][j] = sight.left(moved[i][j], i, j);
        }
      }
      begun = true;
      if (with_second) {
        F grad[micro][micro];
        make_dot_products<Tiles>(grad, shared, args.grad_out, grad_out, first, args.queries, args.v.value, v.value, at,
                                 sight.keys(), value_size);
#pragma unroll
        for (int i = 0; i < micro; ++i) {
#pragma unroll
          for (int j = 0; j < micro; ++j) {
            delta[i] = P::fma(p[i][j], grad[i][j], delta[i]);
            squares[i] = P::fma(moved[i][j], grad[i][j], squares[i]);
          }
        }
        if (args.v.moves()) {
          make_dot_products<Tiles>(grad, shared, args.grad_out, grad_out, first, args.queries, args.v.change, v.change,
                                   at, sight.keys(), value_size);
#pragma unroll
          for (int i = 0; i < micro; ++i) {
#pragma unroll
            for (int j = 0; j < micro; ++j) squares[i] = P::fma(p[i][j], grad[i][j], squares[i]);
          }
        }
      }
      if (with_out) {
        put_weights<Tiles, false>(shared, moved);
        add_weighted_tokens<Tiles>(sums, shared, args.v.value, v.value, at, sight.keys(), channel, value_size);
        if (args.v.moves()) {
          __syncthreads();
          put_weights<Tiles, false>(shared, p);
          add_weighted_tokens<Tiles>(sums, shared, args.v.change, v.change, at, sight.keys(), channel, value_size);
        }
      }
    }
    const T* const out = with_out ? args.out.plane(number, args.work.heads) : nullptr;
#pragma unroll
    for (int i = 0; i < micro; ++i) {
      mean[i] = sum_over_row(mean[i]);
      delta[i] = sum_over_row(delta[i]);
      squares[i] = sum_over_row(squares[i]);
      const std::int64_t query = first + edge_row() * micro + i, place = number * args.queries + query;
      if (query >= args.queries) continue;
      if (channel == 0 && edge_column() == 0) {
        // The probabilities of a query that sees no key have the sum 0.
        args.of_queries.d_lse[place] = lse[i] == -F(INFINITY) ? F(0) : mean[i] + shift[i];
        if (with_second) {
          args.of_queries.delta[place] = delta[i];
          args.of_queries.second[place] = squares[i] - delta[i] * mean[i];
        }
      }
#pragma unroll
      for (int n = 0; n < Tiles::width; ++n) {
        const int c = channel + edge_column() + simt_edge * n;
        if (with_out && c < value_size) {
          sums[i][n] -= mean[i] * to_arithmetic(out[query * args.out.token_stride() + c * args.out.channel_stride()]);
        }
      }
    }
    if (with_out) {
      store_tokens<Tiles>(sums, args.d_out, args.d_out.plane(number, args.work.heads), first, args.queries, channel,
                          value_size);
    }
  }
}

// The second derivatives of keys and values, with keys as the block's own tokens, or those of queries.
template <class Tiles, bool of_keys, class Sees>
__global__ void __launch_bounds__(simt_threads, 1)
    attention_second_kernel(const __grid_constant__ SimtSecond<typename Tiles::Element, Sees> args) {
  using F = typename Tiles::F;
  using P = typename Tiles::P;
  using T = typename Tiles::Element;
  constexpr int micro = Tiles::micro, side = Tiles::side;
  __shared__ typename Tiles::Shared shared;
  const int size = args.work.size, value_size = args.sees.value_size(size);
  // What of the tensors is the block's own, and what comes in tiles.
  const Moving<T>&all_own = of_keys ? args.k : args.q, &all_others = of_keys ? args.q : args.k;
  const std::int64_t group = args.sees.group(), key_heads = args.work.heads / group;
  const std::int64_t own_heads = of_keys ? key_heads : args.work.heads, heads = of_keys ? args.work.heads : key_heads;
  for (std::int64_t task = blockIdx.x; task < args.work.tasks; task += gridDim.x) {
    const std::int64_t all_tiles = task / args.work.parts, number = all_tiles / args.work.tiles;
    const std::int64_t first = (all_tiles - number * args.work.tiles) * side;
    const int channel = static_cast<int>(task - all_tiles * args.work.parts) * Tiles::part;
    const MovingPlane<T> own(all_own, number, own_heads);
    Sight<Tiles, of_keys, Sees> sight(args.sees, first, edge_row() * micro, edge_column() * micro, args.queries,
                                      args.keys, of_keys ? number * group : number);
    const std::int64_t own_tokens = of_keys ? sight.keys() : args.queries;
    const std::int64_t tokens = of_keys ? args.queries : sight.keys();
    F sums[micro][Tiles::width] = {}, sums_v[of_keys ? micro : 1][of_keys ? Tiles::width : 1] = {};
    // Keys have the gradients of all heads of queries that share them.
    for (std::int64_t member = 0; member < (of_keys ? group : 1); ++member) {
      const std::int64_t of_queries = of_keys ? number * group + member : number;
      const std::int64_t of_tiles = of_keys ? of_queries : number / group;
      const MovingPlane<T> others(all_others, of_tiles, heads), v(args.v, of_keys ? number : of_tiles, key_heads);
      const T* const grad_out = args.grad_out.plane(of_queries, args.work.heads);
      // The products of grad_out with values, or with their changes.
      const auto make_gradients = [&](F(&to)[micro][micro], const Heads<const T>& values, const T* plane,
                                      std::int64_t at) {
        if constexpr (of_keys) {
          make_dot_products<Tiles>(to, shared, values, plane, first, own_tokens, args.grad_out, grad_out, at, tokens,
                                   value_size);
        } else {
          make_dot_products<Tiles>(to, shared, args.grad_out, grad_out, first, own_tokens, values, plane, at, tokens,
                                   value_size);
        }
      };
      const auto query_of = [&](std::int64_t at, int i, int j) {
        const std::int64_t query = of_keys ? at + edge_column() * micro + j : first + edge_row() * micro + i;
        return of_queries * args.queries + query;
      };
      sight.begin_head(of_queries);
      for (std::int64_t at = sight.begin(); at < sight.end(); at += side) {
        if (sight.skips(at)) continue;
        // p, and t - d_lse, from which w is made.
        F p[micro][micro], w[micro][micro], weights[micro][micro];
        make_moving_products<Tiles>(p, w, shared, own, first, own_tokens, others, at, tokens, size);
#pragma unroll
        for (int i = 0; i < micro; ++i) {
          sight.make_logits(p[i], i, args.scale);
#pragma unroll
          for (int j = 0; j < micro; ++j) {
            const bool exists = sight.template sees<false>(i, j);
            p[i][j] = exists ? exponential<P>(P::sub(p[i][j], args.of_queries.lse[query_of(at, i, j)])) : F(0);
            w[i][j] = exists ? args.scale * w[i][j] - args.of_queries.d_lse[query_of(at, i, j)] : F(0);
            weights[i][j] = sight.left(p[i][j] * w[i][j], i, j);
          }
        }
        if constexpr (of_keys) {
          if (args.grad_v.data != nullptr) {
            put_weights<Tiles, false>(shared, weights);
            add_weighted_tokens<Tiles>(sums_v, shared, args.grad_out, grad_out, at, tokens, channel, value_size);
          }
          if (args.grad_k.data == nullptr) continue;
        }
        make_gradients(weights, args.v.value, v.value, at);
#pragma unroll
        for (int i = 0; i < micro; ++i) {
#pragma unroll
          for (int j = 0; j < micro; ++j) {
            const bool exists = sight.template sees<false>(i, j);
            const F of_p = exists ? sight.left(weights[i][j], i, j) - args.of_queries.delta[query_of(at, i, j)] : F(0);
            const F mean = exists ? args.of_queries.second[query_of(at, i, j)] : F(0);
            w[i][j] = p[i][j] * (w[i][j] * of_p - mean);
            weights[i][j] = p[i][j] * of_p;
          }
        }
        if (others.change != nullptr) {
          put_weights<Tiles, false>(shared, weights);
          add_weighted_tokens<Tiles>(sums, shared, all_others.change, others.change, at, tokens, channel, size);
        }
        if (v.change != nullptr) {
          make_gradients(weights, args.v.change, v.change, at);
#pragma unroll
          for (int i = 0; i < micro; ++i) {
#pragma unroll
            for (int j = 0; j < micro; ++j) {
              const bool exists = sight.template sees<false>(i, j);
              w[i][j] += exists ? p[i][j] * sight.left(weights[i][j], i, j) : F(0);
            }
          }
        }
        __syncthreads();
        put_weights<Tiles, false>(shared, w);
        add_weighted_tokens<Tiles>(sums, shared, all_others.value, others.value, at, tokens, channel, size);
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

// Calls body(Tiles{}) with the tiles of a head's size. Other calls than everyday ones leave fewer registers for sums.
template <class T, class Sees, class Body>
cudaError_t with_second_parts(std::int64_t size, Body&& body) {
  if constexpr (Sees::is_plain) {
    if (size > 64) return body(SimtTiles<T, 128, 4>{});
  }
  return body(SimtTiles<T, 64, 4>{});
}

// The tensors of a call; `fits` says whether every one is as the kernels read and write it.
template <class T>
struct SecondTensors {
  AttentionShape shape, of_keys, of_values, of_results;
  bool fits = true;

  explicit SecondTensors(const AttentionShape& given) : shape(completed(given)) {
    of_keys = with_heads(shape, shape.key_heads, shape.size);
    of_values = with_heads(shape, shape.key_heads, shape.value_size);
    of_results = with_heads(shape, shape.heads, shape.value_size);
  }

  template <class U>
  void make(const HeadsTensor& tensor, const AttentionShape& of, std::int64_t tokens, Heads<U>& heads) {
    heads = {};
    fits = (tensor.data == nullptr || make_heads(tensor, of, tokens, heads)) && fits;
  }
  // q, k and v of both kinds of arguments with their changes.
  template <class Args, class Given>
  void make_direction(const Args& args, Given& given) {
    make(args.q, shape, shape.queries, given.q.value);
    make(args.k, of_keys, shape.keys, given.k.value);
    make(args.v, of_values, shape.keys, given.v.value);
    make(args.dq, shape, shape.queries, given.q.change);
    make(args.dk, of_keys, shape.keys, given.k.change);
    make(args.dv, of_values, shape.keys, given.v.change);
    given.queries = shape.queries;
    given.keys = shape.keys;
    given.scale = static_cast<typename Arithmetic<T>::F>(args.scale);
  }
};

// `grad_out` may have no data, and then of_queries neither delta nor second.
template <class T, class Sees, class Args>
cudaError_t attention_tangent(const Args& args, const HeadsTensor& grad_out, const HeadsTensor& d_out,
                              const QueryMoments<typename Arithmetic<T>::F>& of_queries, const Sees& sees,
                              cudaStream_t stream) {
  SecondTensors<T> tensors(args.shape);
  const AttentionShape& shape = tensors.shape;
  SimtTangent<T, Sees> given{};
  tensors.make_direction(args, given);
  tensors.make(grad_out, tensors.of_results, shape.queries, given.grad_out);
  tensors.make(args.out, tensors.of_results, shape.queries, given.out);
  tensors.make(d_out, tensors.of_results, shape.queries, given.d_out);
  if (!tensors.fits) return cudaErrorInvalidValue;
  given.of_queries = of_queries;
  given.sees = sees;
  return with_second_parts<T, Sees>(shape.value_size, [&](auto tiles) {
    using Tiles = decltype(tiles);
    // Sums of no channels are made once.
    const std::int64_t channels = d_out.data == nullptr ? 1 : shape.value_size;
    given.work = simt_work<Tiles>(shape, shape.heads, shape.queries, channels);
    return launch(attention_tangent_kernel<Tiles, Sees>, blocks_of(given.work.tasks), simt_threads, 0, stream, given);
  });
}

template <class T, class Sees>
cudaError_t attention_second(const AttentionDoubleBackward& args,
                             const QueryMoments<typename Arithmetic<T>::F>& of_queries, const Sees& sees,
                             cudaStream_t stream) {
  SecondTensors<T> tensors(args.shape);
  const AttentionShape& shape = tensors.shape;
  SimtSecond<T, Sees> given{};
  tensors.make_direction(args, given);
  tensors.make(args.grad_out, tensors.of_results, shape.queries, given.grad_out);
  tensors.make(args.grad_q, shape, shape.queries, given.grad_q);
  tensors.make(args.grad_k, tensors.of_keys, shape.keys, given.grad_k);
  tensors.make(args.grad_v, tensors.of_values, shape.keys, given.grad_v);
  if (!tensors.fits) return cudaErrorInvalidValue;
  given.of_queries = of_queries;
  given.sees = sees;
  const std::int64_t most_channels = std::max(shape.size, shape.value_size);
  return with_second_parts<T, Sees>(most_channels, [&](auto tiles) {
    using Tiles = decltype(tiles);
    cudaError_t error = cudaSuccess;
    if (given.grad_q.data != nullptr && shape.queries > 0) {
      given.work = simt_work<Tiles>(shape, shape.heads, shape.queries, shape.size);
      error = launch(attention_second_kernel<Tiles, false, Sees>, blocks_of(given.work.tasks), simt_threads, 0, stream,
                     given);
    }
    if (error == cudaSuccess && (given.grad_k.data != nullptr || given.grad_v.data != nullptr) && shape.keys > 0) {
      given.work = simt_work<Tiles>(shape, shape.key_heads, shape.keys, most_channels);
      error = launch(attention_second_kernel<Tiles, true, Sees>, blocks_of(given.work.tasks), simt_threads, 0, stream,
                     given);
    }
    return error;
  });
}

}  // namespace gencore::cuda
