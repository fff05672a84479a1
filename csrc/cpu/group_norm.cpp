#include "gencore/group_norm.h"

#include "channels.h"
#include "moments.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

template <class T, bool with_silu>
struct Forward {
  using P = Arithmetic<T>;
  using F = typename P::F;

  const GroupNorm& args;
  const Units& units;
  Channels<T> channels;
  ColumnMoments<T> of_columns;
  Moments* moments;

  static std::int64_t space(const Units& units) {
    return Channels<T>::space(units) + ColumnMoments<T>::space(columns(units));
  }
  Forward(const GroupNorm& args_, const Units& units_, double* space, Moments* moments_)
      : args(args_),
        units(units_),
        channels(space, units),
        of_columns(space + Channels<T>::space(units), columns(units)),
        moments(moments_) {}

  void begin(std::int64_t unit) { channels.read_values(args, units, unit); }

  void gather(std::int64_t unit, std::int64_t segment, std::int64_t slot) {
    const std::int64_t first = units.first(segment), size = units.last(segment) - first;
    const T* const from = static_cast<const T*>(args.x) + unit * units.size + first;
    if (!units.channels_last) {
      Moments& of_segment = moments[slot * units.segments + segment];
      of_segment = size < few ? moments_of(from, size) : of_rows(from, size).of_columns(0, columns(units));
      if (args.bias_in.data != nullptr) of_segment.mean += channels.bias_in[first / units.pixels];
      return;
    }
    of_rows(from, size);
    const std::int64_t of_group = units.channels / units.groups;
    for (std::int64_t g = 0; g < units.groups; ++g) {
      Moments all;
      for (std::int64_t start = g * of_group; start < units.row; start += units.channels) {
        if (args.bias_in.data == nullptr) {
          all.merge(of_columns.of_columns(start, start + of_group));
        } else {
          for (std::int64_t c = 0; c < of_group; ++c) {
            all.merge(of_columns.of_columns(start + c, start + c + 1, channels.bias_in[g * of_group + c]));
          }
        }
      }
      moments[(slot * units.segments + segment) * units.groups + g] = all;
    }
  }

  void finish(std::int64_t unit, std::int64_t slot, bool writes) {
    // In channels_last a segment has all groups, else a group has segments of its own.
    const std::int64_t all = units.segments, groups = units.groups, step = units.channels_last ? groups : 1;
    const std::int64_t each = units.channels_last ? all : all / groups;
    for (std::int64_t g = 0; g < groups; ++g) {
      const Moments* const of_group = moments + (units.channels_last ? slot * all * groups + g : slot * all + g * each);
      Moments total;
      for (std::int64_t segment = 0; segment < each; ++segment) total.merge(of_group[segment * step]);
      const double variance = total.m2 / total.count;
      // Rounding may leave less than nothing; NaN stays.
      const double inverse = 1 / std::sqrt((variance < 0 ? 0 : variance) + args.eps);
      channels.set_statistics(units, g, total.mean, inverse);
      if (args.statistics != nullptr && writes) {
        args.statistics[2 * (unit * groups + g)] = total.mean;
        args.statistics[2 * (unit * groups + g) + 1] = inverse;
      }
    }
    if (units.channels_last) Channels<T>::fill_row(units, {channels.m, channels.a, channels.b});
  }

  void scatter(std::int64_t unit, std::int64_t segment) const {
    const std::int64_t first = units.first(segment), last = units.last(segment);
    const T* const x = static_cast<const T*>(args.x) + unit * units.size;
    T* const y = static_cast<T*>(args.y) + unit * units.size;
    if (units.channels_last) {
      for (std::int64_t start = first; start < last; start += units.row) {
        const T* const x_row = x + start;
        T* const y_row = y + start;
        const auto *const m = channels.m, *const a = channels.a, *const b = channels.b;
        for_vectors<P>(std::min(units.row, last - start), [=](std::int64_t i, std::int64_t count) {
          const F centered = P::sub(load_part<P>(x_row + i, count), load_part<P>(m + i, count));
          store_part<P>(y_row + i, value(centered, load_part<P>(a + i, count), load_part<P>(b + i, count)), count);
        });
      }
      return;
    }
    std::int64_t c = first / units.pixels;
    for (std::int64_t start = first, end; start < last; start = end, ++c) {
      end = std::min((c + 1) * units.pixels, last);
      const T* const x_plane = x + start;
      T* const y_plane = y + start;
      const F m = P::set(channels.m[c]), a = P::set(channels.a[c]), b = P::set(channels.b[c]);
      for_vectors<P>(end - start, [=](std::int64_t i, std::int64_t count) {
        store_part<P>(y_plane + i, value(P::sub(load_part<P>(x_plane + i, count), m), a, b), count);
      });
    }
  }

