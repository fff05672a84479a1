// Group norm's derivatives beyond the gradient: along a direction, and of the gradient.
#include "channel_sums.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// What both have: the change dt of the activation's argument t along the direction.
template <class T, class Args, int terms>
struct Along {
  using P = Arithmetic<T>;
  using A = Accumulator<T>;
  using F = typename P::F;
  // The first three terms: d_x, d_x (x - m) and x - m.
  using Sums = ChannelSums<T, terms>;

  const Args& args;
  const Units& units;
  Channels<T> channels;
  // dt = e1 d_x + e2 (x - m) + e3; in channels_last repeated to fill a row.
  A *e1, *e2, *e3;
  // The direction's values, and the changes that follow for a and b.
  double *d_weight, *d_bias, *d_scale, *d_shift, *d_bias_in, *d_a, *d_b;
  // The sums of a unit's channels, `terms` lists, and those of each segment.
  double *of_channel, *of_segments;

  static std::int64_t space(const Units& units) {
    return Channels<T>::space(units) + 3 * units.row + (7 + terms) * units.channels;
  }

  Along(const Args& args_, const Units& units_, double* space, double* of_segments_)
      : args(args_), units(units_), channels(space, units), of_segments(of_segments_) {
    double* next = space + Channels<T>::space(units);
    for (A** column : {&e1, &e2, &e3}) {
      *column = reinterpret_cast<A*>(next);
      next += units.row;
    }
    for (double** values : {&d_weight, &d_bias, &d_scale, &d_shift, &d_bias_in, &d_a, &d_b}) {
      *values = next;
      next += units.channels;
    }
    of_channel = next;
  }

  void begin(std::int64_t unit) {
    channels.read(args, units, unit);
    const GroupNormDirection& to = args.direction;
    const std::int64_t n = units.sample(unit), first = units.channel(unit), count = units.channels;
    read_channels(to.weight, n, first, count, 0, d_weight);
    read_channels(to.bias, n, first, count, 0, d_bias);
    read_channels(to.scale, n, first, count, 0, d_scale);
    read_channels(to.shift, n, first, count, 0, d_shift);
    read_channels(to.bias_in, n, first, count, 0, d_bias_in);
    for (std::int64_t c = 0; c < count; ++c) {
      d_a[c] = d_weight[c] * (1 + channels.scale[c]) + channels.weight[c] * d_scale[c];
      d_b[c] = d_bias[c] * (1 + channels.scale[c]) + channels.bias[c] * d_scale[c] + d_shift[c];
    }
  }

 protected:
  double* of_segment(std::int64_t slot, std::int64_t segment) const {
    return of_segments + (slot * units.segments + segment) * Sums::per_segment(units);
  }
  double* of_term(int term) const { return of_channel + term * units.channels; }

  const T* x(std::int64_t unit) const { return static_cast<const T*>(args.x) + unit * units.size; }
  // Where there is no d_x, numbers that count for nothing.
  bool moves() const { return args.direction.x != nullptr; }
  const T* d_x(std::int64_t unit) const {
    return moves() ? static_cast<const T*>(args.direction.x) + unit * units.size : x(unit);
  }

  double a(std::int64_t c) const { return channels.weight[c] * (1 + channels.scale[c]); }

  // A group of the unit, the channels begin to end - 1, and the means over its elements of du = d_x + d_bias_in and of
  // du xhat.
  struct Group {
    std::int64_t begin, end;
    double inverse, pixels, size, mean_du, mean_du_xhat;

    template <class Term>
    double mean(Term&& term) const {
      return sum_of(begin, end, term) / size;
    }
  };

  // After of_channels: e1, e2 and e3; the first three terms' sums become those of du, du xhat and xhat.
  Group finish_change(std::int64_t unit, std::int64_t g) const {
    const std::int64_t in_group = units.channels / units.groups;
    Group group{};
    group.begin = g * in_group;
    group.end = group.begin + in_group;
    group.inverse = args.statistics[2 * (unit * units.groups + g) + 1];
    group.pixels = static_cast<double>(units.pixels);
    group.size = group.pixels * static_cast<double>(in_group);
    const double inverse = group.inverse;
    double *const du = of_term(0), *const du_xhat = of_term(1), *const xhat = of_term(2);
    for (std::int64_t c = group.begin; c < group.end; ++c) {
      const double of_d_x = moves() ? du[c] : 0, of_d_x_centered = moves() ? du_xhat[c] : 0;
      xhat[c] = inverse * (xhat[c] + channels.rest[c] * group.pixels);
      du[c] = of_d_x + d_bias_in[c] * group.pixels;
      du_xhat[c] = inverse * (of_d_x_centered + channels.rest[c] * of_d_x) + d_bias_in[c] * xhat[c];
    }
    group.mean_du = group.mean([&](std::int64_t c) { return du[c]; });
    group.mean_du_xhat = group.mean([&](std::int64_t c) { return du_xhat[c]; });
    for (std::int64_t c = group.begin; c < group.end; ++c) {
      const double factor = inverse * a(c), of_xhat = d_a[c] - factor * group.mean_du_xhat;
      e1[c] = static_cast<A>(moves() ? factor : 0);
      e2[c] = static_cast<A>(inverse * of_xhat);
      e3[c] = static_cast<A>(factor * (d_bias_in[c] - group.mean_du) + inverse * channels.rest[c] * of_xhat + d_b[c]);
    }
    return group;
  }
};

