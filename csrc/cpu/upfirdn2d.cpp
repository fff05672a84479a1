// No product with an inserted zero is made: what an output sums up follows from its phase, its number modulo `up`.
//
// Where neighbours in memory are pixels, a row of x is taken apart into `down` rows of every down-th pixel, as float32
// with zeros at both ends. Then a tap of a phase of the output reads neighbours, whatever `up` and `down` are. The few
// rows that an output row needs stand in a ring. Where neighbours are channels, these are a vector's lanes.

#include "gencore/upfirdn2d.h"

#include <algorithm>
#include <vector>

#include "half.h"
#include "tiles.h"
#include "workspace.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// Vectors that a tap is multiplied with at once.
constexpr int vectors = 4;
// Output elements from which on a task is cut into bands of rows.
constexpr std::int64_t of_task = 1 << 15;

inline std::int64_t divide_down(std::int64_t a, std::int64_t b) { return a / b - (a % b < 0); }

template <class E, class A>
struct Term {
  const E* from;
  A weight;
};

template <class E, class A>
using Terms = std::vector<Term<E, A>>;

// result[i] = sum of terms, for `count` vectors from `at` on.
template <class P, int count, class E, class A>
inline void add_up(const Term<E, A>* terms, std::int64_t n, std::int64_t at, typename P::F (&result)[count]) {
  for (auto& one : result) one = P::set(0);
  for (std::int64_t term = 0; term < n; ++term) {
    const typename P::F weight = P::set(terms[term].weight);
    const E* const from = terms[term].from + at;
    GENCORE_UNROLL
    for (int i = 0; i < count; ++i) result[i] = P::fma(weight, P::load(from + i * P::width), result[i]);
  }
}

// Calls body(count, at), count a constant, for blocks of vectors that are n elements, a multiple of a vector's.
template <class P, class Body>
inline void for_blocks(std::int64_t n, Body&& body) {
  std::int64_t at = 0;
  for (; at + vectors * P::width <= n; at += vectors * P::width) body(std::integral_constant<int, vectors>{}, at);
  for (; at < n; at += P::width) body(std::integral_constant<int, 1>{}, at);
}

// The weight that tap k multiplies with.
template <class A>
struct Weights {
  const A* data;
  std::int64_t taps;
  bool flip;

  A operator[](std::int64_t k) const { return data[flip ? k : taps - 1 - k]; }
};

template <class A>
Weights<A> weights_of_row(const Upfirdn2d& args, std::int64_t ky) {
  const std::int64_t taps = args.columns.taps;
  const std::int64_t row = args.separable ? 0 : args.flip ? ky : args.rows.taps - 1 - ky;
  return {static_cast<const A*>(args.filter) + row * taps, taps, args.flip};
}

// How the work is cut: a task is a band of output rows of a plane, or, where neighbours are channels, of a sample.
struct Bands {
  std::int64_t wholes, bands, rows;

  Bands(std::int64_t wholes_, std::int64_t rows_, std::int64_t of_row) : wholes(wholes_), rows(rows_) {
    bands = std::clamp<std::int64_t>(rows * of_row / of_task, 1, rows);
    work = wholes * rows * of_row;
  }

  int team(int threads) const {
    return static_cast<int>(std::clamp<std::int64_t>(std::min(work / Tiles::grain, wholes * bands), 1, threads));
  }

  // Calls worker(whole, first row, end) for every task, with a worker = make_worker(thread) of each thread.
  template <class MakeWorker>
  void for_each(int team, MakeWorker&& make_worker) const {
    const auto run = [&](int thread, int members) {
      auto&& worker = make_worker(thread);
      const std::int64_t tasks = wholes * bands;
      for (std::int64_t task = tasks * thread / members; task < tasks * (thread + 1) / members; ++task) {
        const std::int64_t band = task % bands;
        worker(task / bands, rows * band / bands, rows * (band + 1) / bands);
      }
    };
    if (team == 1) return run(0, 1);
#pragma omp parallel num_threads(team)
    {
#ifdef _OPENMP
      run(omp_get_thread_num(), omp_get_num_threads());
#endif
    }
  }

 private:
  std::int64_t work;
};

// ----------------------------------------------------------------------------------------- neighbours are pixels

// Where tap `tap` of a phase reads: part `part` of a row that was taken apart, `offset` behind the output's number.
struct Reading {
  std::int64_t tap, part, offset;
};

