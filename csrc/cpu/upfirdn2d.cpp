// No product with an inserted zero is made: what an output sums up follows from its phase, its number modulo `up`.
//
// Where neighbours in memory are pixels, a row of x is taken apart into `down` rows of every down-th pixel, as float32
// with zeros at both ends. Then a tap of a phase of the output reads neighbours, whatever `up` and `down` are. The few
// rows that an output row needs stand in a ring. Where neighbours are channels, these are a vector's lanes; images so
// small that their rows fill no vector are transposed, so that planes are.

#include "gencore/upfirdn2d.h"

#include <algorithm>
#include <type_traits>
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

// Where a tap reads, behind the first element of a row.
struct Reading {
  std::int64_t at, tap;
};

// Readings of several outputs: those of number n are from first[n] to first[n + 1].
struct Readings {
  std::vector<Reading> all;
  std::vector<std::int64_t> first{0};

  void end() { first.push_back(static_cast<std::int64_t>(all.size())); }
};

// The filter in the order in which taps meet pixels.
template <class A>
struct Weights {
  std::vector<A> all;
  std::int64_t row_size;

  explicit Weights(const Upfirdn2d& args) : row_size(args.columns.taps) {
    const std::int64_t size = args.separable ? row_size : args.rows.taps * row_size;
    const A* const filter = static_cast<const A*>(args.filter);
    all.assign(filter, filter + size);
    if (!args.flip) std::reverse(all.begin(), all.end());
  }

  const A* row(std::int64_t ky) const { return all.data() + ky * row_size; }
};

// Rows that an output row is made of, and the weights for the readings of each.
template <class E, class A>
struct Rows {
  std::vector<const E*> from;
  std::vector<const A*> weights;
};

// sums = sum over rows and readings of weight * element, for `count` vectors from `at` on.
template <class P, int count, class E, class A>
inline void add_up(const Rows<E, A>& rows, const Readings& readings, std::int64_t number, std::int64_t at,
                   typename P::F (&sums)[count]) {
  for (auto& sum : sums) sum = P::set(0);
  const Reading* const begin = readings.all.data() + readings.first[number];
  const Reading* const end = readings.all.data() + readings.first[number + 1];
  for (std::size_t row = 0; row < rows.from.size(); ++row) {
    const E* const from = rows.from[row] + at;
    const A* const weights = rows.weights[row];
    for (const Reading* reading = begin; reading < end; ++reading) {
      const typename P::F weight = P::set(weights[reading->tap]);
      const E* const elements = from + reading->at;
      GENCORE_UNROLL
      for (int i = 0; i < count; ++i) sums[i] = P::fma(weight, P::load(elements + i * P::width), sums[i]);
    }
  }
}

// The same of one element of each row, each of whose weights is one.
template <class P, int count, class E, class A>
inline void add_rows(const Rows<E, A>& rows, std::int64_t at, typename P::F (&sums)[count]) {
  for (auto& sum : sums) sum = P::set(0);
  for (std::size_t row = 0; row < rows.from.size(); ++row) {
    const typename P::F weight = P::set(*rows.weights[row]);
    const E* const elements = rows.from[row] + at;
    GENCORE_UNROLL
    for (int i = 0; i < count; ++i) sums[i] = P::fma(weight, P::load(elements + i * P::width), sums[i]);
  }
}