 private:
  // Elements that are not worth columns, as they stay in the first-level cache.
  static constexpr std::int64_t few = 4096;

  // Where elements of a row are of one group, columns have no meaning: they are as many as keep vectors busy.
  static std::int64_t columns(const Units& units) { return units.channels_last ? units.row : 64; }

  const ColumnMoments<T>& of_rows(const T* x, std::int64_t size) {
    const std::int64_t row = columns(units);
    of_columns.clear();
    of_columns.add(x, size / row);
    of_columns.add_rest(x + size / row * row, size % row);
    return of_columns;
  }

  static F value(F centered, F a, F b) {
    const F t = P::fma(centered, a, b);
    if constexpr (with_silu) return silu<P>(t, exponential_minus<P>(t));
    return t;
  }
};

template <class T, bool with_silu>
Status forward(const GroupNorm& args, int threads) {
  using Worker = Forward<T, with_silu>;
  const Units units(args.shape, args.bias_in.data != nullptr);
  const int team = units.team(threads);
  const Workspace<double> space(team, Worker::space(units));
  const Workspace<Moments> moments(1, units.slots(team) * units.segments * (units.channels_last ? units.groups : 1));
  if (!space.ok() || !moments.ok()) return Status::out_of_memory;
  units.for_each(team, [&](int thread) { return Worker(args, units, space.of_thread(thread), moments.of_thread(0)); });
  return Status::ok;
}

template <class T, bool with_silu>
struct Backward {
  using P = Arithmetic<T>;
  using A = Accumulator<T>;
  using F = typename P::F;

  const GroupNormBackward& args;
  const Units& units;
  Channels<T> channels;
  // grad_x = c1 dt + c2 (x - m) + c3; in channels_last repeated to fill a row.
  A *c1, *c2, *c3;
  // For each channel the sums over its pixels of dt, of dt xhat and of xhat.
  double *plain, *weighted, *deviation;
  // For each segment the sums of dt, of dt (x - m) and of x - m: of its channel, or in channels_last of its columns.
  double* sums;
  // For each sample and channel (1 + scale) times the sums of dt xhat and of dt; null if nobody wants them.
  double* of_samples;
  // Room for the dt of a unit, where grad_x cannot hold them meanwhile; null if they are computed again instead.
  A* room;

  static std::int64_t space(const Units& units) {
    return Channels<T>::space(units) + 3 * units.row + 3 * units.channels;
  }
  static std::int64_t sums_per_segment(const Units& units) { return units.channels_last ? 3 * units.row : 3; }

  // Elements of that room.
  static std::int64_t room_for(const GroupNormBackward& args, const Units& units) {
    constexpr std::int64_t most_bytes = 8 << 20;
    const bool wanted = with_silu && sizeof(T) < sizeof(A) && args.grad_x != nullptr;
    return wanted && units.size * static_cast<std::int64_t>(sizeof(A)) <= most_bytes ? units.size : 0;
  }

  Backward(const GroupNormBackward& args_, const Units& units_, double* space, double* sums_, double* of_samples_,
           A* room_)
      : args(args_), units(units_), channels(space, units), sums(sums_), of_samples(of_samples_), room(room_) {
    double* const more = space + Channels<T>::space(units);
    c1 = reinterpret_cast<A*>(more);
    c2 = reinterpret_cast<A*>(more + units.row);
    c3 = reinterpret_cast<A*>(more + 2 * units.row);
    plain = more + 3 * units.row;
    weighted = plain + units.channels;
    deviation = weighted + units.channels;
  }

  void begin(std::int64_t unit) {
    channels.read_values(args, units, unit);
    for (std::int64_t g = 0; g < units.groups; ++g) {
      const double* const statistics = args.statistics + 2 * (unit * units.groups + g);
      channels.set_statistics(units, g, statistics[0], statistics[1]);
    }
    if (units.channels_last) Channels<T>::fill_row(units, {channels.m, channels.a, channels.b});
  }

