// Group normalization's derivatives along a direction, and of the gradient, as GroupNormJvp and GroupNormDoubleBackward
// say them. The tensors are read once for sums over the pixels of each channel, and once for the results; between them
// a block per group does the rest in binary64, as all else is linear in these sums.
//
// The terms are d, d c, c, h, h c, h d, p, p c, p c c, p d and p d c, where d is d_x, c is x - m, h = grad_y act'(t)
// and p = grad_y act''(t). A direction alone needs three of them, no activation six.
#pragma once

#include "group_norm_backward.cuh"

namespace gencore::cuda {

constexpr int direction_terms = 3, linear_terms = 6, all_terms = 11;

// What the kernels hand on through the workspace.
template <class F>
struct SecondSpace {
  // Samples x channels x slices x terms.
  F* sums;
  // Samples x channels x terms.
  double* totals;
  // all_coefficients x samples x channels.
  F* coefficients;
  // Of each sample and channel, its parts of grad_bias and of grad_weight: 2 x samples x channels.
  double* of_samples;
};

// Per channel m, a, b, e1, e2, e3, f1, f2 and f3: t = a c + b, dt = e1 d + e2 c + e3 and
// grad_x = a p dt + e2 h + f1 d + f2 c + f3. A direction alone needs six of them.
constexpr int direction_coefficients = 6, all_coefficients = 9;

template <class F>
struct SecondShared {
  ChannelCoefficients<F>* channels;
  F* sums;
};

// How many of the terms' sums are in shared memory at once. Where a thread has all sums of one strand, a few go there
// after the others: all of them would not fit.
template <bool channels_last, int terms>
constexpr int terms_at_once = channels_last && terms > 3 ? 3 : terms;

template <bool channels_last, int terms, class F, class Base>
__host__ __device__ void place(Arrays<Base>& arrays, const GroupNormWork& work, SecondShared<F>& shared) {
  arrays.place(shared.channels, work.tile_channels);
  arrays.place(shared.sums, std::int64_t{terms_at_once<channels_last, terms>} * work.tile_channels * work.strands);
}

// The tensors of a batch. Where x does not change, d is 0.
template <class T, int width>
struct SecondBatch {
  RawVector<T, width> x[batch_vectors], d_x[batch_vectors], grad_y[batch_vectors];

