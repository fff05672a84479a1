// The backward pass of group normalization. With d = x - m, what is summed over the pixels of a channel is dt, dt d and
// d; a, c2 and c3 follow from that per group, and grad_x = a dt + c2 d + c3.
#pragma once

#include "group_norm_forward.cuh"

namespace gencore::cuda {

// sum dt, sum dt d, sum d.
constexpr int channel_sums = 3;

// With k = weight (1 + scale): the sums over a group of k dt / standard deviation, and of k dt xhat.
struct GroupSums {
  double plain, weighted;
};

template <class T>
struct BackwardShared {
  using F = typename Arithmetic<T>::F;
  T *x, *grad_y;
  GroupSums *parts, *groups;
  ChannelCoefficients<F>* channels;
  // c2 and c3 of each channel.
  F* gradients;
  // Of strands, then in the place of the first, of channels: slices x channels x channel_sums.
  F* sums;
};

template <class T, class Base>
__host__ __device__ BackwardShared<T> backward_shared(Arrays<Base>& arrays, const GroupNormWork& work,
                                                      GroupNormPhase phase, bool keep) {
  const bool gathers = phase != GroupNormPhase::scatter, whole = phase == GroupNormPhase::whole;
  const std::int64_t slices = whole ? work.slices : 1, kept = keep ? work.tile_channels * work.pixels : 0;
  BackwardShared<T> shared{};
  arrays.place(shared.x, kept);
  arrays.place(shared.grad_y, kept);
  arrays.place(shared.parts, whole ? work.tile_groups * slices : 0);
  arrays.place(shared.groups, phase == GroupNormPhase::gather ? 0 : work.tile_groups);
  arrays.place(shared.channels, work.tile_channels);
  arrays.place(shared.gradients, phase == GroupNormPhase::gather ? 0 : 2 * work.tile_channels);
  arrays.place(shared.sums, gathers ? channel_sums * work.tile_channels * work.strands * slices : 0);
  return shared;
}

// What the kernels hand on through the workspace.
template <class F>
struct BackwardSpace {
  // Groups x parts.
  GroupSums* parts;
  // Of each sample and channel, (1 + scale) sum dt and (1 + scale) sum dt xhat: 2 x samples x channels.
  double* of_samples;
  // channel_sums x slices x samples x channels.
  F* sums;
};

// Those of a tile's channels, in shared memory.
template <class T, class Args>
__device__ __forceinline__ void set_coefficients(const Args& args, const GroupNormWork& work, const GroupNormTile& tile,
                                                 ChannelCoefficients<typename Arithmetic<T>::F>* channels) {
  for (int c = static_cast<int>(threadIdx.x); c < tile.channels; c += static_cast<int>(blockDim.x)) {
    const std::int64_t channel = tile.first_channel + c, sample = channel / work.sample_channels;
    const double* const statistics = args.statistics + 2 * (channel / work.group_channels);
    channels[c] =
        channel_coefficients<T>(args, sample, channel - sample * work.sample_channels, statistics[0], statistics[1]);
  }
  __syncthreads();
}

// The gradient of the activation's argument, which is a d + b.
template <class T, class F>
__device__ __forceinline__ F gradient_of_argument(bool with_silu, F grad_y, F d, F a, F b) {
  using P = Arithmetic<T>;
  return with_silu ? P::mul(grad_y, silu_derivative_of<T>(P::fma(d, a, b))) : grad_y;
}

// Adds up the strands' sums, of which each has `of_strand`, in halves; they are then those of the first.
template <class P, class F>
__device__ __forceinline__ void add_strands(F* sums, int strands, int of_strand) {
  for (int n = strands; n > 1; n = (n + 1) / 2) {
    const int half = (n + 1) / 2;
    for (int i = static_cast<int>(threadIdx.x); i < (n - half) * of_strand; i += static_cast<int>(blockDim.x)) {
      sums[i] = P::add(sums[i], sums[i + half * of_strand]);
    }
    __syncthreads();
  }
}

// The sums of a tile, for each of its slices: those of channels in shared memory, those of groups where part(group,
// slice) says.
template <class T, int width, bool channels_last, class Part>
__device__ __forceinline__ void gather_sums(const GroupNormBackward& args, const GroupNormWork& work,
                                            const GroupNormTile& tile, int slices, const BackwardShared<T>& shared,
                                            bool keep, Part&& part) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  constexpr int lanes = vector_channels<width, channels_last>;
  const bool with_silu = args.activation == Activation::silu;
  const T* const x = static_cast<const T*>(args.x);
  const T* const grad_y = static_cast<const T*>(args.grad_y);
  F m[lanes], a[lanes], b[lanes], sum[channel_sums][lanes];
  for_each_batch<width, channels_last>(
      work, tile, slices,
      [&](int channel) {
#pragma unroll
        for (int l = 0; l < lanes; ++l) {
          m[l] = shared.channels[channel + l].m;
          a[l] = shared.channels[channel + l].a;
          b[l] = shared.channels[channel + l].b;
          sum[0][l] = sum[1][l] = sum[2][l] = 0;
        }
      },
      [&](const GroupNormBatch& batch) {
        RawVector<T, width> raw_x[batch_vectors], raw_grad[batch_vectors];
        load_batch(x, batch, raw_x);
        load_batch(grad_y, batch, raw_grad);
#pragma unroll
        for (int i = 0; i < batch_vectors; ++i) {
          if (!batch.has(i)) break;
          if (keep) {
            raw_x[i].keep(shared.x + (batch.at + i * batch.step - tile.at));
            raw_grad[i].keep(shared.grad_y + (batch.at + i * batch.step - tile.at));
          }
          F value[width], grad[width];
          raw_x[i].unpack(value);
          raw_grad[i].unpack(grad);
#pragma unroll
          for (int l = 0; l < width; ++l) {
            const int c = channels_last ? l : 0;
            const F d = P::sub(value[l], m[c]), dt = gradient_of_argument<T>(with_silu, grad[l], d, a[c], b[c]);
            sum[0][c] = P::add(sum[0][c], dt);
            sum[1][c] = P::fma(dt, d, sum[1][c]);
            sum[2][c] = P::add(sum[2][c], d);
          }
        }
      },
      [&](int channel, int place, bool first) {
#pragma unroll
        for (int q = 0; q < channel_sums; ++q) {
          if constexpr (!channels_last) sum[q][0] = team_sum(sum[q][0], work.team_log2);
          if (!first) continue;
#pragma unroll
          for (int l = 0; l < lanes; ++l) shared.sums[channel_sums * (place + channel + l) + q] = sum[q][l];
        }
      });
  __syncthreads();