// What every row has in common.
template <class P>
struct RowPlan {
  const ResampledAxis& axis;
  // By phases: those of phase r are from first[r] to first[r + 1].
  std::vector<Reading> readings;
  std::vector<std::int64_t> first;
  // Where a part begins, zeros before it included, and how long it is with those behind.
  std::int64_t before, part_size;

  explicit RowPlan(const ResampledAxis& axis_) : axis(axis_) {
    std::int64_t least = 0, most = 0;
    for (std::int64_t phase = 0; phase < axis.up; ++phase) {
      first.push_back(static_cast<std::int64_t>(readings.size()));
      for (std::int64_t k = 0; k < axis.taps; ++k) {
        const std::int64_t at = phase * axis.down + k - axis.start;
        if (at % axis.up != 0) continue;
        const std::int64_t pixel = at / axis.up, offset = divide_down(pixel, axis.down);
        // Padding and crops may be of any size.
        if (offset >= divide_up(axis.size, axis.down) || offset + outputs() <= 0) continue;
        readings.push_back({k, pixel - offset * axis.down, offset});
        least = std::min(least, offset);
        most = std::max(most, offset);
      }
    }
    first.push_back(static_cast<std::int64_t>(readings.size()));
    before = -least;
    const std::int64_t held = before + rounded(divide_up(axis.size, axis.down));
    part_size = rounded(std::max(held, before + most + rounded(outputs())));
  }

  static std::int64_t rounded(std::int64_t n) { return divide_up(n, P::width) * P::width; }

  // Of a phase, at most.
  std::int64_t outputs() const { return divide_up(axis.out_size, axis.up); }
  std::int64_t row_size() const { return axis.down * part_size; }
};

template <class T>
inline Accumulator<T> widened(T value) {
  if constexpr (sizeof(T) == 2) {
    return to_float(value);
  } else {
    return value;
  }
}

template <class T>
inline T narrowed(Accumulator<T> value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return to_bfloat16(value);
  } else if constexpr (std::is_same_v<T, float16>) {
    return to_float16(value);
  } else {
    return value;
  }
}

// A row of pixels that are `stride` elements apart.
template <class T>
struct PixelRow {
  T* data;
  std::int64_t stride;
};

template <class P, class T, class A>
void take_apart(const RowPlan<P>& plan, PixelRow<const T> row, A* parts) {
  const std::int64_t size = plan.axis.size, down = plan.axis.down;
  A* const first = parts + plan.before;
  if (row.stride == 1 && down == 1) {
    for_vectors<P>(size, [&](std::int64_t i, std::int64_t count) {
      P::store(first + i, load_part<P>(row.data + i, count));
    });
    return;
  }
  if constexpr (P::width > 1) {
    if (row.stride == 1 && down == 2) {
      A* const second = first + plan.part_size;
      for (std::int64_t i = 0; i < size; i += 2 * P::width) {
        typename P::F even, odd;
        const auto low = load_part<P>(row.data + i, size - i);
        const auto high = size - i > P::width ? load_part<P>(row.data + i + P::width, size - i - P::width) : P::set(0);
        P::deinterleave(low, high, even, odd);
        P::store(first + i / 2, even);
        P::store(second + i / 2, odd);
      }
      return;
    }
  }
  for (std::int64_t part = 0; part < down; ++part) {
    A* const to = first + part * plan.part_size;
    for (std::int64_t i = part, j = 0; i < size; i += down, ++j) to[j] = widened(row.data[i * row.stride]);
  }
}

