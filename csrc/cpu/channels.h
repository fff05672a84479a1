// What group norm's two passes share: how the work is cut and given to threads, and what is computed once per channel.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "gencore/group_norm.h"
#include "half.h"
#include "tiles.h"
#include "workspace.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// The cut of a tensor into units, a run of memory each, that are computed whole, one after another, while they are in
// cache: a group or some, or, in channels_last, a sample. A unit is cut into segments, so that threads can share it and
// that the order of a sum depends on the shape of a sample alone: a segment has elements of one group only, or, in
// channels_last, some pixels with all their channels.
struct Units {
  bool channels_last;
  std::int64_t count, size, channels, groups, pixels;
  // In channels_last: elements of a row, which are whole pixels, as many as fill vectors if a pixel has few channels.
  std::int64_t row;
  std::int64_t segments;

  // per_channel: whether segments must not have elements of several channels, where they can be kept apart.
  Units(const GroupNormShape& shape, bool per_channel) {
    channels_last = shape.channels_last || shape.pixels == 1;
    pixels = shape.pixels;
    const std::int64_t channels_per_group = shape.channels / shape.groups, group = channels_per_group * pixels;
    constexpr std::int64_t target = 32768;
    groups = channels_last ? shape.groups : std::clamp<std::int64_t>(target / group, 1, shape.groups);
    while (shape.groups % groups != 0) --groups;
    units_per_sample_ = shape.groups / groups;
    count = shape.samples * units_per_sample_;
    channels = groups * channels_per_group;
    size = groups * group;
    row = channels;
    while (row < 256 && row % 16 != 0) row *= 2;
    const std::int64_t unit = channels_last ? row : 64;
    const std::int64_t most = channels_last ? row * std::clamp<std::int64_t>(2 * target / row, 64, 512) : target;
    run_ = channels_last ? size : per_channel ? pixels : group;
    // As equal as may be.
    piece_ = divide_up(divide_up(run_, divide_up(run_, most)), unit) * unit;
    pieces_per_run_ = divide_up(run_, piece_);
    segments = size / run_ * pieces_per_run_;
  }

  // Where a segment begins in its unit, and where it ends.
  std::int64_t first(std::int64_t segment) const {
    if (pieces_per_run_ == 1) return segment * run_;
    return segment / pieces_per_run_ * run_ + segment % pieces_per_run_ * piece_;
  }
  std::int64_t last(std::int64_t segment) const {
    if (pieces_per_run_ == 1) return (segment + 1) * run_;
    return std::min(first(segment) + piece_, (segment / pieces_per_run_ + 1) * run_);
  }

  // The sample and the first channel of a unit.
  std::int64_t sample(std::int64_t unit) const { return unit / units_per_sample_; }
  std::int64_t channel(std::int64_t unit) const { return unit % units_per_sample_ * channels; }

  // How many threads the units are worth.
  int team(int threads) const {
    const std::int64_t worth = std::min(count * size / Tiles::grain, count * segments);
    return static_cast<int>(std::clamp<std::int64_t>(worth, 1, threads));
  }
  // Whether threads share every unit, and do not take one each: where that leaves fewer of them idle, by an eighth at
  // least, and where units are so large that several at once would drive each other out of the last-level cache.
  bool shared(int team) const {
    constexpr std::int64_t large = 1 << 19;
    if (team == 1) return false;
    const std::int64_t together = count * divide_up(segments, team), apart = divide_up(count, team) * segments;
    return channels_last && size > large ? together <= apart : together * 9 < apart * 8;
  }
  // What is gathered of units that are in work at once lies in different slots, of which there are as many. Threads
  // that share units work on two at once, as they wait for each other between gathering and the rest.
  std::int64_t slots(int team) const { return shared(team) ? std::min<std::int64_t>(count, 2) : team; }

  // For every unit, on each thread that works on it, calls of the thread's worker = make_worker(thread):
  // begin(unit); gather(unit, segment, slot) for its segments; finish(unit, slot, writes) when all are gathered, where
  // `writes` is true on one thread; and scatter(unit, segment) for its segments, those gathered last first: they are
  // likely to be in cache still.
  template <class MakeWorker>
  void for_each(int team, MakeWorker&& make_worker) const {
    const auto work = [this](auto& worker, std::int64_t unit, std::int64_t slot, std::int64_t begin, std::int64_t end) {
      worker.begin(unit);
      for (std::int64_t segment = begin; segment < end; ++segment) worker.gather(unit, segment, slot);
    };
    const auto rest = [this](auto& worker, std::int64_t unit, std::int64_t slot, std::int64_t begin, std::int64_t end,
                             bool writes) {
      worker.finish(unit, slot, writes);
      for (std::int64_t segment = end; segment-- > begin;) worker.scatter(unit, segment);
    };
    if (team == 1) {
      auto worker = make_worker(0);
      for (std::int64_t unit = 0; unit < count; ++unit) {
        work(worker, unit, 0, 0, segments);
        rest(worker, unit, 0, 0, segments, true);
      }
      return;
    }
#pragma omp parallel num_threads(team)
    {
#ifdef _OPENMP
      const int thread = omp_get_thread_num(), members = omp_get_num_threads();
#else
      const int thread = 0, members = 1;
#endif
      auto worker = make_worker(thread);
      if (shared(team)) {
        const std::int64_t begin = segments * thread / members, end = segments * (thread + 1) / members;
        for (std::int64_t unit = 0; unit < count; ++unit) {
          work(worker, unit, unit % 2, begin, end);
#pragma omp barrier
          rest(worker, unit, unit % 2, begin, end, thread == 0);
        }
      } else {
        for (std::int64_t unit = count * thread / members; unit < count * (thread + 1) / members; ++unit) {
          work(worker, unit, thread, 0, segments);
          rest(worker, unit, thread, 0, segments, true);
        }
      }
    }
  }

