// The forward pass of group normalization: one kernel where a block can keep whole groups, else one that gathers the
// moments of parts of groups and one that merges them and writes y.
#pragma once

#include "group_norm_work.cuh"

namespace gencore::cuda {

// Mean and sum of squared deviations of a part of a group.
struct GroupNormMoments {
  double mean, m2;
};

// Those of a strand of a channel. One of its values is the center; the deviations from that have the sum `sum + error`.
template <class F>
struct StrandMoments {
  F center, sum, error, m2;
};

// sum + error += value. The rounding of a float32 mean would be seen in what lies near it, so nothing is lost here
// (Knuth's TwoSum); a few values of a half type have sums that are nearly exact.
template <class T, class F>
__device__ __forceinline__ void add_exactly(F value, F& sum, F& error) {
  using P = Arithmetic<T>;
  const F before = sum;
  sum = P::add(before, value);
  if constexpr (sizeof(T) == 4) {
    const F added = P::sub(sum, before);
    error = P::add(error, P::add(P::sub(before, P::sub(sum, added)), P::sub(value, added)));
  }
}

struct GroupNormStatistics {
  double mean, inverse;
};

// The shared memory of a block. The moments of parts are here if the block has all of them.
template <class T>
struct ForwardShared {
  using F = typename Arithmetic<T>::F;
  T* x;
  GroupNormMoments* parts;
  GroupNormStatistics* statistics;
  ChannelCoefficients<F>* channels;
  StrandMoments<F>* strands;
};

// Gives places to one array after the other, from a base on; without one (nullptr_t) it counts the bytes.
template <class Base = unsigned char*>
struct Arrays {
  Base base;
  std::uintptr_t bytes = 0;