  void gather(std::int64_t unit, std::int64_t segment, std::int64_t slot) {
    const std::int64_t first = units.first(segment), n = units.last(segment) - first, at = unit * units.size + first;
    const T* const x = static_cast<const T*>(args.x) + at;
    const T* const grad_y = static_cast<const T*>(args.grad_y) + at;
    double* const into = of_segment(slot, segment);
    A* const kept = kept_at(unit, first);
    if (units.channels_last) {
      std::fill(into, into + 3 * units.row, 0.0);
      add_rows(x, grad_y, n, kept, into);
    } else {
      add_plane(x, grad_y, n, first / units.pixels, kept, into);
    }
  }

  void finish(std::int64_t unit, std::int64_t slot, bool writes) {
    add_segments(slot);
    const std::int64_t first = units.sample(unit) * args.shape.channels + units.channel(unit);
    const std::int64_t in_group = units.channels / units.groups;
    const double pixels = static_cast<double>(units.pixels), size = pixels * static_cast<double>(in_group);
    for (std::int64_t g = 0; g < units.groups; ++g) {
      const double inverse = args.statistics[2 * (unit * units.groups + g) + 1];
      const std::int64_t begin = g * in_group, end = begin + in_group;
      for (std::int64_t c = begin; c < end; ++c) {
        // From x - m to xhat.
        weighted[c] = inverse * (weighted[c] + channels.rest[c] * plain[c]);
        deviation[c] = inverse * (deviation[c] + channels.rest[c] * pixels);
      }
      const auto k = [&](std::int64_t c) { return channels.weight[c] * (1 + channels.scale[c]); };
      const double mean_plain = sum_of(begin, end, [&](std::int64_t c) { return k(c) * plain[c]; }) / size;
      const double mean_weighted = sum_of(begin, end, [&](std::int64_t c) { return k(c) * weighted[c]; }) / size;
      for (std::int64_t c = begin; c < end; ++c) {
        c1[c] = static_cast<A>(inverse * k(c));
        c2[c] = static_cast<A>(-inverse * inverse * mean_weighted);
        c3[c] = static_cast<A>(-inverse * (mean_plain + inverse * channels.rest[c] * mean_weighted));
      }
      if (!writes) continue;
      for (std::int64_t c = begin; c < end; ++c) {
        const std::int64_t at = first + c;
        if (of_samples != nullptr) {
          of_samples[2 * at] = (1 + channels.scale[c]) * weighted[c];
          of_samples[2 * at + 1] = (1 + channels.scale[c]) * plain[c];
        }
        if (args.grad_scale != nullptr) {
          write(args.grad_scale, args.scale.dtype, at, channels.weight[c] * weighted[c] + channels.bias[c] * plain[c]);
        }
        if (args.grad_shift != nullptr) write(args.grad_shift, args.shift.dtype, at, plain[c]);
        if (args.grad_bias_in != nullptr) {
          write(args.grad_bias_in, args.bias_in.dtype, at,
                inverse * (k(c) * plain[c] - pixels * mean_plain - mean_weighted * deviation[c]));
        }
      }
    }
    if (units.channels_last) Channels<T>::fill_row(units, {c1, c2, c3});
  }

  void scatter(std::int64_t unit, std::int64_t segment) const {
    if (args.grad_x == nullptr) return;
    if (kept_at(unit, 0) == nullptr) {
      scatter<false>(unit, segment);
    } else {
      scatter<true>(unit, segment);
    }
  }

 private:
  // A segment of one channel is summed in as many interleaved sums.
  static constexpr int lanes = 16;

  double* of_segment(std::int64_t slot, std::int64_t segment) const {
    return sums + (slot * units.segments + segment) * sums_per_segment(units);
  }

  // Where the dt of a unit's elements are kept, from an element on. An activation's take longer to compute than to read
  // again, and grad_x can hold them if its type can.
  A* kept_at(std::int64_t unit, std::int64_t first) const {
    if (!with_silu || args.grad_x == nullptr) return nullptr;
    if constexpr (std::is_same_v<T, A>) return static_cast<A*>(args.grad_x) + unit * units.size + first;
    return room == nullptr ? nullptr : room + first;
  }

  // The gradient of the activation's argument.
  static F gradient(F grad_y, F centered, F a, F b) {
    if constexpr (!with_silu) return grad_y;
    const F t = P::fma(centered, a, b);
    return P::mul(grad_y, silu_derivative<P>(t, exponential_minus<P>(t)));
  }

