// Loops over the elements of a segment that know the channel of each: sums of some terms over every channel, and a pass
// that writes.
#pragma once

#include "channels.h"
#include "moments.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// A vector, of which all elements are inside the tensor if it is whole, else `width`.
template <class P, bool whole>
struct Part {
  using F = typename P::F;
  std::int64_t width;

  template <class E>
  F load(const E* p) const {
    return whole ? P::load(p) : load_part<P>(p, width);
  }
  template <class E>
  void store(E* p, F x) const {
    if constexpr (whole) {
      P::store(p, x);
    } else {
      store_part<P>(p, x, width);
    }
  }
};

// The sums of `terms` terms of each element over the pixels of every channel: in A over some tens of elements, then in
// binary64, in an order of the shape's alone.
template <class T, int terms>
struct ChannelSums {
  using P = Arithmetic<T>;
  using A = Accumulator<T>;
  using F = typename P::F;

  // Doubles that a segment's sums take: of its channel, or in channels_last of its columns.
  static std::int64_t per_segment(const Units& units) { return units.channels_last ? terms * units.row : terms; }

  // Sums over a segment. Calls add(part, sum, i, m, a, b) for every vector: of elements i and on of the unit, whose
  // channels have the values m, a and b; it adds the vector's terms to `sum`, an array of F.
  template <class Add>
  static void gather(const Units& units, const Channels<T>& channels, std::int64_t segment, double* into, Add&& add) {
    const std::int64_t first = units.first(segment), last = units.last(segment);
    if (units.channels_last) {
      std::fill(into, into + terms * units.row, 0.0);
      add_rows(units, channels, first, last, into, add);
    } else {
      std::fill(into, into + terms, 0.0);
      add_plane(channels, first / units.pixels, first, last, into, add);
    }
  }

  // The sums of the unit's channels, `terms` lists of as many, from those of its segments in order.
  static void of_channels(const Units& units, const double* segments, double* out) {
    std::fill(out, out + terms * units.channels, 0.0);
    for (std::int64_t segment = 0; segment < units.segments; ++segment, segments += per_segment(units)) {
      if (!units.channels_last) {
        const std::int64_t c = units.first(segment) / units.pixels;
        for (std::int64_t k = 0; k < terms; ++k) out[k * units.channels + c] += segments[k];
        continue;
      }
      for (std::int64_t k = 0; k < terms; ++k) {
        for (std::int64_t j = k * units.row; j < (k + 1) * units.row; j += units.channels) {
          for (std::int64_t c = 0; c < units.channels; ++c) out[k * units.channels + c] += segments[j + c];
        }
      }
    }
  }

 private:
  // A segment of one channel is summed in as many interleaved sums.
  static constexpr int lanes = 16;
  // Sums that registers hold beside what the terms need.
  static constexpr int most_sums = 6;

  // The values of some vectors' channels, and their sums.
  template <int vectors>
  struct Block {
    F m[vectors], a[vectors], b[vectors];
    F sum[vectors][terms];
  };

  // Adds the terms of `rows` rows, each of some vectors, from element i on.
  template <bool whole, int vectors, class Add>
  static void add_block(Block<vectors>& block, std::int64_t i, std::int64_t width, std::int64_t rows, std::int64_t row,
                        Add& add) {
    const Part<P, whole> part{width};
    // In registers, which members of a struct need not be.
    F sum[vectors][terms];
    std::memcpy(sum, block.sum, sizeof sum);
    for (std::int64_t r = 0; r < rows; ++r, i += row) {
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) add(part, sum[v], i + v * P::width, block.m[v], block.a[v], block.b[v]);
    }
    std::memcpy(block.sum, sum, sizeof sum);
  }

  template <class Add>
  static void add_plane(const Channels<T>& channels, std::int64_t c, std::int64_t first, std::int64_t last,
                        double* into, Add& add) {
    // As many elements are summed in A.
    constexpr std::int64_t tile = 64 * lanes;
    // Vectors that are summed at once.
    constexpr int vectors = terms * (lanes / P::width) <= 2 * most_sums ? lanes / P::width : 1;
    const auto prepared = [&](auto& block) {
      for (F& each : block.m) each = P::set(channels.m[c]);
      for (F& each : block.a) each = P::set(channels.a[c]);
      for (F& each : block.b) each = P::set(channels.b[c]);
    };
    Block<vectors> block;
    prepared(block);
    for (std::int64_t start = first; start < last; start += tile) {
      const std::int64_t size = std::min(tile, last - start), rows = size / lanes, rest = size % lanes;
      A values[terms][lanes];
      for (int lane = 0; lane < lanes; lane += vectors * P::width) {
        for (auto& sums : block.sum) {
          for (F& each : sums) each = P::set(0);
        }
        add_block<true>(block, start + lane, P::width, rows, lanes, add);
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 16
          for (int k = 0; k < terms; ++k) P::store(values[k] + lane + v * P::width, block.sum[v][k]);
        }
      }
      for (std::int64_t lane = 0; lane < rest; lane += P::width) {
        const std::int64_t width = std::min<std::int64_t>(P::width, rest - lane);
        Block<1> tail;
        prepared(tail);
        for (int k = 0; k < terms; ++k) tail.sum[0][k] = load_part<P>(values[k] + lane, width);
        add_block<false>(tail, start + rows * lanes + lane, width, 1, lanes, add);
        for (int k = 0; k < terms; ++k) store_part<P>(values[k] + lane, tail.sum[0][k], width);
      }
      for (int k = 0; k < terms; ++k) into[k] += sum_of(0, lanes, [&](std::int64_t j) { return values[k][j]; });
    }
  }

  template <class Add>
  static void add_rows(const Units& units, const Channels<T>& channels, std::int64_t first, std::int64_t last,
                       double* into, Add& add) {
    // As many rows are summed in A.
    constexpr std::int64_t tile = 32;
    // Vectors that are summed at once: as many as leave registers for the exponential.
    constexpr int most = P::width == 16 && 2 * terms <= most_sums ? 2 : 1;
    const std::int64_t row = units.row;
    const auto all_columns = [&](std::int64_t end, std::int64_t at, std::int64_t rows) {
      std::int64_t j = 0;
      for (; j + most * P::width <= end; j += most * P::width) {
        add_columns<true, most>(channels, at, rows, row, j, P::width, into, add);
      }
      for (; j + P::width <= end; j += P::width) {
        add_columns<true, 1>(channels, at, rows, row, j, P::width, into, add);
      }
      if (j < end) add_columns<false, 1>(channels, at, rows, row, j, end - j, into, add);
    };
    for (std::int64_t start = first; start < last; start += tile * row) {
      const std::int64_t size = std::min(tile * row, last - start), rows = size / row, rest = size % row;
      if (rows > 0) all_columns(row, start, rows);
      if (rest > 0) all_columns(rest, start + rows * row, 1);
    }
  }

  // Over some rows of the columns from j on: of some vectors, or of one with `width` columns.
  template <bool whole, int vectors, class Add>
  static void add_columns(const Channels<T>& channels, std::int64_t at, std::int64_t rows, std::int64_t row,
                          std::int64_t j, std::int64_t width, double* into, Add& add) {
    const Part<P, whole> part{width};
    Block<vectors> block;
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      block.m[v] = part.load(channels.m + j + v * P::width);
      block.a[v] = part.load(channels.a + j + v * P::width);
      block.b[v] = part.load(channels.b + j + v * P::width);
#pragma GCC unroll 16
      for (F& each : block.sum[v]) each = P::set(0);
    }
    add_block<whole>(block, at + j, width, rows, row, add);
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 16
      for (int k = 0; k < terms; ++k) {
        A values[P::width];
        P::store(values, block.sum[v][k]);
        double* const to = into + k * row + j + v * P::width;
        const std::int64_t those = whole ? P::width : width;
        for (std::int64_t l = 0; l < those; ++l) to[l] += static_cast<double>(values[l]);
      }
    }
  }
};