  __device__ __forceinline__ void load(const GroupNormDoubleBackward& args, const GroupNormBatch& batch,
                                       bool with_grad) {
    load_batch(static_cast<const T*>(args.x), batch, x);
    if (args.direction.x != nullptr) load_batch(static_cast<const T*>(args.direction.x), batch, d_x);
    if (with_grad) load_batch(static_cast<const T*>(args.grad_y), batch, grad_y);
  }
};

// act'(t) and act''(t) of silu.
template <class T>
__device__ __forceinline__ void differentiate_silu(typename Arithmetic<T>::F t, typename Arithmetic<T>::F& first,
                                                   typename Arithmetic<T>::F& second) {
  using Row = Silu<FunctionsOf<T>>;
  const auto s = Row::sigmoid(t);
  first = Row::first(t, s);
  second = Row::second(t, s);
}

template <class T, int width, bool channels_last, int terms>
__global__ void __launch_bounds__(block_threads, 1)
    group_norm_second_gather_kernel(const __grid_constant__ GroupNormDoubleBackward args,
                                    const __grid_constant__ GroupNormWork work,
                                    const SecondSpace<typename Arithmetic<T>::F> space) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  constexpr int lanes = vector_channels<width, channels_last>, at_once = terms_at_once<channels_last, terms>;
  Arrays<> arrays{ptx::dynamic_shared<unsigned char>()};
  SecondShared<F> shared;
  place<channels_last, terms>(arrays, work, shared);
  const bool moves = args.direction.x != nullptr;
  for (std::int64_t block = blockIdx.x; block < work.blocks(); block += gridDim.x) {
    const GroupNormTile tile = tile_of_block<channels_last>(work, block, work.slices);
    set_coefficients<T>(args, work, tile, shared.channels);
    F m[lanes], a[lanes], b[lanes], sum[terms][lanes];
    // Where this thread's sums belong, if it has some and they wait in registers.
    int waiting = -1;
    const auto put = [&](int begin, int at) {
#pragma unroll
      for (int q = 0; q < at_once; ++q) {
#pragma unroll
        for (int l = 0; l < lanes; ++l) {
          if (begin + q < terms) shared.sums[at_once * (at + l) + q] = sum[begin + q][l];
        }
      }
    };
    for_each_batch<width, channels_last>(
        work, tile, 1,
        [&](int channel) {
#pragma unroll
          for (int l = 0; l < lanes; ++l) {
            m[l] = shared.channels[channel + l].m;
            a[l] = shared.channels[channel + l].a;
            b[l] = shared.channels[channel + l].b;
#pragma unroll
            for (int q = 0; q < terms; ++q) sum[q][l] = 0;
          }
        },
        [&](const GroupNormBatch& batch) {
          SecondBatch<T, width> raw;
          raw.load(args, batch, terms > direction_terms);
#pragma unroll
          for (int i = 0; i < batch_vectors; ++i) {
            if (!batch.has(i)) break;
            F value[width], change[width], grad[width];
            raw.x[i].unpack(value);
            if (moves) {
              raw.d_x[i].unpack(change);
            } else {
#pragma unroll
              for (int l = 0; l < width; ++l) change[l] = 0;
            }
            if constexpr (terms > direction_terms) raw.grad_y[i].unpack(grad);
#pragma unroll
            for (int l = 0; l < width; ++l) {
              const int k = channels_last ? l : 0;
              const F c = P::sub(value[l], m[k]), d = change[l];
              sum[0][k] = P::add(sum[0][k], d);
              sum[1][k] = P::fma(d, c, sum[1][k]);
              sum[2][k] = P::add(sum[2][k], c);
              if constexpr (terms > direction_terms) {
                F h = grad[l];
                if constexpr (terms > linear_terms) {
                  F first, second;
                  differentiate_silu<T>(P::fma(c, a[k], b[k]), first, second);
                  const F p = P::mul(h, second), p_c = P::mul(p, c);
                  h = P::mul(h, first);
                  sum[6][k] = P::add(sum[6][k], p);
                  sum[7][k] = P::add(sum[7][k], p_c);
                  sum[8][k] = P::fma(p_c, c, sum[8][k]);
                  sum[9][k] = P::fma(p, d, sum[9][k]);
                  sum[10][k] = P::fma(p_c, d, sum[10][k]);
                }
                sum[3][k] = P::add(sum[3][k], h);
                sum[4][k] = P::fma(h, c, sum[4][k]);
                sum[5][k] = P::fma(h, d, sum[5][k]);
              }
            }
          }
        },
        [&](int channel, int place, bool first) {
          if constexpr (channels_last) {
            waiting = place + channel;
          } else {
#pragma unroll
            for (int q = 0; q < terms; ++q) sum[q][0] = team_sum(sum[q][0], work.team_log2);
            if (first) put(0, place + channel);
          }
        });
#pragma unroll
    for (int begin = 0; begin < terms; begin += at_once) {
      if (channels_last && waiting >= 0) put(begin, waiting);
      __syncthreads();
      add_strands<P>(shared.sums, work.strands, at_once * tile.channels);
      for (int i = static_cast<int>(threadIdx.x); i < at_once * tile.channels; i += block_threads) {
        const int c = i / at_once, q = begin + i - c * at_once;
        if (q < terms) space.sums[((tile.first_channel + c) * work.slices + tile.slice) * terms + q] = shared.sums[i];
      }
      __syncthreads();
    }
  }
}

// The sums over a block of what its threads have, for all of them. Warps are added in their order.
template <int count>
__device__ __forceinline__ void sum_over_block(double (&value)[count]) {
  constexpr int warps = block_threads / warp_threads;
  __shared__ double of_warps[warps][count];
  const int warp = static_cast<int>(threadIdx.x) / warp_threads;
#pragma unroll
  for (int q = 0; q < count; ++q) {
    const double sum = team_sum(value[q], 5);
    if (threadIdx.x % warp_threads == 0) of_warps[warp][q] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int q = 0; q < count; ++q) {
    value[q] = of_warps[0][q];
    for (int other = 1; other < warps; ++other) value[q] += of_warps[other][q];
  }
  __syncthreads();
}