template <class T, bool with_silu>
struct Jvp : Along<T, GroupNormJvp, 3> {
  using Base = Along<T, GroupNormJvp, 3>;
  using Base::args, Base::units, Base::channels, Base::e1, Base::e2, Base::e3;
  using typename Base::F, typename Base::P, typename Base::Sums;

  using Base::Base;

  void gather(std::int64_t unit, std::int64_t segment, std::int64_t slot) const {
    const T *const x = Base::x(unit), *const d_x = Base::d_x(unit);
    const auto add = [=](auto part, F(&sum)[3], std::int64_t i, F m, F, F) {
      const F centered = P::sub(part.load(x + i), m), d = part.load(d_x + i);
      sum[0] = P::add(sum[0], d);
      sum[1] = P::fma(d, centered, sum[1]);
      sum[2] = P::add(sum[2], centered);
    };
    Sums::gather(units, channels, segment, Base::of_segment(slot, segment), add);
  }

  void finish(std::int64_t unit, std::int64_t slot, bool) const {
    Sums::of_channels(units, Base::of_segment(slot, 0), Base::of_channel);
    for (std::int64_t g = 0; g < units.groups; ++g) Base::finish_change(unit, g);
    if (units.channels_last) Channels<T>::fill_row(units, {e1, e2, e3});
  }

  void scatter(std::int64_t unit, std::int64_t segment) const {
    const T *const x = Base::x(unit), *const d_x = Base::d_x(unit);
    T* const d_y = static_cast<T*>(args.d_y) + unit * units.size;
    for_segment<P>(units, segment, {channels.m, channels.a, channels.b, e1, e2, e3},
                   [=](std::int64_t i, std::int64_t count, const F(&k)[6]) {
                     const F centered = P::sub(load_part<P>(x + i, count), k[0]);
                     F change = P::fma(k[3], load_part<P>(d_x + i, count), P::fma(k[4], centered, k[5]));
                     if constexpr (with_silu) {
                       const F t = P::fma(centered, k[1], k[2]);
                       change = P::mul(Silu<P>().first(t), change);
                     }
                     store_part<P>(d_y + i, change, count);
                   });
  }
};

// With h = grad_y act'(t) and p = grad_y act''(t), the terms are d, d c, c, h, h c, h d, p, p c, p c c, p d and p d c,
// where d is d_x and c is x - m: k = p dt is linear in them, so that no sum must wait for another one.
template <class T, bool with_silu>
struct DoubleBackward : Along<T, GroupNormDoubleBackward, with_silu ? 11 : 6> {
  static constexpr int terms = with_silu ? 11 : 6;
  using Base = Along<T, GroupNormDoubleBackward, terms>;
  using Base::args, Base::units, Base::channels, Base::e1, Base::e2, Base::e3, Base::of_term, Base::a, Base::d_a,
      Base::d_b, Base::d_weight, Base::d_bias, Base::d_scale, Base::d_bias_in;
  using typename Base::A, typename Base::F, typename Base::P, typename Base::Sums, typename Base::Group;

  // grad_x = channels.a k + e2 h + f1 d_x + f2 (x - m) + f3; in channels_last repeated to fill a row.
  A *f1, *f2, *f3;
  // For each sample and channel the parts of the gradients for weight and bias; null if nobody wants them.
  double* of_samples;

  static std::int64_t space(const Units& units) { return Base::space(units) + 3 * units.row; }

  DoubleBackward(const GroupNormDoubleBackward& args_, const Units& units_, double* space, double* of_segments_,
                 double* of_samples_)
      : Base(args_, units_, space, of_segments_), of_samples(of_samples_) {
    double* const more = space + Base::space(units);
    f1 = reinterpret_cast<A*>(more);
    f2 = reinterpret_cast<A*>(more + units.row);
    f3 = reinterpret_cast<A*>(more + 2 * units.row);
  }