  template <bool is_kept>
  void scatter(std::int64_t unit, std::int64_t segment) const {
    const std::int64_t first = units.first(segment), last = units.last(segment), at = unit * units.size;
    const T* const x = static_cast<const T*>(args.x) + at;
    const T* const grad_y = static_cast<const T*>(args.grad_y) + at;
    const A* const kept = kept_at(unit, 0);
    T* const grad_x = static_cast<T*>(args.grad_x) + at;
    const auto value = [=](std::int64_t i, std::int64_t count, F m, F a, F b, F k1, F k2, F k3) {
      const F centered = P::sub(load_part<P>(x + i, count), m);
      F dt;
      if constexpr (is_kept) {
        dt = load_part<P>(kept + i, count);
      } else {
        dt = gradient(load_part<P>(grad_y + i, count), centered, a, b);
      }
      store_part<P>(grad_x + i, P::fma(k1, dt, P::fma(k2, centered, k3)), count);
    };
    if (units.channels_last) {
      const A *const m = channels.m, *const a = channels.a, *const b = channels.b, *const k1 = c1, *const k2 = c2,
                     *const k3 = c3;
      for (std::int64_t start = first; start < last; start += units.row) {
        for_vectors<P>(std::min(units.row, last - start), [=](std::int64_t i, std::int64_t count) {
          const auto of = [=](const A* column) { return load_part<P>(column + i, count); };
          value(start + i, count, of(m), of(a), of(b), of(k1), of(k2), of(k3));
        });
      }
      return;
    }
    std::int64_t c = first / units.pixels;
    for (std::int64_t start = first, end; start < last; start = end, ++c) {
      end = std::min((c + 1) * units.pixels, last);
      const F m = P::set(channels.m[c]), a = P::set(channels.a[c]), b = P::set(channels.b[c]);
      const F k1 = P::set(c1[c]), k2 = P::set(c2[c]), k3 = P::set(c3[c]);
      for_vectors<P>(end - start,
                     [=](std::int64_t i, std::int64_t count) { value(start + i, count, m, a, b, k1, k2, k3); });
    }
  }

  // The sums of dt, dt (x - m) and x - m over some rows of some vectors of columns, in A; and the dt, if they are kept.
  template <int vectors, bool whole, bool keep>
  struct Block {
    F center[vectors], factor[vectors], offset[vectors];
    F sum[3][vectors];
    // Columns of a vector that is not whole.
    std::int64_t width;

    template <class E>
    F load(const E* p) const {
      return whole ? P::load(p) : load_part<P>(p, width);
    }

    void clear() {
      for (auto& each : sum) {
#pragma GCC unroll 16
        for (F& one : each) one = P::set(0);
      }
    }

