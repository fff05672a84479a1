// How the work of group normalization is cut, and how a thread goes through its part of a tensor.
//
// A block takes a tile of channels and a slice of their pixels. A tile has whole groups, or is a part of one that has
// too many channels. The cut depends on the shape of a sample alone, not on how many there are, nor on the GPU; and a
// block that takes all slices of a tile sums what several would in the same order.
#pragma once

#include <numeric>

#include "gencore/group_norm.h"
#include "lane.cuh"
#include "launch.cuh"

namespace gencore::cuda {

// Vectors of a tensor that a thread has under way at a time.
constexpr int batch_vectors = 4;
constexpr int most_tile_channels = 1024;

struct GroupNormWork {
  // Rows of `channels` channels: samples; of contiguous tensors, where groups follow each other through all samples in
  // the same way, one row.
  std::int64_t rows, channels, groups, pixels;
  std::int64_t sample_channels, group_channels;
  // The tiles of a row, the slices of a tile. 1 tile per group if tiles have whole groups.
  std::int64_t tiles, slices, tiles_per_group;
  int slice_pixels, tile_groups, tile_channels;
  // The pixels of a channel in a slice are summed in as many strands, each by a team of 2^team_log2 threads.
  int strands, team_log2;
  // The teams that sum over what a block has of a group, over the parts of a group, and over the slices of a channel.
  int group_team_log2, part_team_log2, slice_team_log2;