  add_strands<P>(shared.sums, work.strands, channel_sums * slices * tile.channels);

  for_each_by_teams(work.group_team_log2, tile.groups * slices, [&](int unit, int lane, bool valid) {
    const int slice = unit / tile.groups, group = unit - slice * tile.groups;
    const int channels = tile.channels / tile.groups;
    GroupSums sums{0, 0};
    for (int i = lane; valid && i < channels; i += 1 << work.group_team_log2) {
      const int c = group * channels + i;
      const F* const of_channel = shared.sums + channel_sums * (slice * tile.channels + c);
      const double scaled = shared.channels[c].a, rest = shared.channels[c].rest, plain = of_channel[0];
      sums.plain += scaled * plain;
      sums.weighted += scaled * (of_channel[1] + rest * plain);
    }
    sums.plain = team_sum(sums.plain, work.group_team_log2);
    sums.weighted = team_sum(sums.weighted, work.group_team_log2);
    if (valid && lane == 0) part(group, slice) = sums;
  });
}

// The sums of `groups` groups over their parts, each divided by the number of elements.
template <class Parts>
__device__ __forceinline__ void merge_sums(const GroupNormWork& work, int groups, GroupSums* into, Parts&& parts) {
  for_each_by_teams(work.part_team_log2, groups, [&](int group, int lane, bool valid) {
    const GroupSums* const part = parts(group);
    GroupSums sums{0, 0};
    for (std::int64_t p = lane; p < work.parts(); p += 1 << work.part_team_log2) {
      sums.plain += part[p].plain;
      sums.weighted += part[p].weighted;
    }
    sums.plain = team_sum(sums.plain, work.part_team_log2);
    sums.weighted = team_sum(sums.weighted, work.part_team_log2);
    const double share = 1 / (static_cast<double>(work.group_channels) * static_cast<double>(work.pixels));
    if (valid && lane == 0) into[group] = {sums.plain * share, sums.weighted * share};
  });
}