  void gather(std::int64_t unit, std::int64_t segment, std::int64_t slot) const {
    if (kept_at(unit) == nullptr) {
      gather<false>(unit, segment, slot);
    } else {
      gather<true>(unit, segment, slot);
    }
  }

  void finish(std::int64_t unit, std::int64_t slot, bool writes) const {
    Sums::of_channels(units, Base::of_segment(slot, 0), Base::of_channel);
    for (std::int64_t g = 0; g < units.groups; ++g) finish_group(unit, Base::finish_change(unit, g), writes);
    if (units.channels_last) Channels<T>::fill_row(units, {e1, e2, e3, f1, f2, f3});
  }

  void scatter(std::int64_t unit, std::int64_t segment) const {
    if (args.grad_grad_y == nullptr && args.grad_x == nullptr) return;
    if (kept_at(unit) == nullptr) {
      scatter<false>(unit, segment);
    } else {
      scatter<true>(unit, segment);
    }
  }

 private:
  const T* grad_y(std::int64_t unit) const { return static_cast<const T*>(args.grad_y) + unit * units.size; }
  T* result(void* tensor, std::int64_t unit) const {
    return tensor == nullptr ? nullptr : static_cast<T*>(tensor) + unit * units.size;
  }

  // Where sigmoid(t) is kept, which takes longer to compute than to read again: in a result, if its type can hold it.
  A* kept_at(std::int64_t unit) const {
    if constexpr (with_silu && std::is_same_v<T, A>) {
      return result(args.grad_grad_y != nullptr ? args.grad_grad_y : args.grad_x, unit);
    }
    return nullptr;
  }

  template <bool keep>
  void gather(std::int64_t unit, std::int64_t segment, std::int64_t slot) const {
    const T *const x = Base::x(unit), *const d_x = Base::d_x(unit), *const grad_y = this->grad_y(unit);
    A* const kept = kept_at(unit);
    const auto add = [=](auto part, F(&sum)[terms], std::int64_t i, F m, F factor, F offset) {
      const F c = P::sub(part.load(x + i), m), d = part.load(d_x + i);
      F h = part.load(grad_y + i);
      if constexpr (with_silu) {
        const F t = P::fma(c, factor, offset), s = Silu<P>::sigmoid(t);
        const F p = P::mul(h, Silu<P>::second(t, s)), p_c = P::mul(p, c);
        if constexpr (keep) part.store(kept + i, s);
        h = P::mul(h, Silu<P>::first(t, s));
        sum[6] = P::add(sum[6], p);
        sum[7] = P::add(sum[7], p_c);
        sum[8] = P::fma(p_c, c, sum[8]);
        sum[9] = P::fma(p, d, sum[9]);
        sum[10] = P::fma(p_c, d, sum[10]);
      }
      sum[0] = P::add(sum[0], d);
      sum[1] = P::fma(d, c, sum[1]);
      sum[2] = P::add(sum[2], c);
      sum[3] = P::add(sum[3], h);
      sum[4] = P::fma(h, c, sum[4]);
      sum[5] = P::fma(h, d, sum[5]);
    };
    Sums::gather(units, channels, segment, Base::of_segment(slot, segment), add);
  }

  // The sums over a channel's pixels of h, h xhat, h d_xhat, k and k xhat.
  struct OfChannel {
    double h, h_xhat, h_change, k, k_xhat;
  };

