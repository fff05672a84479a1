#include "gencore/group_norm.h"

#include "channel_sums.h"

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
    const T* const x = static_cast<const T*>(args.x) + unit * units.size;
    T* const y = static_cast<T*>(args.y) + unit * units.size;
    for_segment<P>(units, segment, {channels.m, channels.a, channels.b},
                   [=](std::int64_t i, std::int64_t count, const F(&k)[3]) {
                     store_part<P>(y + i, value(P::sub(load_part<P>(x + i, count), k[0]), k[1], k[2]), count);
                   });
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
    if constexpr (with_silu) return Silu<P>().value(t);
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

  // The terms: dt, dt (x - m) and x - m.
  using Sums = ChannelSums<T, 3>;

  const GroupNormBackward& args;
  const Units& units;
  Channels<T> channels;
  // grad_x = c1 dt + c2 (x - m) + c3; in channels_last repeated to fill a row.
  A *c1, *c2, *c3;
  // For each channel the sums over its pixels of dt, of dt xhat and of xhat.
  double *plain, *weighted, *deviation;
  // Those of each segment.
  double* sums;
  // For each sample and channel (1 + scale) times the sums of dt xhat and of dt; null if nobody wants them.
  double* of_samples;
  // Room for the dt of a unit, where grad_x cannot hold them meanwhile; null if they are computed again instead.
  A* room;

  static std::int64_t space(const Units& units) {
    return Channels<T>::space(units) + 3 * units.row + 3 * units.channels;
  }

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

  void begin(std::int64_t unit) { channels.read(args, units, unit); }

  void gather(std::int64_t unit, std::int64_t segment, std::int64_t slot) {
    if (kept_at(unit) == nullptr) {
      gather<false>(unit, segment, slot);
    } else {
      gather<true>(unit, segment, slot);
    }
  }

  void finish(std::int64_t unit, std::int64_t slot, bool writes) {
    Sums::of_channels(units, of_segment(slot, 0), plain);
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
    if (kept_at(unit) == nullptr) {
      scatter<false>(unit, segment);
    } else {
      scatter<true>(unit, segment);
    }
  }

 private:
  double* of_segment(std::int64_t slot, std::int64_t segment) const {
    return sums + (slot * units.segments + segment) * Sums::per_segment(units);
  }

  // Where the dt of a unit's elements are kept. An activation's take longer to compute than to read again, and grad_x
  // can hold them if its type can.
  A* kept_at(std::int64_t unit) const {
    if (!with_silu || args.grad_x == nullptr) return nullptr;
    if constexpr (std::is_same_v<T, A>) return static_cast<A*>(args.grad_x) + unit * units.size;
    return room;
  }

  // The gradient of the activation's argument.
  static F gradient(F grad_y, F centered, F a, F b) {
    if constexpr (!with_silu) return grad_y;
    const F t = P::fma(centered, a, b);
    return P::mul(grad_y, Silu<P>().first(t));
  }

  template <bool keep>
  void gather(std::int64_t unit, std::int64_t segment, std::int64_t slot) const {
    const T* const x = static_cast<const T*>(args.x) + unit * units.size;
    const T* const grad_y = static_cast<const T*>(args.grad_y) + unit * units.size;
    A* const kept = kept_at(unit);
    const auto add = [=](auto part, F(&sum)[3], std::int64_t i, F m, F a, F b) {
      const F centered = P::sub(part.load(x + i), m), dt = gradient(part.load(grad_y + i), centered, a, b);
      sum[0] = P::add(sum[0], dt);
      sum[1] = P::fma(dt, centered, sum[1]);
      sum[2] = P::add(sum[2], centered);
      if constexpr (keep) part.store(kept + i, dt);
    };
    Sums::gather(units, channels, segment, of_segment(slot, segment), add);
  }

  template <bool is_kept>
  void scatter(std::int64_t unit, std::int64_t segment) const {
    const T* const x = static_cast<const T*>(args.x) + unit * units.size;
    const T* const grad_y = static_cast<const T*>(args.grad_y) + unit * units.size;
    const A* const kept = kept_at(unit);
    T* const grad_x = static_cast<T*>(args.grad_x) + unit * units.size;
    for_segment<P>(units, segment, {channels.m, channels.a, channels.b, c1, c2, c3},
                   [=](std::int64_t i, std::int64_t count, const F(&k)[6]) {
                     const F centered = P::sub(load_part<P>(x + i, count), k[0]);
                     F dt;
                     if constexpr (is_kept) {
                       dt = load_part<P>(kept + i, count);
                     } else {
                       dt = gradient(load_part<P>(grad_y + i, count), centered, k[1], k[2]);
                     }
                     store_part<P>(grad_x + i, P::fma(k[3], dt, P::fma(k[4], centered, k[5])), count);
                   });
  }
};

template <class T, bool with_silu>
Status backward(const GroupNormBackward& args, int threads) {
  using Worker = Backward<T, with_silu>;
  const Units units(args.shape, true);
  const int team = units.team(threads);
  const bool parameters = args.grad_weight != nullptr || args.grad_bias != nullptr;
  const Workspace<double> space(team, Worker::space(units));
  const Workspace<double> sums(1, units.slots(team) * units.segments * Worker::Sums::per_segment(units));
  const Workspace<double> of_samples(1, parameters ? 2 * args.shape.samples * args.shape.channels : 0);
  // Threads that share units have segments of their own, the same ones of each.
  const std::int64_t room_size = Worker::room_for(args, units);
  const Workspace<Accumulator<T>> room(units.shared(team) ? 1 : team, room_size);
  if (!space.ok() || !sums.ok() || !of_samples.ok() || !room.ok()) return Status::out_of_memory;
  units.for_each(team, [&](int thread) {
    return Worker(args, units, space.of_thread(thread), sums.of_thread(0),
                  parameters ? of_samples.of_thread(0) : nullptr,
                  room_size == 0 ? nullptr : room.of_thread(units.shared(team) ? 0 : thread));
  });
  if (parameters) write_parameters(args, of_samples.of_thread(0));
  return Status::ok;
}

}  // namespace

Status group_norm(const GroupNorm& args, int threads) {
  return with_type_and_activation(args, [&](auto* type, auto with_silu) {
    return forward<std::remove_pointer_t<decltype(type)>, with_silu>(args, threads);
  });
}

Status group_norm_backward(const GroupNormBackward& args, int threads) {
  return with_type_and_activation(args, [&](auto* type, auto with_silu) {
    return backward<std::remove_pointer_t<decltype(type)>, with_silu>(args, threads);
  });
}

}  // namespace gencore::cpu::GENCORE_SIMD

#if GENCORE_SIMD_NUMBER == 0
namespace gencore::cpu {

GENCORE_DECLARE_LEVELS(Status group_norm(const GroupNorm&, int))
GENCORE_DECLARE_LEVELS(Status group_norm_backward(const GroupNormBackward&, int))

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
    scalar::set_zero(args);
    return Status::ok;
  }
  if (args.x == nullptr || args.grad_y == nullptr || args.statistics == nullptr) return Status::invalid_argument;
  if (args.dtype == DType::float64) return scalar::group_norm_backward(args, threads);
  GENCORE_DISPATCH(group_norm_backward, args, threads);
}

}  // namespace gencore::cpu
#endif