    void add(const T* x, const T* grad_y, A* kept, std::int64_t rows, std::int64_t row) {
      // In registers, which members of a struct need not be.
      F total[3][vectors];
      std::memcpy(total, sum, sizeof sum);
      for (std::int64_t i = 0; i < rows; ++i, x += row, grad_y += row) {
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) {
          const F centered = P::sub(load(x + v * P::width), center[v]);
          const F dt = gradient(load(grad_y + v * P::width), centered, factor[v], offset[v]);
          total[0][v] = P::add(total[0][v], dt);
          total[1][v] = P::fma(dt, centered, total[1][v]);
          total[2][v] = P::add(total[2][v], centered);
          if constexpr (keep && whole) P::store(kept + v * P::width, dt);
          if constexpr (keep && !whole) store_part<P>(kept + v * P::width, dt, width);
        }
        if constexpr (keep) kept += row;
      }
      std::memcpy(sum, total, sizeof sum);
    }
  };

  // Calls body(std::bool_constant) with whether dt are kept.
  template <class Body>
  static void with_keeping(const A* kept, Body&& body) {
    if (kept != nullptr) {
      body(std::true_type{});
    } else {
      body(std::false_type{});
    }
  }

  // The three sums over n elements of a channel.
  void add_plane(const T* x, const T* grad_y, std::int64_t n, std::int64_t c, A* kept, double* into) const {
    // As many elements are summed in A.
    constexpr std::int64_t tile = 64 * lanes;
    constexpr int vectors = lanes / P::width;
    const auto prepared = [&](auto& block) {
      for (F& each : block.center) each = P::set(channels.m[c]);
      for (F& each : block.factor) each = P::set(channels.a[c]);
      for (F& each : block.offset) each = P::set(channels.b[c]);
      block.clear();
    };
    with_keeping(kept, [&](auto keep) {
      Block<vectors, true, keep> block;
      prepared(block);
      into[0] = into[1] = into[2] = 0;
      for (std::int64_t start = 0; start < n; start += tile) {
        const std::int64_t size = std::min(tile, n - start), rows = size / lanes, rest = size % lanes;
        A* const to = keep ? kept + start : nullptr;
        block.clear();
        block.add(x + start, grad_y + start, to, rows, lanes);
        A values[3][lanes];
        for (int k = 0; k < 3; ++k) {
#pragma GCC unroll 16
          for (int v = 0; v < vectors; ++v) P::store(values[k] + v * P::width, block.sum[k][v]);
        }
        const std::int64_t done = rows * lanes;
        for (std::int64_t j = 0; j < rest; j += P::width) {
          Block<1, false, keep> tail;
          prepared(tail);
          tail.width = std::min<std::int64_t>(P::width, rest - j);
          for (int k = 0; k < 3; ++k) tail.sum[k][0] = load_part<P>(values[k] + j, tail.width);
          tail.add(x + start + done + j, grad_y + start + done + j, keep ? to + done + j : nullptr, 1, lanes);
          for (int k = 0; k < 3; ++k) store_part<P>(values[k] + j, tail.sum[k][0], tail.width);
        }
        for (int k = 0; k < 3; ++k) into[k] += sum_of(0, lanes, [&](std::int64_t j) { return values[k][j]; });
      }
    });
  }

  // Adds the three sums over each column of n elements in rows, each 3 lists of as many doubles as a row has.
  void add_rows(const T* x, const T* grad_y, std::int64_t n, A* kept, double* into) const {
    // As many rows are summed in A.
    constexpr std::int64_t tile = 32;
    // Vectors that are summed at once: as many as leave registers for the exponential.
    constexpr int most = P::width == 16 ? 2 : 1;
    const std::int64_t row = units.row;
    with_keeping(kept, [&](auto keep) {
      for (std::int64_t start = 0; start < n; start += tile * row) {
        const std::int64_t size = std::min(tile * row, n - start), rows = size / row, rest = size % row;
        const auto all_columns = [&](std::int64_t end, std::int64_t at, std::int64_t count) {
          A* const to = keep ? kept + at : nullptr;
          std::int64_t j = 0;
          for (; j + most * P::width <= end; j += most * P::width) {
            add_columns<most, true, keep>(x + at, grad_y + at, to, count, j, P::width, into);
          }
          for (; j + P::width <= end; j += P::width) {
            add_columns<1, true, keep>(x + at, grad_y + at, to, count, j, P::width, into);
          }
          if (j < end) add_columns<1, false, keep>(x + at, grad_y + at, to, count, j, end - j, into);
        };
        if (rows > 0) all_columns(row, start, rows);
        if (rest > 0) all_columns(rest, start + rows * row, 1);
      }
    });
  }

  // The same over some rows of the columns from j on: of some vectors, or of one with `width` columns.
  template <int vectors, bool whole, bool keep>
  void add_columns(const T* x, const T* grad_y, A* kept, std::int64_t rows, std::int64_t j, std::int64_t width,
                   double* into) const {
    Block<vectors, whole, keep> block;
    block.width = width;
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      block.center[v] = block.load(channels.m + j + v * P::width);
      block.factor[v] = block.load(channels.a + j + v * P::width);
      block.offset[v] = block.load(channels.b + j + v * P::width);
    }
    block.clear();
    block.add(x + j, grad_y + j, keep ? kept + j : nullptr, rows, units.row);
    for (int k = 0; k < 3; ++k) {
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) {
        A values[P::width];
        P::store(values, block.sum[k][v]);
        double* const to = into + k * units.row + j + v * P::width;
        const std::int64_t those = whole ? P::width : width;
        for (std::int64_t i = 0; i < those; ++i) to[i] += static_cast<double>(values[i]);
      }
    }
  }

  // The sums of the unit's channels, from those of its segments in order.
  void add_segments(std::int64_t slot) {
    double* const of_channel[] = {plain, weighted, deviation};
    std::fill(plain, plain + 3 * units.channels, 0.0);
    for (std::int64_t segment = 0; segment < units.segments; ++segment) {
      const double* const from = of_segment(slot, segment);
      if (units.channels_last) {
        for (std::int64_t k = 0; k < 3; ++k) {
          for (std::int64_t j = k * units.row; j < (k + 1) * units.row; j += units.channels) {
            for (std::int64_t c = 0; c < units.channels; ++c) of_channel[k][c] += from[j + c];
          }
        }
      } else {
        const std::int64_t c = units.first(segment) / units.pixels;
        for (std::int64_t k = 0; k < 3; ++k) of_channel[k][c] += from[k];
      }
    }
  }
};