template <class T, int width, bool channels_last>
__device__ __forceinline__ void scatter_gradient(const GroupNormBackward& args, const GroupNormWork& work,
                                                 const GroupNormTile& tile, int slices, const BackwardShared<T>& shared,
                                                 bool kept) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  constexpr int lanes = vector_channels<width, channels_last>;
  const bool with_silu = args.activation == Activation::silu;
  const T* const x = static_cast<const T*>(args.x);
  const T* const grad_y = static_cast<const T*>(args.grad_y);
  T* const grad_x = static_cast<T*>(args.grad_x);
  for (int c = static_cast<int>(threadIdx.x); c < tile.channels; c += static_cast<int>(blockDim.x)) {
    const int group = c / static_cast<int>(work.group_channels);
    const double inverse = args.statistics[2 * (tile.first_group + group) + 1];
    const double c2 = -inverse * inverse * shared.groups[group].weighted;
    shared.gradients[2 * c] = static_cast<F>(c2);
    shared.gradients[2 * c + 1] = static_cast<F>(c2 * shared.channels[c].rest - shared.groups[group].plain);
  }
  __syncthreads();

  F m[lanes], a[lanes], b[lanes], c2[lanes], c3[lanes];
  for_each_batch<width, channels_last>(
      work, tile, slices,
      [&](int channel) {
#pragma unroll
        for (int l = 0; l < lanes; ++l) {
          m[l] = shared.channels[channel + l].m;
          a[l] = shared.channels[channel + l].a;
          b[l] = shared.channels[channel + l].b;
          c2[l] = shared.gradients[2 * (channel + l)];
          c3[l] = shared.gradients[2 * (channel + l) + 1];
        }
      },
      [&](const GroupNormBatch& batch) {
        RawVector<T, width> raw_x[batch_vectors], raw_grad[batch_vectors];
        if (kept) {
#pragma unroll
          for (int i = 0; i < batch_vectors; ++i) {
            if (!batch.has(i)) break;
            raw_x[i].load(shared.x + (batch.at + i * batch.step - tile.at));
            raw_grad[i].load(shared.grad_y + (batch.at + i * batch.step - tile.at));
          }
        } else {
          load_batch(x, batch, raw_x);
          load_batch(grad_y, batch, raw_grad);
        }
#pragma unroll
        for (int i = 0; i < batch_vectors; ++i) {
          if (!batch.has(i)) break;
          F value[width], grad[width];
          raw_x[i].unpack(value);
          raw_grad[i].unpack(grad);
#pragma unroll
          for (int l = 0; l < width; ++l) {
            const int c = channels_last ? l : 0;
            const F d = P::sub(value[l], m[c]), dt = gradient_of_argument<T>(with_silu, grad[l], d, a[c], b[c]);
            value[l] = P::fma(a[c], dt, P::fma(c2[c], d, c3[c]));
          }
          RawVector<T, width>::store(grad_x + batch.at + i * batch.step, value);
        }
      },
      [](int, int, bool) {});
}

template <class T>
__device__ __forceinline__ void store_value(void* tensor, DType dtype, std::int64_t at, double value) {
  if (tensor == nullptr) return;
  if (std::is_same_v<T, double> && dtype == DType::float64) {
    static_cast<double*>(tensor)[at] = value;
  } else if (dtype == DType::float32) {
    static_cast<float*>(tensor)[at] = static_cast<float>(value);
  } else {
    from_arithmetic(static_cast<typename Arithmetic<T>::F>(value), static_cast<T*>(tensor)[at]);
  }
}

// The gradients of a channel's values, from its sums over all pixels and those of its group.
template <class T>
__device__ __forceinline__ void finish_channel(const GroupNormBackward& args, const GroupNormWork& work,
                                               std::int64_t channel, const double (&sum)[channel_sums],
                                               const GroupSums& group, double* of_samples) {
  const std::int64_t sample = channel / work.sample_channels, c = channel - sample * work.sample_channels;
  const double* const statistics = args.statistics + 2 * (channel / work.group_channels);
  const double inverse = statistics[1], rest = channel_coefficients<T>(args, sample, c, statistics[0], inverse).rest;
  const double weight = channel_value<T>(args.weight, sample, c, 1), bias = channel_value<T>(args.bias, sample, c, 0);
  const double scale = 1 + channel_value<T>(args.scale, sample, c, 0), pixels = static_cast<double>(work.pixels);
  const double plain = sum[0], weighted = inverse * (sum[1] + rest * plain), xhat = inverse * (sum[2] + rest * pixels);
  store_value<T>(args.grad_shift, args.shift.dtype, channel, plain);
  store_value<T>(args.grad_scale, args.scale.dtype, channel, weight * weighted + bias * plain);
  store_value<T>(args.grad_bias_in, args.bias_in.dtype, channel,
                 inverse * (weight * scale * plain - group.weighted * xhat) - pixels * group.plain);
  const std::int64_t all = work.rows * work.channels;
  of_samples[channel] = scale * plain;
  of_samples[all + channel] = scale * weighted;
}