// A channel of a sample, with the sums over its pixels of du = d_x + d_bias_in, du xhat and xhat.
struct ChannelAlong {
  double weight, bias, scale, a, rest, d_weight, d_bias, d_scale, d_bias_in, d_a, d_b;
  double du, du_xhat, xhat;
};

// Means over the elements of a group: of du and du xhat; with q = a h, of q, q xhat and q du; of v and v xhat.
struct GroupAlong {
  double inverse, pixels, du, du_xhat, q, q_xhat, q_du, v, v_xhat;

  // The mean of a h d_xhat, over inverse.
  __device__ __forceinline__ double cross() const { return q_du - du * q - du_xhat * q_xhat; }
};

// The sums over a channel's pixels of h, h xhat, h du, k = p dt and k xhat.
struct ChannelBend {
  double h, h_xhat, h_du, k, k_xhat;
};

template <class T>
__device__ __forceinline__ ChannelAlong channel_along(const GroupNormDoubleBackward& args, std::int64_t sample,
                                                      std::int64_t channel, const double* statistics, double pixels,
                                                      const double* totals) {
  const GroupNormDirection& to = args.direction;
  const double inverse = statistics[1];
  ChannelAlong of;
  of.rest = channel_coefficients<T>(args, sample, channel, statistics[0], inverse).rest;
  of.weight = channel_value<T>(args.weight, sample, channel, 1);
  of.bias = channel_value<T>(args.bias, sample, channel, 0);
  of.scale = 1 + channel_value<T>(args.scale, sample, channel, 0);
  of.a = of.weight * of.scale;
  of.d_weight = channel_value<T>(to.weight, sample, channel, 0);
  of.d_bias = channel_value<T>(to.bias, sample, channel, 0);
  of.d_scale = channel_value<T>(to.scale, sample, channel, 0);
  of.d_bias_in = channel_value<T>(to.bias_in, sample, channel, 0);
  of.d_a = of.d_weight * of.scale + of.weight * of.d_scale;
  of.d_b = of.d_bias * of.scale + of.bias * of.d_scale + channel_value<T>(to.shift, sample, channel, 0);
  of.xhat = inverse * (totals[2] + of.rest * pixels);
  of.du = totals[0] + of.d_bias_in * pixels;
  of.du_xhat = inverse * (totals[1] + of.rest * totals[0]) + of.d_bias_in * of.xhat;
  return of;
}

template <int terms>
__device__ __forceinline__ ChannelBend channel_bend(const ChannelAlong& of, const GroupAlong& group,
                                                    const double* totals) {
  const double inverse = group.inverse, h = totals[3];
  ChannelBend sums{h, inverse * (totals[4] + of.rest * h), totals[5] + of.d_bias_in * h, 0, 0};
  if constexpr (terms > linear_terms) {
    const double p = totals[6], p_c = totals[7], p_c_c = totals[8], p_d = totals[9], p_d_c = totals[10];
    const double p_xhat = inverse * (p_c + of.rest * p), p_du = p_d + of.d_bias_in * p;
    const double p_xhat_xhat = inverse * inverse * (p_c_c + of.rest * (2 * p_c + of.rest * p));
    const double p_du_xhat = inverse * (p_d_c + of.rest * p_d) + of.d_bias_in * p_xhat;
    const double factor = inverse * of.a;
    sums.k = factor * (p_du - group.du * p - group.du_xhat * p_xhat) + of.d_a * p_xhat + of.d_b * p;
    sums.k_xhat =
        factor * (p_du_xhat - group.du * p_xhat - group.du_xhat * p_xhat_xhat) + of.d_a * p_xhat_xhat + of.d_b * p_xhat;
  }
  return sums;
}

// The gradients of a channel's values.
template <class T>
__device__ __forceinline__ void finish_values(const GroupNormDoubleBackward& args, const ChannelAlong& of,
                                              const ChannelBend& sums, const GroupAlong& group, std::int64_t at,
                                              std::int64_t all, double* of_samples) {
  const double inverse = group.inverse;
  const double h_change = inverse * (sums.h_du - group.du * sums.h - group.du_xhat * sums.h_xhat);
  const double grad_a = sums.k_xhat + h_change, grad_b = sums.k;
  of_samples[at] = of.scale * grad_b + of.d_scale * sums.h;
  of_samples[all + at] = of.scale * grad_a + of.d_scale * sums.h_xhat;
  store_value<T>(args.grad_scale, args.scale.dtype, at,
                 of.weight * grad_a + of.bias * grad_b + of.d_weight * sums.h_xhat + of.d_bias * sums.h);
  store_value<T>(args.grad_shift, args.shift.dtype, at, grad_b);
  const double of_v =
      of.a * sums.k + of.d_a * sums.h - inverse * (group.q_xhat * of.du + group.du_xhat * of.a * sums.h);
  const double of_xhat = group.v_xhat + inverse * group.cross();
  store_value<T>(args.grad_bias_in, args.bias_in.dtype, at,
                 inverse * (of_v - group.pixels * group.v - of.xhat * of_xhat));
}