// Calls body(count, at), count a constant, for blocks of vectors that are n elements, a multiple of a vector's.
template <class P, class Body>
inline void for_blocks(std::int64_t n, Body&& body) {
  std::int64_t at = 0;
  for (; at + vectors * P::width <= n; at += vectors * P::width) body(std::integral_constant<int, vectors>{}, at);
  for (; at < n; at += P::width) body(std::integral_constant<int, 1>{}, at);
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

// What every row has in common.
template <class P>
struct RowPlan {
  const ResampledAxis& axis;
  // Of phases.
  Readings readings;
  // Zeros before a part, and how long it is with these and those behind.
  std::int64_t before, part_size;

  explicit RowPlan(const ResampledAxis& axis_) : axis(axis_) {
    std::int64_t least = 0, most = 0;
    // First by parts and offsets in them, as the size of a part follows from these.
    std::vector<std::int64_t> parts;
    for (std::int64_t phase = 0; phase < axis.up; ++phase) {
      for (std::int64_t k = 0; k < axis.taps; ++k) {
        const std::int64_t at = phase * axis.down + k - axis.start;
        if (at % axis.up != 0) continue;
        const std::int64_t pixel = at / axis.up, offset = divide_down(pixel, axis.down);
        // Padding and crops may be of any size.
        if (offset >= divide_up(axis.size, axis.down) || offset + outputs() <= 0) continue;
        readings.all.push_back({offset, k});
        parts.push_back(pixel - offset * axis.down);
        least = std::min(least, offset);
        most = std::max(most, offset);
      }
      readings.end();
    }
    before = -least;
    part_size = rounded(before + std::max(rounded(divide_up(axis.size, axis.down)), most + rounded(outputs())));
    for (std::size_t i = 0; i < parts.size(); ++i) readings.all[i].at += parts[i] * part_size + before;
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
    for_vectors<P>(size,
                   [&](std::int64_t i, std::int64_t count) { P::store(first + i, load_part<P>(row.data + i, count)); });
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
void filter_row(const RowPlan<P>& plan, const Rows<A, A>& rows, A* phase_line, A* line) {
  using F = typename P::F;
  const std::int64_t up = plan.axis.up, n = RowPlan<P>::rounded(plan.outputs());
  if constexpr (P::width > 1) {
    if (up == 2) {
      for_blocks<P>(n, [&](auto count, std::int64_t at) {
        F even[count], odd[count];
        add_up<P>(rows, plan.readings, 0, at, even);
        add_up<P>(rows, plan.readings, 1, at, odd);
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
      add_up<P>(rows, plan.readings, phase, at, sums);
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

  PixelWorker(const Upfirdn2d& args, const Weights<A>& weights, const RowPlan<P>& plan, A* space)
      : args_(args), weights_(weights), plan_(plan), ring_(space), combined_(ring_ + slots(args) * plan.row_size()) {
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
      met_.from.clear();
      met_.weights.clear();
      for (int i = met.begin; i < met.end; ++i) {
        const std::int64_t ky = met.first_tap + i * rows.up;
        met_.from.push_back(row(met.first + i));
        met_.weights.push_back(args_.separable ? weights_.row(0) + ky : weights_.row(ky));
      }
      if (args_.separable) combine_rows();
      filter_row(plan_, met_, phase_line_, line_);
      store({y + out * columns.out_size * stride, stride});
    }
  }

 private:
  static std::int64_t slots(const Upfirdn2d& args) {
    return std::min(divide_up(args.rows.taps, args.rows.up), args.rows.size);
  }

  A* row(std::int64_t number) const { return ring_ + number % slots(args_) * plan_.row_size(); }

  // The rows become one, which is filtered along itself.
  void combine_rows() {
    for_blocks<P>(plan_.row_size(), [&](auto count, std::int64_t at) {
      typename P::F sums[count];
      add_rows<P>(met_, at, sums);
      for (int i = 0; i < count; ++i) P::store(combined_ + at + i * P::width, sums[i]);
    });
    met_.from.assign(1, combined_);
    met_.weights.assign(1, weights_.row(0));
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
  const Weights<A>& weights_;
  const RowPlan<P>& plan_;
  A *ring_, *combined_, *phase_line_, *line_;
  Rows<A, A> met_;
};

template <class T>
Status along_pixels(const Upfirdn2d& args, int threads) {
  using P = Arithmetic<T>;
  using A = Accumulator<T>;
  const RowPlan<P> plan(args.columns);
  const Weights<A> weights(args);
  const Bands bands(args.samples * args.channels, args.rows.out_size, args.columns.out_size);
  const int team = bands.team(threads);
  const Workspace<A> space(team, PixelWorker<T>::space(args, plan));
  if (!space.ok()) return Status::out_of_memory;
  bands.for_each(team, [&](int thread) { return PixelWorker<T>(args, weights, plan, space.of_thread(thread)); });
  return Status::ok;
}

// --------------------------------------------------------------------------------------- neighbours are channels

// Channels of a block, of a row of which the sums over rows of the filter stay in cache.
template <class P>
std::int64_t channels_of_block(const Upfirdn2d& args) {
  constexpr std::int64_t most = 1 << 13;
  const std::int64_t wanted = std::clamp<std::int64_t>(most / args.columns.size, P::width, args.channels);
  return wanted / P::width * P::width;
}

// Of every output along a row whose pixels are `channels` elements apart.
inline Readings readings_of_pixels(const ResampledAxis& axis, std::int64_t channels) {
  Readings readings;
  for (int output = 0; output < axis.out_size; ++output) {
    const MetTaps met = met_taps(axis, output);
    for (int j = met.begin; j < met.end; ++j) {
      readings.all.push_back({(met.first + j) * channels, met.first_tap + j * axis.up});
    }
    readings.end();
  }
  return readings;
}

// T may be the type of the sums where those of a tensor are of another.
template <class T>
class ChannelWorker {
  using P = Arithmetic<T>;
  using A = Accumulator<T>;

 public:
  // readings: of pixels that are all channels apart, or, of a separable filter, those of a block.
  ChannelWorker(const Upfirdn2d& args, const Weights<A>& weights, const Readings& readings, A* space)
      : args_(args), weights_(weights), readings_(readings), combined_(space) {}

  void operator()(std::int64_t sample, std::int64_t begin, std::int64_t end) {
    const ResampledAxis &rows = args_.rows, &columns = args_.columns;
    const std::int64_t row = columns.size * args_.channels, out_row = columns.out_size * args_.channels;
    const T* const x = static_cast<const T*>(args_.x) + sample * rows.size * row;
    T* const y = static_cast<T*>(args_.y) + sample * rows.out_size * out_row;
    for (std::int64_t out = begin; out < end; ++out) {
      const MetTaps met = met_taps(rows, static_cast<int>(out));
      met_.from.clear();
      met_.weights.clear();
      for (int i = met.begin; i < met.end; ++i) {
        const std::int64_t ky = met.first_tap + i * rows.up;
        met_.from.push_back(x + (met.first + i) * row);
        met_.weights.push_back(args_.separable ? weights_.row(0) + ky : weights_.row(ky));
      }
      if (args_.separable) {
        one_after_another(y + out * out_row);
      } else {
        for (std::int64_t ox = 0; ox < columns.out_size; ++ox) {
          write(met_, ox, args_.channels, y + out * out_row + ox * args_.channels);
        }
      }
    }
  }

 private:
  void one_after_another(T* y) {
    const std::int64_t channels = args_.channels, size = channels_of_block<P>(args_);
    row_.from.assign(1, combined_);
    row_.weights.assign(1, weights_.row(0));
    for (std::int64_t begin = 0; begin < channels; begin += size) {
      // The last block begins earlier, and some channels are made twice.
      const std::int64_t channel = std::min(begin, channels - size);
      for (std::int64_t ix = 0; ix < args_.columns.size; ++ix) {
        for_blocks<P>(size, [&](auto count, std::int64_t at) {
          typename P::F sums[count];
          add_rows<P>(met_, ix * channels + channel + at, sums);
          for (int i = 0; i < count; ++i) P::store(combined_ + ix * size + at + i * P::width, sums[i]);
        });
      }
      for (std::int64_t ox = 0; ox < args_.columns.out_size; ++ox) {
        write(row_, ox, size, y + ox * channels + channel);
      }
    }
  }

  // At least a vector of channels.
  template <class E>
  void write(const Rows<E, A>& rows, std::int64_t ox, std::int64_t channels, T* y) const {
    const auto gain = P::set(static_cast<A>(args_.gain));
    const std::int64_t even = channels / P::width * P::width;
    const auto block = [&](auto count, std::int64_t at) {
      typename P::F sums[count];
      add_up<P>(rows, readings_, ox, at, sums);
      for (int i = 0; i < count; ++i) P::store(y + at + i * P::width, P::mul(gain, sums[i]));
    };
    for_blocks<P>(even, block);
    if (even < channels) block(std::integral_constant<int, 1>{}, channels - P::width);
  }

  const Upfirdn2d& args_;
  const Weights<A>& weights_;
  const Readings& readings_;
  A* combined_;
  Rows<T, A> met_;
  Rows<A, A> row_;
};

template <class P>
std::int64_t space_of_channels(const Upfirdn2d& args) {
  return args.separable ? args.columns.size * channels_of_block<P>(args) : 0;
}

template <class P>
Readings readings_of_channels(const Upfirdn2d& args) {
  return readings_of_pixels(args.columns, args.separable ? channels_of_block<P>(args) : args.channels);
}

template <class T>
Status along_channels(const Upfirdn2d& args, int threads) {
  using P = Arithmetic<T>;
  using A = Accumulator<T>;
  const Readings readings = readings_of_channels<P>(args);
  const Weights<A> weights(args);
  const Bands bands(args.samples, args.rows.out_size, args.columns.out_size * args.channels);
  const int team = bands.team(threads);
  const Workspace<A> space(team, space_of_channels<P>(args));
  if (!space.ok()) return Status::out_of_memory;
  bands.for_each(team, [&](int thread) { return ChannelWorker<T>(args, weights, readings, space.of_thread(thread)); });
  return Status::ok;
}

// ------------------------------------------------------------------------------- small images, neighbours are planes

// Elements of planes, one plane after another, to or from a tile of the planes' values for each pixel.
template <class T>
void gather_planes(const T* planes, std::int64_t count, std::int64_t pixels, std::int64_t lanes, float* tile) {
  for (std::int64_t lane = 0; lane < lanes; lane += V::width) {
    for (std::int64_t pixel = 0; pixel < pixels; pixel += V::width) {
      const std::int64_t there = std::min<std::int64_t>(V::width, pixels - pixel);
      V::F values[V::width];
      for (int i = 0; i < V::width; ++i) {
        values[i] = lane + i < count ? load_part<V>(planes + (lane + i) * pixels + pixel, there) : V::set(0);
      }
      V::transpose(values);
      for (int i = 0; i < there; ++i) V::store(tile + (pixel + i) * lanes + lane, values[i]);
    }
  }
}

template <class T>
void scatter_planes(const float* tile, std::int64_t count, std::int64_t pixels, std::int64_t lanes, T* planes) {
  for (std::int64_t lane = 0; lane < lanes; lane += V::width) {
    for (std::int64_t pixel = 0; pixel < pixels; pixel += V::width) {
      const std::int64_t there = std::min<std::int64_t>(V::width, pixels - pixel);
      V::F values[V::width];
      for (int i = 0; i < V::width; ++i) {
        values[i] = i < there ? V::load(tile + (pixel + i) * lanes + lane) : V::set(0);
      }
      V::transpose(values);
      for (int i = 0; i < V::width && lane + i < count; ++i) {
        store_part<V>(planes + (lane + i) * pixels + pixel, values[i], there);
      }
    }
  }
}

// Planes that are made at once, 0 where they are too large.
inline std::int64_t planes_at_once(const Upfirdn2d& args) {
  if (V::width == 1 || args.channels_last || args.samples * args.channels < V::width) return 0;
  if (divide_up(args.columns.out_size, args.columns.up) >= V::width) return 0;
  constexpr std::int64_t most = 1 << 15;
  const std::int64_t pixels = args.rows.size * args.columns.size + args.rows.out_size * args.columns.out_size;
  return std::min<std::int64_t>(most / pixels / V::width, vectors) * V::width;
}

template <class T>
Status along_planes(const Upfirdn2d& args, std::int64_t lanes, int threads) {
  const std::int64_t planes = args.samples * args.channels, pixels = args.rows.size * args.columns.size;
  const std::int64_t made = args.rows.out_size * args.columns.out_size;
  Upfirdn2d of_tile = args;
  of_tile.samples = 1;
  of_tile.channels = lanes;
  of_tile.channels_last = true;
  const Readings readings = readings_of_channels<V>(of_tile);
  const Weights<float> weights(args);
  const Bands bands(divide_up(planes, lanes), 1, lanes * made);
  const int team = bands.team(threads);
  const Workspace<float> space(team, lanes * (pixels + made) + space_of_channels<V>(of_tile));
  if (!space.ok()) return Status::out_of_memory;
  bands.for_each(team, [&](int thread) {
    float *const x = space.of_thread(thread), *const y = x + lanes * pixels, *const rest = y + lanes * made;
    return [&, x, y, rest](std::int64_t tile, std::int64_t, std::int64_t) {
      Upfirdn2d own = of_tile;
      own.x = x;
      own.y = y;
      const std::int64_t first = tile * lanes, count = std::min(lanes, planes - first);
      gather_planes(static_cast<const T*>(args.x) + first * pixels, count, pixels, lanes, x);
      ChannelWorker<float>(own, weights, readings, rest)(0, 0, args.rows.out_size);
      scatter_planes(y, count, made, lanes, static_cast<T*>(args.y) + first * made);
    };
  });
  return Status::ok;
}

}  // namespace

Status upfirdn2d(const Upfirdn2d& args, int threads) {
  return with_type_of_level(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (args.channels_last && args.channels >= Arithmetic<T>::width) return along_channels<T>(args, threads);
    if constexpr (!std::is_same_v<T, double>) {
      if (const std::int64_t lanes = planes_at_once(args)) return along_planes<T>(args, lanes, threads);
    }
    return along_pixels<T>(args, threads);
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