template <class T, int width, bool channels_last>
__global__ void __launch_bounds__(block_threads, 2)
    group_norm_backward_gather_kernel(const __grid_constant__ GroupNormBackward args,
                                      const __grid_constant__ GroupNormWork work,
                                      const BackwardSpace<typename Arithmetic<T>::F> space, bool with_values) {
  Arrays<> arrays{ptx::dynamic_shared<unsigned char>()};
  const auto shared = backward_shared<T>(arrays, work, GroupNormPhase::gather, false);
  for (std::int64_t block = blockIdx.x; block < work.blocks(); block += gridDim.x) {
    const GroupNormTile tile = tile_of_block<channels_last>(work, block, work.slices);
    set_coefficients<T>(args, work, tile, shared.channels);
    gather_sums<T, width, channels_last>(args, work, tile, 1, shared, false, [&](int group, int) -> GroupSums& {
      return space.parts[(tile.first_group + group) * work.parts() + tile.part];
    });
    if (with_values) {
      const std::int64_t all = work.rows * work.channels;
      for (int i = static_cast<int>(threadIdx.x); i < channel_sums * tile.channels; i += block_threads) {
        const int q = i / tile.channels, c = i - q * tile.channels;
        space.sums[(q * work.slices + tile.slice) * all + tile.first_channel + c] = shared.sums[channel_sums * c + q];
      }
    }
    __syncthreads();
  }
}

template <class T, int width, bool channels_last>
__global__ void __launch_bounds__(block_threads, 2)
    group_norm_backward_scatter_kernel(const __grid_constant__ GroupNormBackward args,
                                       const __grid_constant__ GroupNormWork work, const GroupSums* parts) {
  Arrays<> arrays{ptx::dynamic_shared<unsigned char>()};
  const auto shared = backward_shared<T>(arrays, work, GroupNormPhase::scatter, false);
  const std::int64_t blocks = work.blocks();
  for (std::int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    // Backwards: what was read last is still in the cache.
    const GroupNormTile tile = tile_of_block<channels_last>(work, blocks - 1 - block, work.slices);
    merge_sums(work, tile.groups, shared.groups,
               [&](int group) { return parts + (tile.first_group + group) * work.parts(); });
    set_coefficients<T>(args, work, tile, shared.channels);
    scatter_gradient<T, width, channels_last>(args, work, tile, 1, shared, false);
    __syncthreads();
  }
}

template <class T, int width, bool channels_last>
__global__ void __launch_bounds__(channels_last ? block_threads : whole_threads, channels_last ? 2 : 1)
    group_norm_backward_whole_kernel(const __grid_constant__ GroupNormBackward args,
                                     const __grid_constant__ GroupNormWork work, double* of_samples, bool with_values) {
  constexpr bool keep = !channels_last;
  Arrays<> arrays{ptx::dynamic_shared<unsigned char>()};
  const auto shared = backward_shared<T>(arrays, work, GroupNormPhase::whole, keep);
  const int slices = static_cast<int>(work.slices);
  for (std::int64_t block = blockIdx.x; block < work.rows * work.tiles; block += gridDim.x) {
    const GroupNormTile tile = tile_of_block<channels_last>(work, block, 1);
    set_coefficients<T>(args, work, tile, shared.channels);
    gather_sums<T, width, channels_last>(
        args, work, tile, slices, shared, keep,
        [&](int group, int slice) -> GroupSums& { return shared.parts[group * slices + slice]; });
    __syncthreads();
    merge_sums(work, tile.groups, shared.groups, [&](int group) { return shared.parts + group * slices; });
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.x); with_values && c < tile.channels; c += static_cast<int>(blockDim.x)) {
      double sum[channel_sums] = {};
      for (int slice = 0; slice < slices; ++slice) {
#pragma unroll
        for (int q = 0; q < channel_sums; ++q) sum[q] += shared.sums[channel_sums * (slice * tile.channels + c) + q];
      }
      finish_channel<T>(args, work, tile.first_channel + c, sum,
                        shared.groups[c / static_cast<int>(work.group_channels)], of_samples);
    }
    if (args.grad_x != nullptr) scatter_gradient<T, width, channels_last>(args, work, tile, slices, shared, keep);
    __syncthreads();
  }
}