  // What there is of a group: as many blocks look at it.
  __host__ __device__ std::int64_t parts() const { return slices * tiles_per_group; }
  __host__ __device__ std::int64_t blocks() const { return rows * tiles * slices; }
};

inline int log2_at_most_warp(std::int64_t n) {
  int log2 = 0;
  while (1 << log2 < warp_threads && 1 << log2 < n) ++log2;
  return log2;
}

// Whether the vectors of `shape` lie in one group-aligned tile or channel each, wherever the tensor begins.
template <class T>
bool has_vectors(const GroupNormShape& shape, bool channels_last) {
  constexpr int size = std::is_same_v<T, double> ? 1 : Vector<T>::size;
  const std::int64_t of_group = shape.channels / shape.groups;
  if (!channels_last) return shape.pixels % size == 0;
  return shape.channels % size == 0 &&
         (of_group % size == 0 || std::lcm(of_group, std::int64_t{size}) <= most_tile_channels);
}

template <class T, int width, bool channels_last>
GroupNormWork make_group_norm_work(const GroupNormShape& shape) {
  constexpr std::int64_t element = sizeof(T), block_bytes = 16 << 10, most_bytes = 256 << 10;
  const std::int64_t of_group = shape.channels / shape.groups;
  // Large samples have larger blocks: every block reads what all made of its groups.
  const std::int64_t bytes = std::clamp(shape.channels * shape.pixels * element / 2048, block_bytes, most_bytes);
  GroupNormWork work{};
  work.rows = channels_last ? shape.samples : 1;
  work.channels = channels_last ? shape.channels : shape.samples * shape.channels;
  work.groups = channels_last ? shape.groups : shape.samples * shape.groups;
  work.pixels = shape.pixels;
  work.sample_channels = shape.channels;
  work.group_channels = of_group;
  work.tiles_per_group = 1;
  std::int64_t tile_groups = 1, tile_channels, slice;
  const auto split_group = [&](std::int64_t most) {
    tile_channels = (of_group + most - 1) / most;
    tile_channels = (of_group + tile_channels - 1) / tile_channels;
    tile_channels = (tile_channels + width - 1) / width * width;
    work.tiles_per_group = (of_group + tile_channels - 1) / tile_channels;
  };
  if constexpr (channels_last) {
    // Rows of a tile have 256 bytes or more, and begin at a vector.
    const std::int64_t most = std::min(most_tile_channels, block_threads * width);
    const std::int64_t least_groups = width / std::gcd(of_group, std::int64_t{width});
    const std::int64_t unit = least_groups * of_group;
    if (unit > most) {
      split_group(most);
    } else {
      const std::int64_t wanted = std::min((256 + unit * element - 1) / (unit * element), most / unit);
      tile_groups = std::min(least_groups * wanted, shape.groups);
      tile_channels = tile_groups * of_group;
    }
    // A thread has a vector of channels and every strands-th pixel of the slice.
    work.strands = block_threads / static_cast<int>(tile_channels / width);
    std::int64_t rounds = batch_vectors;
    while (rounds < 64 && rounds * block_threads * width * element < bytes) rounds *= 2;
    slice = std::max<std::int64_t>(rounds, 8) * work.strands;
    if (slice < shape.pixels) slice = rounds * work.strands;
  } else {
    constexpr std::int64_t most = 128, segment = 128 / element;
    tile_channels = of_group;
    if (of_group > most) split_group(most);
    for (slice = segment; slice * tile_channels * element < bytes && slice < shape.pixels;) slice *= 2;
    if (slice >= shape.pixels && work.tiles_per_group == 1) {
      tile_groups = std::clamp<std::int64_t>(block_bytes / (of_group * shape.pixels * element), 1, 4 * most / of_group);
      tile_channels = tile_groups * of_group;
    }
    // A team has a batch of vectors per thread.
    const std::int64_t vectors = std::min(slice, shape.pixels) / width;
    work.team_log2 = log2_at_most_warp((vectors + batch_vectors - 1) / batch_vectors);
    const std::int64_t of_team = batch_vectors << work.team_log2;
    work.strands = static_cast<int>((vectors + of_team - 1) / of_team);
  }
  work.slice_pixels = static_cast<int>(std::min(slice, shape.pixels));
  work.slices = (shape.pixels + slice - 1) / slice;
  work.tile_groups = static_cast<int>(tile_groups);
  work.tile_channels = static_cast<int>(tile_channels);
  work.tiles =
      work.tiles_per_group > 1 ? work.groups * work.tiles_per_group : (work.groups + tile_groups - 1) / tile_groups;
  work.group_team_log2 = log2_at_most_warp(std::min(of_group, tile_channels) * work.strands);
  work.part_team_log2 = log2_at_most_warp(work.parts());
  work.slice_team_log2 = log2_at_most_warp(work.slices);
  return work;
}

// What a block works on. Channels and groups are numbered through all samples.
struct GroupNormTile {
  std::int64_t first_channel, first_group, slice, part;
  // Elements of the tensor: the first one here, the first one of the group here.
  std::int64_t at, group_at;
  int channels, groups;
};

template <bool channels_last>
__device__ __forceinline__ GroupNormTile tile_of_block(const GroupNormWork& work, std::int64_t block,
                                                       std::int64_t slices) {
  // Neighbouring blocks have neighbouring memory.
  std::int64_t number, row = 0;
  GroupNormTile tile;
  if constexpr (channels_last) {
    number = block % work.tiles;
    tile.slice = block / work.tiles % slices;
    row = block / work.tiles / slices;
  } else {
    tile.slice = block % slices;
    number = block / slices;
  }
  std::int64_t group, skipped = 0;
  tile.part = tile.slice;
  if (work.tiles_per_group == 1) {
    group = number * work.tile_groups;
    const std::int64_t rest = work.groups - group;
    tile.groups = static_cast<int>(rest < work.tile_groups ? rest : work.tile_groups);
    tile.channels = tile.groups * static_cast<int>(work.group_channels);
  } else {
    group = number / work.tiles_per_group;
    const std::int64_t of_group = number % work.tiles_per_group;
    tile.part = tile.part * work.tiles_per_group + of_group;
    skipped = of_group * work.tile_channels;
    const std::int64_t rest = work.group_channels - skipped;
    tile.groups = 1;
    tile.channels = static_cast<int>(rest < work.tile_channels ? rest : work.tile_channels);
  }
  const std::int64_t channel = group * work.group_channels;
  tile.first_group = row * work.groups + group;
  tile.first_channel = row * work.channels + channel + skipped;
  tile.group_at = channels_last ? row * work.pixels * work.channels + channel : channel * work.pixels;
  tile.at = tile.group_at + (channels_last ? skipped : skipped * work.pixels);
  return tile;
}

__device__ __forceinline__ int pixels_of_slice(const GroupNormWork& work, std::int64_t slice) {
  const std::int64_t rest = work.pixels - slice * work.slice_pixels;
  return static_cast<int>(rest < work.slice_pixels ? rest : work.slice_pixels);
}

// How many of `pixels` pixels of a channel a strand has.
template <int width, bool channels_last>
__device__ __forceinline__ int pixels_of_strand(const GroupNormWork& work, int pixels, int strand) {
  if constexpr (channels_last) return (pixels - strand + work.strands - 1) / work.strands;
  const int most = (batch_vectors << work.team_log2) * width, rest = pixels - strand * most;
  return rest < 0 ? 0 : rest < most ? rest : most;
}

// Calls body(i, lane, valid) for the i in [0, n) that fall to this thread's team of 2^log2 threads, with whole warps:
// the body may use the functions of a warp. Where nothing is left for a team, valid is false and i a valid number.
template <class Number, class Body>
__device__ __forceinline__ void for_each_by_teams(int log2, Number n, Body&& body) {
  const int in_warp = static_cast<int>(threadIdx.x) % warp_threads, warp = static_cast<int>(threadIdx.x) - in_warp;
  for (Number first = warp >> log2; first < n; first += static_cast<int>(blockDim.x) >> log2) {
    const Number i = first + (in_warp >> log2);
    body(i < n ? i : n - 1, in_warp & ((1 << log2) - 1), i < n);
  }
}

// The sum over a team of 2^log2 threads, for all of them.
template <class F>
__device__ __forceinline__ F team_sum(F value, int log2) {
  for (int distance = 1 << log2 >> 1; distance > 0; distance >>= 1) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  }
  return value;
}