  template <class U>
  __host__ __device__ void place(U*& array, std::int64_t n) {
    if constexpr (std::is_pointer_v<Base>) array = reinterpret_cast<U*>(base + bytes);
    bytes += (static_cast<std::uintptr_t>(n) * sizeof(U) + 15) / 16 * 16;
  }
};

enum class GroupNormPhase { gather, scatter, whole };

template <class T, class Base>
__host__ __device__ ForwardShared<T> forward_shared(Arrays<Base>& arrays, const GroupNormWork& work,
                                                    GroupNormPhase phase, bool keep) {
  const bool gathers = phase != GroupNormPhase::scatter, whole = phase == GroupNormPhase::whole;
  const std::int64_t slices = whole ? work.slices : 1;
  ForwardShared<T> shared{};
  arrays.place(shared.x, keep ? work.tile_channels * work.pixels : 0);
  arrays.place(shared.parts, whole ? work.tile_groups * slices : 0);
  arrays.place(shared.statistics, phase == GroupNormPhase::gather ? 0 : work.tile_groups);
  arrays.place(shared.channels, work.tile_channels);
  arrays.place(shared.strands, gathers ? work.tile_channels * work.strands * slices : 0);
  return shared;
}

// The moments of the groups of a tile, for each of its slices: part(group, slice) says where to.
template <class T, int width, bool channels_last, class Part>
__device__ __forceinline__ void gather_moments(const GroupNorm& args, const GroupNormWork& work,
                                               const GroupNormTile& tile, int slices, const ForwardShared<T>& shared,
                                               bool keep, Part&& part) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  constexpr int lanes = vector_channels<width, channels_last>;
  const T* const x = static_cast<const T*>(args.x);
  F center[lanes], sum[lanes], error[lanes], m2[lanes];
  bool begun = false;
  for_each_batch<width, channels_last>(
      work, tile, slices,
      [&](int) {
        begun = false;
#pragma unroll
        for (int l = 0; l < lanes; ++l) center[l] = sum[l] = error[l] = m2[l] = 0;
      },
      [&](const GroupNormBatch& batch) {
        RawVector<T, width> raw[batch_vectors];
        load_batch(x, batch, raw);
        if constexpr (channels_last) {
          if (!begun) raw[0].unpack(center);
          begun = true;
      // As a strand has few pixels, sums of deviations from one of them, and of their squares, cancel little.
#pragma unroll
          for (int i = 0; i < batch_vectors; ++i) {
            if (!batch.has(i)) break;
            F value[width];
            raw[i].unpack(value);
#pragma unroll
            for (int l = 0; l < width; ++l) {
              const F d = P::sub(value[l], center[l]);
              add_exactly<T>(d, sum[l], error[l]);
              m2[l] = P::fma(d, d, m2[l]);
            }
          }
        } else {
          // The team has all pixels of its strand in registers: first their mean, then the squares.
          F d[batch_vectors][width];
          int count = 0;
#pragma unroll
          for (int i = 0; i < batch_vectors; ++i) {
            if (batch.has(i)) {
              raw[i].unpack(d[i]);
              if (keep) raw[i].keep(shared.x + (batch.at + i * batch.step - tile.at));
              count += width;
            } else {
#pragma unroll
              for (int l = 0; l < width; ++l) d[i][l] = 0;
            }
          }
          center[0] = __shfl_sync(0xFFFFFFFFu, d[0][0], 0, 1 << work.team_log2);
#pragma unroll
          for (int i = 0; i < batch_vectors; ++i) {
#pragma unroll
            for (int l = 0; l < width; ++l) {
              d[i][l] = P::sub(d[i][l], center[0]);
              if (batch.has(i)) add_exactly<T>(d[i][l], sum[0], error[0]);
            }
          }
          const double total = team_sum(static_cast<double>(sum[0]) + error[0], work.team_log2);
          sum[0] = static_cast<F>(total);
          error[0] = static_cast<F>(total - sum[0]);
          const F mean = P::div(sum[0], F(team_sum(count, work.team_log2)));
#pragma unroll
          for (int i = 0; i < batch_vectors; ++i) {
#pragma unroll
            for (int l = 0; l < width; ++l) {
              const F deviation = P::sub(d[i][l], mean);
              if (batch.has(i)) m2[0] = P::fma(deviation, deviation, m2[0]);
            }
          }
          m2[0] = team_sum(m2[0], work.team_log2);
        }
      },
      [&](int channel, int place, bool first) {
        StrandMoments<F>* const strand = shared.strands + place + channel;
        if constexpr (channels_last) {
          const int number = place / tile.channels;
          const F n = F(pixels_of_strand<width, channels_last>(work, pixels_of_slice(work, tile.slice), number));
#pragma unroll
          for (int l = 0; l < lanes; ++l) {
            const F rest = P::fma(P::sub(0, sum[l]), P::div(sum[l], n), m2[l]);
            // Rounding may leave less than nothing; NaN stays.
            strand[l] = {center[l], sum[l], error[l], rest < 0 ? F(0) : rest};
          }
        } else if (first) {
          *strand = {center[0], sum[0], error[0], m2[0]};
        }
      });

  for (int c = static_cast<int>(threadIdx.x); c < tile.channels; c += static_cast<int>(blockDim.x)) {
    const std::int64_t channel = tile.first_channel + c, sample = channel / work.sample_channels;
    const double bias = channel_value<T>(args.bias_in, sample, channel - sample * work.sample_channels, 0);
    shared.channels[c].m = static_cast<F>(bias);
  }
  __syncthreads();

  for_each_by_teams(work.group_team_log2, tile.groups * slices, [&](int unit, int lane, bool valid) {
    const int slice = unit / tile.groups, group = unit - slice * tile.groups;
    const int channels = tile.channels / tile.groups, terms = valid ? channels * work.strands : 0;
    const int pixels = pixels_of_slice(work, tile.slice + slice), team = 1 << work.group_team_log2;
    const auto each = [&](auto&& body) {
      for (int i = lane; i < terms; i += team) {
        const int strand = i / channels, c = group * channels + i - strand * channels;
        const int n = pixels_of_strand<width, channels_last>(work, pixels, strand);
        const StrandMoments<F>& of = shared.strands[(strand * slices + slice) * tile.channels + c];
        if (n > 0) body(of, static_cast<double>(of.center) + shared.channels[c].m, n);
      }
    };
    double sum = 0;
    each([&](const StrandMoments<F>& of, double center, int n) { sum += n * center + of.sum + of.error; });
    const double mean = team_sum(sum, work.group_team_log2) / (static_cast<double>(pixels) * channels);
    F m2 = 0;
    each([&](const StrandMoments<F>& of, double center, int n) {
      const F deviation = P::add(static_cast<F>(center - mean), P::div(of.sum, F(n)));
      m2 = P::add(m2, P::fma(P::mul(F(n), deviation), deviation, of.m2));
    });
    m2 = team_sum(m2, work.group_team_log2);
    if (valid && lane == 0) part(group, slice) = {mean, m2};
  });
}