// Rows of a table are summed per column, by blocks of a few columns: rows i, i + rows_at_once, ... by one thread each,
// then those in order. A block that has all slices of a tile, which are no more than that, adds them in the same order.
constexpr int columns_at_once = 8, rows_at_once = block_threads / columns_at_once;

// For the thread with the first row: the sums over n rows of load(q, row), in `sum`.
template <int count, class Load>
__device__ __forceinline__ void sum_rows(std::int64_t n, double (&sum)[count], Load&& load) {
  __shared__ double of_rows[rows_at_once][columns_at_once][count];
  const int column = static_cast<int>(threadIdx.x) % columns_at_once;
  const int first = static_cast<int>(threadIdx.x) / columns_at_once;
#pragma unroll
  for (int q = 0; q < count; ++q) sum[q] = 0;
  for (std::int64_t row = first; row < n; row += rows_at_once) {
#pragma unroll
    for (int q = 0; q < count; ++q) sum[q] += load(q, row);
  }
#pragma unroll
  for (int q = 0; q < count; ++q) of_rows[first][column][q] = sum[q];
  __syncthreads();
  for (int row = 1; first == 0 && row < rows_at_once; ++row) {
#pragma unroll
    for (int q = 0; q < count; ++q) sum[q] += of_rows[row][column][q];
  }
}

template <class T>
__global__ void __launch_bounds__(block_threads, 2)
    group_norm_channels_kernel(const __grid_constant__ GroupNormBackward args,
                               const __grid_constant__ GroupNormWork work,
                               const BackwardSpace<typename Arithmetic<T>::F> space) {
  __shared__ GroupSums groups[columns_at_once];
  const std::int64_t all = work.rows * work.channels, of_group = work.group_channels;
  for (std::int64_t start = blockIdx.x * std::int64_t{columns_at_once}; start < all;
       start += gridDim.x * std::int64_t{columns_at_once}) {
    const std::int64_t rest = all - start, last = start + (rest < columns_at_once ? rest : columns_at_once) - 1;
    const std::int64_t channel = start + threadIdx.x % columns_at_once, first_group = start / of_group;
    if (args.grad_bias_in != nullptr) {
      merge_sums(work, static_cast<int>(last / of_group - first_group) + 1, groups,
                 [&](int group) { return space.parts + (first_group + group) * work.parts(); });
    } else if (threadIdx.x < columns_at_once) {
      groups[threadIdx.x] = {0, 0};
    }
    double sum[channel_sums];
    sum_rows(work.slices, sum, [&](int q, std::int64_t slice) {
      return channel <= last ? static_cast<double>(space.sums[(q * work.slices + slice) * all + channel]) : 0;
    });
    if (threadIdx.x < columns_at_once && channel <= last) {
      finish_channel<T>(args, work, channel, sum, groups[channel / of_group - first_group], space.of_samples);
    }
    __syncthreads();
  }
}

// grad_weight and grad_bias: sums over samples.
template <class T, class Args>
__global__ void __launch_bounds__(block_threads, 2)
    group_norm_samples_kernel(const __grid_constant__ Args args, const double* of_samples) {
  const std::int64_t samples = args.shape.samples, channels = args.shape.channels;
  for (std::int64_t start = blockIdx.x * std::int64_t{columns_at_once}; start < channels;
       start += gridDim.x * std::int64_t{columns_at_once}) {
    const std::int64_t channel = start + threadIdx.x % columns_at_once;
    double sum[2];
    sum_rows(samples, sum, [&](int q, std::int64_t sample) {
      return channel < channels ? of_samples[(q * samples + sample) * channels + channel] : 0;
    });
    if (threadIdx.x < columns_at_once && channel < channels) {
      store_value<T>(args.grad_bias, args.bias.dtype, channel, sum[0]);
      store_value<T>(args.grad_weight, args.weight.dtype, channel, sum[1]);
    }
    __syncthreads();
  }
}

}  // namespace gencore::cuda