template <class T, bool with_silu>
Status backward(const GroupNormBackward& args, int threads) {
  using Worker = Backward<T, with_silu>;
  const Units units(args.shape, true);
  const int team = units.team(threads);
  const std::int64_t channels = args.shape.channels;
  const bool parameters = args.grad_weight != nullptr || args.grad_bias != nullptr;
  const Workspace<double> space(team, Worker::space(units));
  const Workspace<double> sums(1, units.slots(team) * units.segments * Worker::sums_per_segment(units));
  const Workspace<double> of_samples(1, parameters ? 2 * args.shape.samples * channels : 0);
  // Threads that share units have segments of their own, the same ones of each.
  const std::int64_t room_size = Worker::room_for(args, units);
  const Workspace<Accumulator<T>> room(units.shared(team) ? 1 : team, room_size);
  if (!space.ok() || !sums.ok() || !of_samples.ok() || !room.ok()) return Status::out_of_memory;
  units.for_each(team, [&](int thread) {
    return Worker(args, units, space.of_thread(thread), sums.of_thread(0),
                  parameters ? of_samples.of_thread(0) : nullptr,
                  room_size == 0 ? nullptr : room.of_thread(units.shared(team) ? 0 : thread));
  });
  if (!parameters) return Status::ok;
  // In the order of the samples, into the first one's.
  double* const total = of_samples.of_thread(0);
  for (std::int64_t n = 1; n < args.shape.samples; ++n) {
    for (std::int64_t i = 0; i < 2 * channels; ++i) total[i] += total[n * 2 * channels + i];
  }
  for (std::int64_t c = 0; c < channels; ++c) {
    if (args.grad_weight != nullptr) write(args.grad_weight, args.weight.dtype, c, total[2 * c]);
    if (args.grad_bias != nullptr) write(args.grad_bias, args.bias.dtype, c, total[2 * c + 1]);
  }
  return Status::ok;
}

// Calls body(std::bool_constant<...>) with what is known only now as a constant for a template.
template <class Body>
Status with_constant(bool value, Body&& body) {
  return value ? body(std::true_type{}) : body(std::false_type{});
}

}  // namespace

Status group_norm(const GroupNorm& args, int threads) {
  return with_type_of_level(args.dtype, [&](auto* type) {
    return with_constant(args.activation == Activation::silu, [&](auto with_silu) {
      return forward<std::remove_pointer_t<decltype(type)>, with_silu>(args, threads);
    });
  });
}

Status group_norm_backward(const GroupNormBackward& args, int threads) {
  return with_type_of_level(args.dtype, [&](auto* type) {
    return with_constant(args.activation == Activation::silu, [&](auto with_silu) {
      return backward<std::remove_pointer_t<decltype(type)>, with_silu>(args, threads);
    });
  });
}

}  // namespace gencore::cpu::GENCORE_SIMD

#if GENCORE_SIMD_NUMBER == 0
namespace gencore::cpu {

GENCORE_DECLARE_LEVELS(Status group_norm(const GroupNorm&, int))
GENCORE_DECLARE_LEVELS(Status group_norm_backward(const GroupNormBackward&, int))

namespace {

// The gradients of sums over nothing.
void set_zero(const GroupNormBackward& args) {
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

}  // namespace

Status group_norm(const GroupNorm& args, int threads) {
  const GroupNormShape& shape = args.shape;
  if (threads < 1 || !is_valid(shape) || !has_valid_values(args)) return Status::invalid_argument;
  if (shape.samples * shape.channels * shape.pixels == 0) return Status::ok;
  if (args.x == nullptr || args.y == nullptr) return Status::invalid_argument;
  if (args.dtype == DType::float64) return scalar::group_norm(args, threads);
  GENCORE_DISPATCH(group_norm, args, threads);
}

Status group_norm_backward(const GroupNormBackward& args, int threads) {
  const GroupNormShape& shape = args.shape;
  if (threads < 1 || !is_valid(shape) || !has_valid_values(args)) return Status::invalid_argument;
  if (shape.samples * shape.channels * shape.pixels == 0) {
    set_zero(args);
    return Status::ok;
  }
  if (args.x == nullptr || args.grad_y == nullptr || args.statistics == nullptr) return Status::invalid_argument;
  if (args.dtype == DType::float64) return scalar::group_norm_backward(args, threads);
  GENCORE_DISPATCH(group_norm_backward, args, threads);
}

}  // namespace gencore::cpu
#endif