template <class T, int terms>
__global__ void __launch_bounds__(block_threads, 1)
    group_norm_second_merge_kernel(const __grid_constant__ GroupNormDoubleBackward args,
                                   const __grid_constant__ GroupNormWork work,
                                   const SecondSpace<typename Arithmetic<T>::F> space) {
  using F = typename Arithmetic<T>::F;
  const std::int64_t of_group = work.group_channels, all = work.rows * work.channels;
  const int slices_log2 = work.slice_team_log2;
  const bool moves = args.direction.x != nullptr;
  for (std::int64_t number = blockIdx.x; number < work.rows * work.groups; number += gridDim.x) {
    const std::int64_t first = number * of_group, sample = first / work.sample_channels;
    const double* const statistics = args.statistics + 2 * number;
    for_each_by_teams(slices_log2, of_group, [&](std::int64_t c, int lane, bool valid) {
      double sum[terms] = {};
      for (std::int64_t slice = lane; slice < work.slices; slice += 1 << slices_log2) {
#pragma unroll
        for (int q = 0; q < terms; ++q) sum[q] += space.sums[((first + c) * work.slices + slice) * terms + q];
      }
#pragma unroll
      for (int q = 0; q < terms; ++q) {
        const double total = team_sum(sum[q], slices_log2);
        // Where x does not change, infinity times 0 would be NaN.
        const bool of_d = q == 0 || q == 1 || q == 5 || q > 8;
        if (valid && lane == 0) space.totals[(first + c) * terms + q] = of_d && !moves ? 0 : total;
      }
    });
    __syncthreads();

    const double pixels = static_cast<double>(work.pixels), share = 1 / (pixels * static_cast<double>(of_group));
    GroupAlong group{statistics[1], pixels, 0, 0, 0, 0, 0, 0, 0};
    const auto for_each_channel = [&](auto&& body) {
      for (std::int64_t c = threadIdx.x; c < of_group; c += block_threads) {
        const double* const totals = space.totals + (first + c) * terms;
        const std::int64_t channel = first + c - sample * work.sample_channels;
        body(first + c, channel_along<T>(args, sample, channel, statistics, pixels, totals), totals);
      }
    };
    double plain[terms > direction_terms ? 5 : 2] = {};
    for_each_channel([&](std::int64_t, const ChannelAlong& of, const double* totals) {
      plain[0] += of.du;
      plain[1] += of.du_xhat;
      if constexpr (terms > direction_terms) {
        const ChannelBend sums = channel_bend<linear_terms>(of, group, totals);
        plain[2] += of.a * sums.h;
        plain[3] += of.a * sums.h_xhat;
        plain[4] += of.a * sums.h_du;
      }
    });
    sum_over_block(plain);
    group.du = plain[0] * share;
    group.du_xhat = plain[1] * share;
    if constexpr (terms > direction_terms) {
      group.q = plain[2] * share;
      group.q_xhat = plain[3] * share;
      group.q_du = plain[4] * share;
      double bent[2] = {};
      for_each_channel([&](std::int64_t, const ChannelAlong& of, const double* totals) {
        const ChannelBend sums = channel_bend<terms>(of, group, totals);
        bent[0] += of.a * sums.k + of.d_a * sums.h;
        bent[1] += of.a * sums.k_xhat + of.d_a * sums.h_xhat;
      });
      sum_over_block(bent);
      group.v = bent[0] * share - group.inverse * (group.q_xhat * group.du + group.du_xhat * group.q);
      group.v_xhat = bent[1] * share - 2 * group.inverse * group.q_xhat * group.du_xhat;
    }
    for_each_channel([&](std::int64_t at, const ChannelAlong& of, const double* totals) {
      const double inverse = group.inverse, factor = inverse * of.a;
      const auto basic =
          channel_coefficients<T>(args, sample, at - sample * work.sample_channels, statistics[0], inverse);
      const double of_xhat = of.d_a - factor * group.du_xhat;
      const auto put = [&](int i, double value) { space.coefficients[i * all + at] = static_cast<F>(value); };
      put(0, basic.m);
      put(1, basic.a);
      put(2, basic.b);
      put(3, moves ? factor : 0);
      put(4, inverse * of_xhat);
      put(5, factor * (of.d_bias_in - group.du) + inverse * of.rest * of_xhat + of.d_b);
      if constexpr (terms > direction_terms) {
        const double along_xhat = group.v_xhat + inverse * group.cross(), of_du = inverse * group.q_xhat;
        put(6, moves ? -inverse * of_du : 0);
        put(7, -inverse * inverse * along_xhat);
        put(8, -inverse * (of_du * of.d_bias_in + group.v + inverse * of.rest * along_xhat));
        finish_values<T>(args, of, channel_bend<terms>(of, group, totals), group, at, all, space.of_samples);
      }
    });
    __syncthreads();
  }
}