// Merges the parts of the groups of a tile: mean and 1 / standard deviation, in shared memory.
template <class T, class Parts>
__device__ __forceinline__ void merge_moments(const GroupNorm& args, const GroupNormWork& work,
                                              const GroupNormTile& tile, const ForwardShared<T>& shared, bool write,
                                              Parts&& parts) {
  for_each_by_teams(work.part_team_log2, tile.groups, [&](int group, int lane, bool valid) {
    const GroupNormMoments* const part = parts(group);
    const int n = static_cast<int>(work.parts()), team = 1 << work.part_team_log2;
    const int of_group = static_cast<int>(work.tiles_per_group);
    const double base = part[0].mean, all = static_cast<double>(work.group_channels) * static_cast<double>(work.pixels);
    const auto each = [&](auto&& body) {
      for (int p = lane; p < n; p += team) {
        const int slice = p / of_group;
        const std::int64_t rest = work.group_channels - std::int64_t{p - slice * of_group} * work.tile_channels;
        const std::int64_t channels = of_group > 1 && rest > work.tile_channels ? work.tile_channels : rest;
        body(part[p], static_cast<double>(channels) * pixels_of_slice(work, slice));
      }
    };
    double sum = 0, m2 = 0;
    each([&](const GroupNormMoments& of, double count) { sum += count * (of.mean - base); });
    const double mean = team_sum(sum, work.part_team_log2) / all;
    each([&](const GroupNormMoments& of, double count) {
      const double deviation = of.mean - base - mean;
      m2 += of.m2 + count * deviation * deviation;
    });
    m2 = team_sum(m2, work.part_team_log2);
    if (!valid || lane != 0) return;
    const GroupNormStatistics statistics{base + mean, 1 / sqrt(m2 / all + args.eps)};
    shared.statistics[group] = statistics;
    if (write && args.statistics != nullptr) {
      args.statistics[2 * (tile.first_group + group)] = statistics.mean;
      args.statistics[2 * (tile.first_group + group) + 1] = statistics.inverse;
    }
  });
}

// Writes y, from x or what was kept of it.
template <class T, int width, bool channels_last>
__device__ __forceinline__ void scatter_normalized(const GroupNorm& args, const GroupNormWork& work,
                                                   const GroupNormTile& tile, int slices,
                                                   const ForwardShared<T>& shared, bool kept) {
  using P = Arithmetic<T>;
  using F = typename P::F;
  constexpr int lanes = vector_channels<width, channels_last>;
  for (int c = static_cast<int>(threadIdx.x); c < tile.channels; c += static_cast<int>(blockDim.x)) {
    const int group = c / static_cast<int>(work.group_channels);
    const std::int64_t channel = tile.first_channel + c, sample = channel / work.sample_channels;
    const GroupNormStatistics& of = shared.statistics[group];
    shared.channels[c] =
        channel_coefficients<T>(args, sample, channel - sample * work.sample_channels, of.mean, of.inverse);
  }
  __syncthreads();

  const bool with_silu = args.activation == Activation::silu;
  const T* const x = static_cast<const T*>(args.x);
  T* const y = static_cast<T*>(args.y);
  F m[lanes], a[lanes], b[lanes];
  for_each_batch<width, channels_last>(
      work, tile, slices,
      [&](int channel) {
#pragma unroll
        for (int l = 0; l < lanes; ++l) {
          m[l] = shared.channels[channel + l].m;
          a[l] = shared.channels[channel + l].a;
          b[l] = shared.channels[channel + l].b;
        }
      },
      [&](const GroupNormBatch& batch) {
        RawVector<T, width> raw[batch_vectors];
        if (kept) {
#pragma unroll
          for (int i = 0; i < batch_vectors; ++i) {
            if (batch.has(i)) raw[i].load(shared.x + (batch.at + i * batch.step - tile.at));
          }
        } else {
          load_batch(x, batch, raw);
        }
#pragma unroll
        for (int i = 0; i < batch_vectors; ++i) {
          if (!batch.has(i)) break;
          F value[width];
          raw[i].unpack(value);
#pragma unroll
          for (int l = 0; l < width; ++l) {
            const int c = channels_last ? l : 0;
            value[l] = P::fma(P::sub(value[l], m[c]), a[c], b[c]);
          }
          if (with_silu) {
#pragma unroll
            for (int l = 0; l < width; ++l) value[l] = silu_of<T>(value[l]);
          }
          RawVector<T, width>::store(y + batch.at + i * batch.step, value);
        }
      },
      [](int, int, bool) {});
}