// The outputs of each phase next to those of the others: line[m * up + phase].
template <class P, class A>
void filter_row(const RowPlan<P>& plan, const Terms<A, A>& terms, const std::vector<std::int64_t>& first,
                A* phase_line, A* line) {
  using F = typename P::F;
  const std::int64_t up = plan.axis.up, n = RowPlan<P>::rounded(plan.outputs());
  const auto of_phase = [&](std::int64_t phase) { return first[phase + 1] - first[phase]; };
  const auto sum_up = [&]<int count>(std::int64_t phase, std::int64_t at, F(&sums)[count]) {
    add_up<P>(terms.data() + first[phase], of_phase(phase), at, sums);
  };
  if constexpr (P::width > 1) {
    if (up == 2) {
      for_blocks<P>(n, [&](auto count, std::int64_t at) {
        F even[count], odd[count];
        sum_up(0, at, even);
        sum_up(1, at, odd);
        for (int i = 0; i < count; ++i) {
          F low, high;
          P::interleave(even[i], odd[i], low, high);
          P::store(line + 2 * (at + i * P::width), low);
          P::store(line + 2 * (at + i * P::width) + P::width, high);
        }
      });
      return;
    }
  }
  for (std::int64_t phase = 0; phase < up; ++phase) {
    A* const to = up == 1 ? line : phase_line;
    for_blocks<P>(n, [&](auto count, std::int64_t at) {
      F sums[count];
      sum_up(phase, at, sums);
      for (int i = 0; i < count; ++i) P::store(to + at + i * P::width, sums[i]);
    });
    if (up == 1) return;
    for (std::int64_t m = 0; m < n; ++m) line[m * up + phase] = phase_line[m];
  }
}

template <class T>
class PixelWorker {
  using P = Arithmetic<T>;
  using A = Accumulator<T>;

 public:
  static std::int64_t space(const Upfirdn2d& args, const RowPlan<P>& plan) {
    return (slots(args) + 1) * plan.row_size() + (plan.axis.up + 1) * RowPlan<P>::rounded(plan.outputs());
  }

  PixelWorker(const Upfirdn2d& args, const RowPlan<P>& plan, A* space)
      : args_(args), plan_(plan), ring_(space), combined_(ring_ + slots(args) * plan.row_size()) {
    phase_line_ = combined_ + plan.row_size();
    line_ = phase_line_ + RowPlan<P>::rounded(plan.outputs());
    // The zeros around rows stay.
    std::fill(ring_, phase_line_, A{0});
  }

  void operator()(std::int64_t plane, std::int64_t begin, std::int64_t end) {
    const ResampledAxis &rows = args_.rows, &columns = args_.columns;
    const bool last = args_.channels_last;
    const std::int64_t channels = args_.channels, pixels = rows.size * columns.size;
    const std::int64_t made = rows.out_size * columns.out_size, stride = last ? channels : 1;
    const std::int64_t sample = plane / channels, channel = plane % channels;
    const T* const x = static_cast<const T*>(args_.x) + (last ? sample * channels * pixels + channel : plane * pixels);
    T* const y = static_cast<T*>(args_.y) + (last ? sample * channels * made + channel : plane * made);
    std::int64_t next = 0;
    for (std::int64_t out = begin; out < end; ++out) {
      const MetTaps met = met_taps(rows, static_cast<int>(out));
      // Rows are needed in their order.
      next = std::max<std::int64_t>(next, met.first + met.begin);
      for (; next < met.first + met.end; ++next) {
        take_apart<P>(plan_, PixelRow<const T>{x + next * columns.size * stride, stride}, row(next));
      }
      if (args_.separable) {
        combine_rows(met);
      } else {
        gather_terms(met);
      }
      filter_row(plan_, terms_, first_, phase_line_, line_);
      store({y + out * columns.out_size * stride, stride});
    }
  }

 private:
  static std::int64_t slots(const Upfirdn2d& args) {
    return std::min(divide_up(args.rows.taps, args.rows.up), args.rows.size);
  }

  A* row(std::int64_t number) const { return ring_ + number % slots(args_) * plan_.row_size(); }

  // A term for each of the filter's taps that meet rows.
  void gather_terms(const MetTaps& met) {
    terms_.clear();
    first_.clear();
    for (std::int64_t phase = 0; phase < plan_.axis.up; ++phase) {
      first_.push_back(static_cast<std::int64_t>(terms_.size()));
      for (int i = met.begin; i < met.end; ++i) {
        add_terms(phase, row(met.first + i), weights_of_row<A>(args_, met.first_tap + i * args_.rows.up));
      }
    }
    first_.push_back(static_cast<std::int64_t>(terms_.size()));
  }

  void add_terms(std::int64_t phase, const A* parts, const Weights<A>& weights) {
    for (std::int64_t i = plan_.first[phase]; i < plan_.first[phase + 1]; ++i) {
      const Reading& reading = plan_.readings[i];
      const A* const part = parts + reading.part * plan_.part_size + plan_.before;
      terms_.push_back({part + reading.offset, weights[reading.tap]});
    }
  }