// Writes the change of y and, if `second`, the gradient of x.
template <class T, int width, bool channels_last, bool second>
__global__ void __launch_bounds__(block_threads, 1)
    group_norm_second_scatter_kernel(const __grid_constant__ GroupNormDoubleBackward args,
                                     const __grid_constant__ GroupNormWork work,
                                     const typename Arithmetic<T>::F* coefficients) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  constexpr int lanes = vector_channels<width, channels_last>;
  constexpr int count = second ? all_coefficients : direction_coefficients;
  const bool moves = args.direction.x != nullptr, with_silu = args.activation == Activation::silu;
  const std::int64_t blocks = work.blocks(), all = work.rows * work.channels;
  T* const d_y = static_cast<T*>(args.grad_grad_y);
  T* const grad_x = static_cast<T*>(args.grad_x);
  for (std::int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    // Backwards: what was read last is still in the cache.
    const GroupNormTile tile = tile_of_block<channels_last>(work, blocks - 1 - block, work.slices);
    F k[count][lanes];
    for_each_batch<width, channels_last>(
        work, tile, 1,
        [&](int channel) {
#pragma unroll
          for (int i = 0; i < count; ++i) {
#pragma unroll
            for (int l = 0; l < lanes; ++l) k[i][l] = coefficients[i * all + tile.first_channel + channel + l];
          }
        },
        [&](const GroupNormBatch& batch) {
          SecondBatch<T, width> raw;
          raw.load(args, batch, second);
#pragma unroll
          for (int i = 0; i < batch_vectors; ++i) {
            if (!batch.has(i)) break;
            F value[width], change[width], grad[width];
            raw.x[i].unpack(value);
            if (moves) {
              raw.d_x[i].unpack(change);
            } else {
#pragma unroll
              for (int l = 0; l < width; ++l) change[l] = 0;
            }
            if constexpr (second) raw.grad_y[i].unpack(grad);
#pragma unroll
            for (int l = 0; l < width; ++l) {
              const int n = channels_last ? l : 0;
              const F c = P::sub(value[l], k[0][n]), d = change[l];
              F dt = P::fma(k[3][n], d, P::fma(k[4][n], c, k[5][n])), into = 0, h = 0;
              if constexpr (second) {
                into = P::fma(k[6][n], d, P::fma(k[7][n], c, k[8][n]));
                h = grad[l];
              }
              if (with_silu) {
                F first, bend;
                differentiate_silu<T>(P::fma(c, k[1][n], k[2][n]), first, bend);
                if constexpr (second) into = P::fma(k[1][n], P::mul(P::mul(h, bend), dt), into);
                h = P::mul(h, first);
                dt = P::mul(first, dt);
              }
              change[l] = dt;
              if constexpr (second) value[l] = P::fma(k[4][n], h, into);
            }
            const std::int64_t at = batch.at + i * batch.step;
            if (d_y != nullptr) RawVector<T, width>::store(d_y + at, change);
            if (second && grad_x != nullptr) RawVector<T, width>::store(grad_x + at, value);
          }
        },
        [](int, int, bool) {});
  }
}

}  // namespace gencore::cuda