  void finish_group(std::int64_t unit, const Group& group, bool writes) const {
    const double inverse = group.inverse;
    double *const h = of_term(3), *const h_xhat = of_term(4), *const h_du = of_term(5);
    for (std::int64_t c = group.begin; c < group.end; ++c) {
      h_xhat[c] = inverse * (h_xhat[c] + channels.rest[c] * h[c]);
      h_du[c] = (Base::moves() ? h_du[c] : 0) + d_bias_in[c] * h[c];
    }
    const double mean_q = group.mean([&](std::int64_t c) { return a(c) * h[c]; });
    const double mean_q_xhat = group.mean([&](std::int64_t c) { return a(c) * h_xhat[c]; });
    const double mean_q_du = group.mean([&](std::int64_t c) { return a(c) * h_du[c]; });
    // That of a h d_xhat, over inverse.
    const double cross = mean_q_du - group.mean_du * mean_q - group.mean_du_xhat * mean_q_xhat;
    // Of v.
    const double mean_v = group.mean([&](std::int64_t c) { return a(c) * of(group, c).k + d_a[c] * h[c]; }) -
                          inverse * (mean_q_xhat * group.mean_du + group.mean_du_xhat * mean_q);
    const double mean_v_xhat = group.mean([&](std::int64_t c) {
      return a(c) * of(group, c).k_xhat + d_a[c] * h_xhat[c];
    }) - 2 * inverse * mean_q_xhat * group.mean_du_xhat;
    const double of_xhat = mean_v_xhat + inverse * cross;
    for (std::int64_t c = group.begin; c < group.end; ++c) {
      f1[c] = static_cast<A>(Base::moves() ? -inverse * inverse * mean_q_xhat : 0);
      f2[c] = static_cast<A>(-inverse * inverse * of_xhat);
      f3[c] = static_cast<A>(-inverse *
                             (inverse * mean_q_xhat * d_bias_in[c] + mean_v + inverse * channels.rest[c] * of_xhat));
    }
    if (!writes) return;
    const std::int64_t first = units.sample(unit) * args.shape.channels + units.channel(unit);
    const double *const du = of_term(0), *const xhat = of_term(2);
    for (std::int64_t c = group.begin; c < group.end; ++c) {
      const OfChannel sums = of(group, c);
      const double grad_a = sums.k_xhat + sums.h_change, grad_b = sums.k;
      const std::int64_t at = first + c;
      if (of_samples != nullptr) {
        of_samples[2 * at] = (1 + channels.scale[c]) * grad_a + d_scale[c] * sums.h_xhat;
        of_samples[2 * at + 1] = (1 + channels.scale[c]) * grad_b + d_scale[c] * sums.h;
      }
      if (args.grad_scale != nullptr) {
        write(args.grad_scale, args.scale.dtype, at,
              channels.weight[c] * grad_a + channels.bias[c] * grad_b + d_weight[c] * sums.h_xhat + d_bias[c] * sums.h);
      }
      if (args.grad_shift != nullptr) write(args.grad_shift, args.shift.dtype, at, grad_b);
      if (args.grad_bias_in != nullptr) {
        const double of_v =
            a(c) * sums.k + d_a[c] * sums.h - inverse * (mean_q_xhat * du[c] + group.mean_du_xhat * a(c) * sums.h);
        write(args.grad_bias_in, args.bias_in.dtype, at, inverse * (of_v - group.pixels * mean_v - xhat[c] * of_xhat));
      }
    }
  }

  OfChannel of(const Group& group, std::int64_t c) const {
    const double inverse = group.inverse, rest = channels.rest[c], h = of_term(3)[c], h_xhat = of_term(4)[c];
    const double h_change = inverse * (of_term(5)[c] - group.mean_du * h - group.mean_du_xhat * h_xhat);
    if constexpr (!with_silu) return {h, h_xhat, h_change, 0, 0};
    const double p = of_term(6)[c], p_c = of_term(7)[c], p_c_c = of_term(8)[c];
    const double p_d = Base::moves() ? of_term(9)[c] : 0, p_d_c = Base::moves() ? of_term(10)[c] : 0;
    const double p_xhat = inverse * (p_c + rest * p), p_du = p_d + d_bias_in[c] * p;
    const double p_xhat_xhat = inverse * inverse * (p_c_c + rest * (2 * p_c + rest * p));
    const double p_du_xhat = inverse * (p_d_c + rest * p_d) + d_bias_in[c] * p_xhat;
    const double factor = inverse * a(c);
    return {h, h_xhat, h_change,
            factor * (p_du - group.mean_du * p - group.mean_du_xhat * p_xhat) + d_a[c] * p_xhat + d_b[c] * p,
            factor * (p_du_xhat - group.mean_du * p_xhat - group.mean_du_xhat * p_xhat_xhat) + d_a[c] * p_xhat_xhat +
                d_b[c] * p_xhat};
  }