  // The rows become one, which is filtered along itself.
  void combine_rows(const MetTaps& met) {
    const Weights<A> weights = weights_of_row<A>(args_, 0);
    terms_.clear();
    for (int i = met.begin; i < met.end; ++i) {
      terms_.push_back({row(met.first + i), weights[met.first_tap + i * args_.rows.up]});
    }
    const std::int64_t n = plan_.row_size(), terms = static_cast<std::int64_t>(terms_.size());
    for_blocks<P>(n, [&](auto count, std::int64_t at) {
      typename P::F sums[count];
      add_up<P>(terms_.data(), terms, at, sums);
      for (int i = 0; i < count; ++i) P::store(combined_ + at + i * P::width, sums[i]);
    });
    terms_.clear();
    for (std::int64_t phase = 0; phase < plan_.axis.up; ++phase) add_terms(phase, combined_, weights);
    first_ = plan_.first;
  }

  void store(PixelRow<T> to) const {
    const A gain = static_cast<A>(args_.gain);
    const std::int64_t n = plan_.axis.out_size;
    if (to.stride == 1) {
      const auto factor = P::set(gain);
      for_vectors<P>(n, [&](std::int64_t i, std::int64_t count) {
        store_part<P>(to.data + i, P::mul(factor, P::load(line_ + i)), count);
      });
      return;
    }
    for (std::int64_t i = 0; i < n; ++i) to.data[i * to.stride] = narrowed<T>(gain * line_[i]);
  }

  const Upfirdn2d& args_;
  const RowPlan<P>& plan_;
  A *ring_, *combined_, *phase_line_, *line_;
  Terms<A, A> terms_;
  std::vector<std::int64_t> first_;
};

template <class T>
Status along_pixels(const Upfirdn2d& args, int threads) {
  using P = Arithmetic<T>;
  using A = Accumulator<T>;
  const RowPlan<P> plan(args.columns);
  const Bands bands(args.samples * args.channels, args.rows.out_size, args.columns.out_size);
  const int team = bands.team(threads);
  const Workspace<A> space(team, PixelWorker<T>::space(args, plan));
  if (!space.ok()) return Status::out_of_memory;
  bands.for_each(team, [&](int thread) { return PixelWorker<T>(args, plan, space.of_thread(thread)); });
  return Status::ok;
}

// --------------------------------------------------------------------------------------- neighbours are channels

template <class T>
class ChannelWorker {
  using P = Arithmetic<T>;
  using A = Accumulator<T>;

 public:
  // Channels of a block, of a row of which the sums over rows of the filter stay in cache.
  static std::int64_t block(const Upfirdn2d& args) {
    constexpr std::int64_t most = 1 << 13;
    const std::int64_t wanted = std::clamp<std::int64_t>(most / args.columns.size, P::width, args.channels);
    return wanted / P::width * P::width;
  }

  ChannelWorker(const Upfirdn2d& args, const std::vector<MetTaps>& columns, A* space)
      : args_(args), columns_(columns), combined_(space) {}

  void operator()(std::int64_t sample, std::int64_t begin, std::int64_t end) {
    const ResampledAxis &rows = args_.rows, &columns = args_.columns;
    const std::int64_t row = columns.size * args_.channels, out_row = columns.out_size * args_.channels;
    const T* const x = static_cast<const T*>(args_.x) + sample * rows.size * row;
    T* const y = static_cast<T*>(args_.y) + sample * rows.out_size * out_row;
    for (std::int64_t out = begin; out < end; ++out) {
      const MetTaps met = met_taps(rows, static_cast<int>(out));
      if (args_.separable) {
        one_after_another(met, x, y + out * out_row);
      } else {
        at_once(met, x, y + out * out_row);
      }
    }
  }

 private:
  void at_once(const MetTaps& met, const T* x, T* y) {
    const std::int64_t channels = args_.channels, row = args_.columns.size * channels;
    for (const MetTaps& column : columns_) {
      pixels_.clear();
      for (int i = met.begin; i < met.end; ++i) {
        const Weights<A> weights = weights_of_row<A>(args_, met.first_tap + i * args_.rows.up);
        for (int j = column.begin; j < column.end; ++j) {
          pixels_.push_back({x + (met.first + i) * row + (column.first + j) * channels,
                             weights[column.first_tap + j * args_.columns.up]});
        }
      }
      write(pixels_, channels, y);
      y += channels;
    }
  }