// Calls body(i, count, k) for every vector of a segment: of `count` elements from element i of the unit on, for whose
// channels `columns` hold the vectors k.
template <class P, std::size_t n, class A, class Body>
inline void for_segment(const Units& units, std::int64_t segment, const A* const (&columns)[n], Body&& body) {
  using F = typename P::F;
  const std::int64_t first = units.first(segment), last = units.last(segment);
  if (units.channels_last) {
    for (std::int64_t start = first; start < last; start += units.row) {
      for_vectors<P>(std::min(units.row, last - start), [&](std::int64_t j, std::int64_t count) {
        F k[n];
#pragma GCC unroll 16
        for (std::size_t c = 0; c < n; ++c) k[c] = load_part<P>(columns[c] + j, count);
        body(start + j, count, k);
      });
    }
    return;
  }
  std::int64_t channel = first / units.pixels;
  for (std::int64_t start = first, end; start < last; start = end, ++channel) {
    end = std::min((channel + 1) * units.pixels, last);
    F k[n];
    for (std::size_t c = 0; c < n; ++c) k[c] = P::set(columns[c][channel]);
    for_vectors<P>(end - start, [&](std::int64_t i, std::int64_t count) { body(start + i, count, k); });
  }
}

// Writes the gradients of weight and bias: the sums over the samples, in their order, of two values per sample and
// channel, which are lost.
template <class Args>
void write_parameters(const Args& args, double* of_samples) {
  const std::int64_t channels = args.shape.channels;
  for (std::int64_t n = 1; n < args.shape.samples; ++n) {
    for (std::int64_t i = 0; i < 2 * channels; ++i) of_samples[i] += of_samples[n * 2 * channels + i];
  }
  for (std::int64_t c = 0; c < channels; ++c) {
    if (args.grad_weight != nullptr) write(args.grad_weight, args.weight.dtype, c, of_samples[2 * c]);
    if (args.grad_bias != nullptr) write(args.grad_bias, args.bias.dtype, c, of_samples[2 * c + 1]);
  }
}

// The gradients of the values, where they are sums over nothing.
template <class Args>
void set_zero(const Args& args) {
  const auto clear = [](void* gradient, const ChannelValues& of, std::int64_t count) {
    if (gradient == nullptr) return;
    const std::int64_t size = of.dtype == DType::float64 ? 8 : of.dtype == DType::float32 ? 4 : 2;
    std::memset(gradient, 0, static_cast<std::size_t>(count * size));
  };
  const std::int64_t channels = args.shape.channels, all = args.shape.samples * channels;
  clear(args.grad_weight, args.weight, channels);
  clear(args.grad_bias, args.bias, channels);
  clear(args.grad_scale, args.scale, all);
  clear(args.grad_shift, args.shift, all);
  clear(args.grad_bias_in, args.bias_in, all);
}

// Calls body(static_cast<T*>(nullptr), std::bool_constant<with_silu>) for the type and the activation of the arguments.
template <class Args, class Body>
Status with_type_and_activation(const Args& args, Body&& body) {
  return with_type_of_level(args.dtype, [&](auto* type) {
    return args.activation == Activation::silu ? body(type, std::true_type{}) : body(type, std::false_type{});
  });
}

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