template <class T, int width, bool channels_last>
__global__ void __launch_bounds__(block_threads, 2)
    group_norm_gather_kernel(const __grid_constant__ GroupNorm args, const __grid_constant__ GroupNormWork work,
                             GroupNormMoments* parts) {
  Arrays<> arrays{ptx::dynamic_shared<unsigned char>()};
  const auto shared = forward_shared<T>(arrays, work, GroupNormPhase::gather, false);
  for (std::int64_t block = blockIdx.x; block < work.blocks(); block += gridDim.x) {
    const GroupNormTile tile = tile_of_block<channels_last>(work, block, work.slices);
    gather_moments<T, width, channels_last>(args, work, tile, 1, shared, false,
                                            [&](int group, int) -> GroupNormMoments& {
                                              return parts[(tile.first_group + group) * work.parts() + tile.part];
                                            });
    __syncthreads();
  }
}

template <class T, int width, bool channels_last>
__global__ void __launch_bounds__(block_threads, 2)
    group_norm_scatter_kernel(const __grid_constant__ GroupNorm args, const __grid_constant__ GroupNormWork work,
                              const GroupNormMoments* parts) {
  Arrays<> arrays{ptx::dynamic_shared<unsigned char>()};
  const auto shared = forward_shared<T>(arrays, work, GroupNormPhase::scatter, false);
  const std::int64_t blocks = work.blocks();
  for (std::int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    // Backwards: what was read last is still in the cache.
    const GroupNormTile tile = tile_of_block<channels_last>(work, blocks - 1 - block, work.slices);
    merge_moments<T>(args, work, tile, shared, tile.part == 0,
                     [&](int group) { return parts + (tile.first_group + group) * work.parts(); });
    __syncthreads();
    scatter_normalized<T, width, channels_last>(args, work, tile, 1, shared, false);
    __syncthreads();
  }
}

// Most threads of a block that has whole groups.
constexpr int whole_threads = 512;

template <class T, int width, bool channels_last>
__global__ void __launch_bounds__(channels_last ? block_threads : whole_threads, channels_last ? 2 : 1)
    group_norm_whole_kernel(const __grid_constant__ GroupNorm args, const __grid_constant__ GroupNormWork work) {
  constexpr bool keep = !channels_last;
  Arrays<> arrays{ptx::dynamic_shared<unsigned char>()};
  const auto shared = forward_shared<T>(arrays, work, GroupNormPhase::whole, keep);
  const int slices = static_cast<int>(work.slices);
  for (std::int64_t block = blockIdx.x; block < work.rows * work.tiles; block += gridDim.x) {
    const GroupNormTile tile = tile_of_block<channels_last>(work, block, 1);
    gather_moments<T, width, channels_last>(
        args, work, tile, slices, shared, keep,
        [&](int group, int slice) -> GroupNormMoments& { return shared.parts[group * slices + slice]; });
    __syncthreads();
    merge_moments<T>(args, work, tile, shared, true, [&](int group) { return shared.parts + group * slices; });
    __syncthreads();
    scatter_normalized<T, width, channels_last>(args, work, tile, slices, shared, keep);
    __syncthreads();
  }
}

}  // namespace gencore::cuda