  void one_after_another(const MetTaps& met, const T* x, T* y) {
    const std::int64_t channels = args_.channels, width = args_.columns.size, size = block(args_);
    const Weights<A> weights = weights_of_row<A>(args_, 0);
    for (std::int64_t begin = 0; begin < channels; begin += size) {
      // The last block begins earlier, and some channels are made twice.
      const std::int64_t channel = std::min(begin, channels - size);
      for (std::int64_t ix = 0; ix < width; ++ix) {
        pixels_.clear();
        for (int i = met.begin; i < met.end; ++i) {
          pixels_.push_back({x + ((met.first + i) * width + ix) * channels + channel,
                             weights[met.first_tap + i * args_.rows.up]});
        }
        const std::int64_t terms = static_cast<std::int64_t>(pixels_.size());
        for_blocks<P>(size, [&](auto count, std::int64_t at) {
          typename P::F sums[count];
          add_up<P>(pixels_.data(), terms, at, sums);
          for (int i = 0; i < count; ++i) P::store(combined_ + ix * size + at + i * P::width, sums[i]);
        });
      }
      for (std::size_t ox = 0; ox < columns_.size(); ++ox) {
        const MetTaps& column = columns_[ox];
        sums_.clear();
        for (int j = column.begin; j < column.end; ++j) {
          sums_.push_back({combined_ + (column.first + j) * size, weights[column.first_tap + j * args_.columns.up]});
        }
        write(sums_, size, y + static_cast<std::int64_t>(ox) * channels + channel);
      }
    }
  }

  // At least a vector of channels.
  template <class E>
  void write(const Terms<E, A>& terms, std::int64_t channels, T* y) const {
    const auto gain = P::set(static_cast<A>(args_.gain));
    const std::int64_t n = static_cast<std::int64_t>(terms.size()), even = channels / P::width * P::width;
    const auto block = [&](auto count, std::int64_t at) {
      typename P::F sums[count];
      add_up<P>(terms.data(), n, at, sums);
      for (int i = 0; i < count; ++i) P::store(y + at + i * P::width, P::mul(gain, sums[i]));
    };
    for_blocks<P>(even, block);
    if (even < channels) block(std::integral_constant<int, 1>{}, channels - P::width);
  }

  const Upfirdn2d& args_;
  const std::vector<MetTaps>& columns_;
  A* combined_;
  Terms<T, A> pixels_;
  Terms<A, A> sums_;
};

template <class T>
Status along_channels(const Upfirdn2d& args, int threads) {
  using A = Accumulator<T>;
  std::vector<MetTaps> columns;
  for (std::int64_t ox = 0; ox < args.columns.out_size; ++ox) columns.push_back(met_taps(args.columns, static_cast<int>(ox)));
  const Bands bands(args.samples, args.rows.out_size, args.columns.out_size * args.channels);
  const int team = bands.team(threads);
  const std::int64_t combined = args.separable ? args.columns.size * ChannelWorker<T>::block(args) : 0;
  const Workspace<A> space(team, combined);
  if (!space.ok()) return Status::out_of_memory;
  bands.for_each(team, [&](int thread) { return ChannelWorker<T>(args, columns, space.of_thread(thread)); });
  return Status::ok;
}

}  // namespace

Status upfirdn2d(const Upfirdn2d& args, int threads) {
  return with_type_of_level(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool fills_vectors = args.channels_last && args.channels >= Arithmetic<T>::width;
    return fills_vectors ? along_channels<T>(args, threads) : along_pixels<T>(args, threads);
  });
}

}  // namespace gencore::cpu::GENCORE_SIMD

#if GENCORE_SIMD_NUMBER == 0
namespace gencore::cpu {

GENCORE_DECLARE_LEVELS(Status upfirdn2d(const Upfirdn2d&, int))

Status upfirdn2d(const Upfirdn2d& args, int threads) {
  if (!is_valid(args) || threads < 1) return Status::invalid_argument;
  if (args.samples == 0 || args.channels == 0) return Status::ok;
  if (args.x == nullptr || args.y == nullptr || args.filter == nullptr) return Status::invalid_argument;
  if (args.dtype == DType::float64) return scalar::upfirdn2d(args, threads);
  GENCORE_DISPATCH(upfirdn2d, args, threads);
}

}  // namespace gencore::cpu
#endif