// Some of a thread's vectors: of a channel's neighbouring pixels or, in channels_last, of a pixel's neighbouring
// channels.
struct GroupNormBatch {
  std::int64_t at, step;
  // Vector i is there if i * stride < left.
  int left, stride;

  __device__ __forceinline__ bool has(int i) const { return i * stride < left; }
};

// How many channels the values of a vector are of.
template <int width, bool channels_last>
constexpr int vector_channels = channels_last ? width : 1;

// Goes through `slices` slices of a tile: begin(channel), body(batch) once or more, end(channel, place, first), where
// channel is the first of those that the vectors are of. What was summed between belongs at `place` + channel of as
// many sums as strands x slices x channels; if not channels_last, body and end are called by whole warps, teams have to
// add up what their threads summed, and `first` says who of them may write.
template <int width, bool channels_last, class Begin, class Body, class End>
__device__ __forceinline__ void for_each_batch(const GroupNormWork& work, const GroupNormTile& tile, int slices,
                                               Begin&& begin, Body&& body, End&& end) {
  if constexpr (channels_last) {
    const int vectors = work.tile_channels / width, thread = static_cast<int>(threadIdx.x);
    const int strand = thread / vectors, channel = (thread - strand * vectors) * width;
    if (strand >= work.strands || channel >= tile.channels) return;
    const int pixels = pixels_of_slice(work, tile.slice);
    const std::int64_t step = work.strands * work.channels;
    std::int64_t at = tile.at + (tile.slice * work.slice_pixels + strand) * work.channels + channel;
    begin(channel);
    for (int pixel = strand; pixel < pixels; pixel += batch_vectors * work.strands) {
      body(GroupNormBatch{at, step, pixels - pixel, work.strands});
      at += batch_vectors * step;
    }
    end(channel, strand * tile.channels, true);
  } else {
    const int of_slice = tile.channels * work.strands, team = 1 << work.team_log2;
    for_each_by_teams(work.team_log2, slices * of_slice, [&](int task, int lane, bool valid) {
      const int slice = slices == 1 ? 0 : task / of_slice;
      const int channel = (task - slice * of_slice) / work.strands;
      const int strand = task - slice * of_slice - channel * work.strands;
      const int vector = strand * (batch_vectors * team) + lane;
      const int left = valid ? pixels_of_slice(work, tile.slice + slice) / width - vector : 0;
      begin(channel);
      body(GroupNormBatch{tile.at + channel * work.pixels + (tile.slice + slice) * work.slice_pixels + vector * width,
                          team * width, left, team});
      end(channel, (strand * slices + slice) * tile.channels, valid && lane == 0);
    });
  }
}