  template <bool is_kept>
  void scatter(std::int64_t unit, std::int64_t segment) const {
    const T *const x = Base::x(unit), *const d_x = Base::d_x(unit), *const grad_y = this->grad_y(unit);
    const A* const kept = kept_at(unit);
    T *const grad_grad_y = result(args.grad_grad_y, unit), *const grad_x = result(args.grad_x, unit);
    const auto body = [=](std::int64_t i, std::int64_t count, const F(&k)[9]) {
      const F c = P::sub(load_part<P>(x + i, count), k[0]), d = load_part<P>(d_x + i, count);
      F h = load_part<P>(grad_y + i, count), change = P::fma(k[3], d, P::fma(k[4], c, k[5]));
      F into = P::fma(k[6], d, P::fma(k[7], c, k[8]));
      if constexpr (with_silu) {
        const F t = P::fma(c, k[1], k[2]);
        F s;
        if constexpr (is_kept) {
          s = load_part<P>(kept + i, count);
        } else {
          s = Silu<P>::sigmoid(t);
        }
        const F first = Silu<P>::first(t, s), p = P::mul(h, Silu<P>::second(t, s));
        into = P::fma(k[1], P::mul(p, change), into);
        h = P::mul(h, first);
        change = P::mul(first, change);
      }
      if (grad_grad_y != nullptr) store_part<P>(grad_grad_y + i, change, count);
      if (grad_x != nullptr) store_part<P>(grad_x + i, P::fma(k[4], h, into), count);
    };
    for_segment<P>(units, segment, {channels.m, channels.a, channels.b, e1, e2, e3, f1, f2, f3}, body);
  }
};

template <class T, bool with_silu>
Status jvp(const GroupNormJvp& args, int threads) {
  using Worker = Jvp<T, with_silu>;
  const Units units(args.shape, true);
  const int team = units.team(threads);
  const Workspace<double> space(team, Worker::space(units));
  const Workspace<double> sums(1, units.slots(team) * units.segments * Worker::Sums::per_segment(units));
  if (!space.ok() || !sums.ok()) return Status::out_of_memory;
  units.for_each(team, [&](int thread) { return Worker(args, units, space.of_thread(thread), sums.of_thread(0)); });
  return Status::ok;
}

template <class T, bool with_silu>
Status double_backward(const GroupNormDoubleBackward& args, int threads) {
  using Worker = DoubleBackward<T, with_silu>;
  const Units units(args.shape, true);
  const int team = units.team(threads);
  const bool parameters = args.grad_weight != nullptr || args.grad_bias != nullptr;
  const Workspace<double> space(team, Worker::space(units));
  const Workspace<double> sums(1, units.slots(team) * units.segments * Worker::Sums::per_segment(units));
  const Workspace<double> of_samples(1, parameters ? 2 * args.shape.samples * args.shape.channels : 0);
  if (!space.ok() || !sums.ok() || !of_samples.ok()) return Status::out_of_memory;
  units.for_each(team, [&](int thread) {
    return Worker(args, units, space.of_thread(thread), sums.of_thread(0),
                  parameters ? of_samples.of_thread(0) : nullptr);
  });
  if (parameters) write_parameters(args, of_samples.of_thread(0));
  return Status::ok;
}

}  // namespace

Status group_norm_jvp(const GroupNormJvp& args, int threads) {
  return with_type_and_activation(args, [&](auto* type, auto with_silu) {
    return jvp<std::remove_pointer_t<decltype(type)>, with_silu>(args, threads);
  });
}

Status group_norm_double_backward(const GroupNormDoubleBackward& args, int threads) {
  return with_type_and_activation(args, [&](auto* type, auto with_silu) {
    return double_backward<std::remove_pointer_t<decltype(type)>, with_silu>(args, threads);
  });
}

}  // namespace gencore::cpu::GENCORE_SIMD

#if GENCORE_SIMD_NUMBER == 0
namespace gencore::cpu {

GENCORE_DECLARE_LEVELS(Status group_norm_jvp(const GroupNormJvp&, int))
GENCORE_DECLARE_LEVELS(Status group_norm_double_backward(const GroupNormDoubleBackward&, int))

Status group_norm_jvp(const GroupNormJvp& args, int threads) {
  if (threads < 1 || !is_valid(args.shape) || !has_valid_changes(args)) return Status::invalid_argument;
  if (args.shape.samples * args.shape.channels * args.shape.pixels == 0) return Status::ok;
  if (args.x == nullptr || args.d_y == nullptr || args.statistics == nullptr) return Status::invalid_argument;
  if (args.dtype == DType::float64) return scalar::group_norm_jvp(args, threads);
  GENCORE_DISPATCH(group_norm_jvp, args, threads);
}

Status group_norm_double_backward(const GroupNormDoubleBackward& args, int threads) {
  if (threads < 1 || !is_valid(args.shape) || !has_valid_changes(args)) return Status::invalid_argument;
  if (args.shape.samples * args.shape.channels * args.shape.pixels == 0) {
    scalar::set_zero(args);
    return Status::ok;
  }
  if (args.x == nullptr || args.grad_y == nullptr || args.statistics == nullptr) return Status::invalid_argument;
  if (args.dtype == DType::float64) return scalar::group_norm_double_backward(args, threads);
  GENCORE_DISPATCH(group_norm_double_backward, args, threads);
}

}  // namespace gencore::cpu
#endif