 private:
  std::int64_t units_per_sample_, run_, piece_, pieces_per_run_;
};

// Reads `count` values of a sample from a channel on; the fallback, if they are left out.
inline void read_channels(const ChannelValues& values, std::int64_t sample, std::int64_t channel, std::int64_t count,
                          double fallback, double* out) {
  if (values.data == nullptr) {
    std::fill(out, out + count, fallback);
    return;
  }
  with_type(values.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const from = static_cast<const T*>(values.data) + sample * values.stride + channel;
    for (std::int64_t i = 0; i < count; ++i) {
      if constexpr (sizeof(T) == 2) {
        out[i] = static_cast<double>(to_float(from[i]));
      } else {
        out[i] = static_cast<double>(from[i]);
      }
    }
    return Status::ok;
  });
}

// Writes a value in the type of a tensor.
inline void write(void* tensor, DType dtype, std::int64_t index, double value) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T& to = static_cast<T*>(tensor)[index];
    if constexpr (std::is_same_v<T, bfloat16>) {
      to = to_bfloat16(static_cast<float>(value));
    } else if constexpr (std::is_same_v<T, float16>) {
      to = to_float16(static_cast<float>(value));
    } else {
      to = static_cast<T>(value);
    }
    return Status::ok;
  });
}

// The values of a unit's channels, and what follows from them and the statistics:
//   t = (x - m) a + b, the argument of the activation,
// where m is the mean less bias_in, rounded, and b has what the rounding left. So nothing cancels but x - m, which is
// exact where it matters.
template <class T>
struct Channels {
  using A = Accumulator<T>;

  // In channels_last they are repeated to fill a row.
  A *m, *a, *b;
  // `rest` is m less the mean and plus bias_in.
  double *weight, *bias, *scale, *shift, *bias_in, *rest;

  // The doubles that this takes from `space`.
  static std::int64_t space(const Units& units) { return 3 * units.row + 6 * units.channels; }

  Channels(double* space, const Units& units)
      : m(reinterpret_cast<A*>(space)),
        a(reinterpret_cast<A*>(space + units.row)),
        b(reinterpret_cast<A*>(space + 2 * units.row)),
        weight(space + 3 * units.row),
        bias(weight + units.channels),
        scale(bias + units.channels),
        shift(scale + units.channels),
        bias_in(shift + units.channels),
        rest(bias_in + units.channels) {}

  template <class Args>
  void read_values(const Args& args, const Units& units, std::int64_t unit) {
    const std::int64_t n = units.sample(unit), c = units.channel(unit), count = units.channels;
    read_channels(args.weight, n, c, count, 1, weight);
    read_channels(args.bias, n, c, count, 0, bias);
    read_channels(args.scale, n, c, count, 0, scale);
    read_channels(args.shift, n, c, count, 0, shift);
    read_channels(args.bias_in, n, c, count, 0, bias_in);
  }

  // The same and the statistics of the forward pass.
  template <class Args>
  void read(const Args& args, const Units& units, std::int64_t unit) {
    read_values(args, units, unit);
    for (std::int64_t g = 0; g < units.groups; ++g) {
      const double* const statistics = args.statistics + 2 * (unit * units.groups + g);
      set_statistics(units, g, statistics[0], statistics[1]);
    }
    if (units.channels_last) fill_row(units, {m, a, b});
  }

  // After read_values: mean and 1 / sqrt(variance + eps) of group g of the unit.
  void set_statistics(const Units& units, std::int64_t g, double mean, double inverse) {
    const std::int64_t size = units.channels / units.groups;
    for (std::int64_t c = g * size; c < (g + 1) * size; ++c) {
      const double exact = mean - bias_in[c], factor = 1 + scale[c];
      m[c] = static_cast<A>(exact);
      rest[c] = static_cast<double>(m[c]) - exact;
      a[c] = static_cast<A>(inverse * weight[c] * factor);
      b[c] = static_cast<A>((rest[c] * inverse * weight[c] + bias[c]) * factor + shift[c]);
    }
  }

  // Repeats what is there for the channels once until it fills a row.
  static void fill_row(const Units& units, std::initializer_list<A*> columns) {
    for (A* column : columns) {
      for (std::int64_t j = units.channels; j < units.row; ++j) column[j] = column[j - units.channels];
    }
  }
};

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