// A vector of a tensor as it lies in memory. The tensor may be written by the same kernel, so no read-only cache.
template <class T, int width>
struct RawVector {
  using Memory = typename Vector<T>::Memory;
  Memory raw;
  __device__ __forceinline__ void load(const T* p) { raw = *reinterpret_cast<const Memory*>(p); }
  __device__ __forceinline__ void keep(T* p) const { ptx::store_shared(reinterpret_cast<Memory*>(p), raw); }
  template <class F>
  __device__ __forceinline__ void unpack(F* x) const {
    Vector<T>::unpack(raw, x);
  }
  template <class F>
  static __device__ __forceinline__ void store(T* p, const F* x) {
    ptx::store(reinterpret_cast<Memory*>(p), Vector<T>::pack(x));
  }
};

template <class T>
struct RawVector<T, 1> {
  T raw;
  __device__ __forceinline__ void load(const T* p) { raw = *p; }
  __device__ __forceinline__ void keep(T* p) const { *p = raw; }
  template <class F>
  __device__ __forceinline__ void unpack(F* x) const {
    x[0] = to_arithmetic(raw);
  }
  template <class F>
  static __device__ __forceinline__ void store(T* p, const F* x) {
    from_arithmetic(x[0], *p);
  }
};

template <class T, int width>
__device__ __forceinline__ void load_batch(const T* tensor, const GroupNormBatch& batch,
                                           RawVector<T, width> (&raw)[batch_vectors]) {
#pragma unroll
  for (int i = 0; i < batch_vectors; ++i) {
    if (batch.has(i)) raw[i].load(tensor + batch.at + i * batch.step);
  }
}

// The value of a channel of a sample, `absent` if it is left out.
template <class T>
__device__ __forceinline__ double channel_value(const ChannelValues& values, std::int64_t sample, std::int64_t channel,
                                                double absent) {
  if (values.data == nullptr) return absent;
  const std::int64_t at = sample * values.stride + channel;
  if (values.dtype == DType::float32) return static_cast<double>(static_cast<const float*>(values.data)[at]);
  return static_cast<double>(to_arithmetic(static_cast<const T*>(values.data)[at]));
}

// What forward and backward pass compute with, per channel: with d = x - m, the argument of the activation is
// a d + b, and x + bias_in - mean = d + rest.
template <class F>
struct ChannelCoefficients {
  F m, a, b, rest;
};

template <class T, class Args>
__device__ __forceinline__ auto channel_coefficients(const Args& args, std::int64_t sample, std::int64_t channel,
                                                     double mean, double inverse) {
  using F = typename Arithmetic<T>::F;
  const double weight = channel_value<T>(args.weight, sample, channel, 1);
  const double bias = channel_value<T>(args.bias, sample, channel, 0);
  const double scale = 1 + channel_value<T>(args.scale, sample, channel, 0);
  const double shift = channel_value<T>(args.shift, sample, channel, 0);
  const double center = mean - channel_value<T>(args.bias_in, sample, channel, 0);
  const F m = static_cast<F>(center);
  const double rest = static_cast<double>(m) - center;
  return ChannelCoefficients<F>{m, static_cast<F>(inverse * weight * scale),
                                static_cast<F>((rest * inverse * weight + bias) * scale + shift), static_cast<F>(rest)};
}

// silu and its derivative for elements of type T.
template <class T>
__device__ __forceinline__ auto silu_of(typename Arithmetic<T>::F x) {
  return Silu<FunctionsOf<T>>().value(x);
}

template <class T>
__device__ __forceinline__ auto silu_derivative_of(typename Arithmetic<T>::F x) {
  return Silu<FunctionsOf<T>>().first(x);
}

}  // namespace gencore::cuda
