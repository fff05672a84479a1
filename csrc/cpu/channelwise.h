// Loops over a tensor of outer x channels x inner elements that know two values of each element's channel, and, where
// it is wanted, add up what they compute over every channel.
#pragma once

#include <algorithm>

#include "channels.h"
#include "gencore/bias_act.h"
#include "rows.h"
#include "sums.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// Planes of a channel are gone through one after another. Where they have few elements, or one as in channels_last, the
// values of channels are repeated in columns as those elements lie, and a loop goes over rows of whole vectors.
template <class T>
class Channelwise {
 public:
  using P = Arithmetic<T>;
  using A = Accumulator<T>;
  using F = typename P::F;

  // bias and shift: what the loop is given of a channel. sums: where to write, `channels` values of A; null: nowhere.
  Channelwise(const BiasActShape& shape, const ChannelValues& bias, const ChannelValues& shift, void* sums, int threads)
      : shape_(shape),
        sums_(static_cast<A*>(sums)),
        threads_(threads),
        total_(shape.outer * shape.channels * shape.inner),
        columns_(shape.inner < least_plane && (bias.data != nullptr || shift.data != nullptr || sums != nullptr)),
        row_(row_of(shape)),
        chunk_rows_(std::max(rows_at_once, chunk / std::min(row_, piece) / rows_at_once * rows_at_once)),
        tiles_(columns_ ? 0 : planes().outer * planes().channels, {0, 1, planes().inner, 0}),
        values_(1, 2 * (columns_ ? row_ : planes().channels)),
        partial_(1, sums_ == nullptr ? 0
                    : columns_       ? chunks() * row_
                                     : tiles_.rows * tiles_.tiles_per_row),
        channel_(1, shape.channels) {
    if (ok()) {
      read(bias, bias_of(0));
      read(shift, shift_of(0));
    }
  }

  bool ok() const { return values_.ok() && partial_.ok() && channel_.ok(); }

  // Calls body(i, count, bias, shift) for every vector: `count` elements from element i of the tensor on. What it
  // returns, if it does, is added up.
  template <class Body>
  void run(Body&& body) const {
    constexpr bool adds = !std::is_void_v<decltype(body(std::int64_t{}, std::int64_t{}, F{}, F{}))>;
    if (columns_) {
      run_columns<adds>(body);
    } else {
      run_planes<adds>(body);
    }
    if (adds && sums_ != nullptr) finish();
  }

 private:
  static constexpr std::int64_t least_plane = 32;
  // Columns in work at once, rows that are added up in A, and about how many elements one thread takes at a time.
  static constexpr std::int64_t piece = 1024, rows_at_once = 32, chunk = 32768;

  static std::int64_t row_of(const BiasActShape& shape) {
    std::int64_t row = std::max<std::int64_t>(shape.channels * shape.inner, 1);
    while (row < 256) row *= 2;
    return row;
  }

  // Without values and sums all is one plane.
  BiasActShape planes() const {
    return sums_ == nullptr && shape_.inner < least_plane ? BiasActShape{1, 1, total_} : shape_;
  }
  std::int64_t rows() const { return divide_up(total_, row_); }
  std::int64_t chunks() const { return divide_up(rows(), chunk_rows_); }

  A* bias_of(std::int64_t place) const { return values_.of_thread(0) + place; }
  A* shift_of(std::int64_t place) const { return bias_of(place + (columns_ ? row_ : planes().channels)); }

  void read(const ChannelValues& values, A* into) const {
    if (values.data == nullptr) {
      std::fill(into, into + (columns_ ? row_ : planes().channels), A(0));
      return;
    }
    double* const of_channel = channel_.of_thread(0);
    read_channels(values, 0, 0, shape_.channels, 0, of_channel);
    if (!columns_) {
      for (std::int64_t c = 0; c < shape_.channels; ++c) into[c] = static_cast<A>(of_channel[c]);
      return;
    }
    for (std::int64_t j = 0; j < row_;) {
      for (std::int64_t c = 0; c < shape_.channels; ++c) {
        for (std::int64_t i = 0; i < shape_.inner; ++i) into[j++] = static_cast<A>(of_channel[c]);
      }
    }
  }

  template <bool adds, class Body>
  void run_planes(Body& body) const {
    tiles_.for_each(threads_, [&](std::int64_t start, std::int64_t n, int) {
      for_each_row(start, n, tiles_.elements, [&](std::int64_t row, std::int64_t offset, std::int64_t length) {
        const std::int64_t first = start + offset, channel = row % planes().channels;
        const F bias = P::set(*bias_of(channel)), shift = P::set(*shift_of(channel));
        if constexpr (adds) {
          const double sum = sum_of_run(
              length, [&](std::int64_t i, std::int64_t count) { return body(first + i, count, bias, shift); });
          const std::int64_t place = tiles_.tiles_per_row == 1 ? 0 : (first - row * tiles_.elements) / tiles_.piece;
          if (sums_ != nullptr) partial_.of_thread(0)[row * tiles_.tiles_per_row + place] = sum;
        } else {
          for_vectors<P>(length, [&](std::int64_t i, std::int64_t count) { body(first + i, count, bias, shift); });
        }
      });
    });
  }

  // As sum() of sums.h: 16 interleaved sums, added up pairwise in binary64.
  template <class Term>
  static double sum_of_run(std::int64_t n, Term&& term) {
    constexpr int lanes = 16, vectors = lanes / P::width;
    F sum[vectors];
    for (F& each : sum) each = P::set(0);
    std::int64_t i = 0;
    // No more are unrolled: the sixteen of one lane each would be as many copies of an activation.
    for (; i + lanes <= n; i += lanes) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[v] = P::add(sum[v], term(i + v * P::width, P::width));
    }
    A lane[lanes];
    for (int v = 0; v < vectors; ++v) P::store(lane + v * P::width, sum[v]);
    for (int v = 0; i < n; ++v, i += P::width) {
      const std::int64_t count = std::min<std::int64_t>(P::width, n - i);
      A last[P::width];
      P::store(last, term(i, count));
      for (std::int64_t j = 0; j < count; ++j) lane[v * P::width + j] += last[j];
    }
    double total[lanes];
    for (int j = 0; j < lanes; ++j) total[j] = static_cast<double>(lane[j]);
    for (int half = lanes / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) total[j] += total[j + half];
    }
    return total[0];
  }

  template <bool adds, class Body>
  void run_columns(Body& body) const {
    const std::int64_t pieces = divide_up(row_, piece), tasks = chunks() * pieces;
    const int team = static_cast<int>(std::clamp<std::int64_t>(std::min(total_ / Tiles::grain, tasks), 1, threads_));
    if (team == 1) {
      for (std::int64_t task = 0; task < tasks; ++task) run_piece<adds>(task / pieces, task % pieces * piece, body);
      return;
    }
#pragma omp parallel num_threads(team)
    {
#ifdef _OPENMP
      const std::int64_t thread = omp_get_thread_num(), members = omp_get_num_threads();
#else
      const std::int64_t thread = 0, members = 1;
#endif
      const std::int64_t begin = tasks * thread / members, end = tasks * (thread + 1) / members;
      for (std::int64_t task = begin; task < end; ++task) run_piece<adds>(task / pieces, task % pieces * piece, body);
    }
  }

  // The rows of a chunk, of columns from `first` on.
  template <bool adds, class Body>
  void run_piece(std::int64_t number, std::int64_t first, Body& body) const {
    const std::int64_t width = std::min(piece, row_ - first), end = std::min(rows(), (number + 1) * chunk_rows_);
    const A *const bias = bias_of(first), *const shift = shift_of(first);
    double* const partial = partial_.of_thread(0) + number * row_ + first;
    if (adds && sums_ != nullptr) std::fill(partial, partial + width, 0.0);
    for (std::int64_t start = number * chunk_rows_; start < end; start += rows_at_once) {
      A sum[piece];
      if (adds) std::fill(sum, sum + width, A(0));
      for (std::int64_t row = start; row < std::min(end, start + rows_at_once); ++row) {
        const std::int64_t at = row * row_ + first;
        for_vectors<P>(std::min(width, total_ - at), [&](std::int64_t j, std::int64_t count) {
          if constexpr (adds) {
            const F term = body(at + j, count, load_part<P>(bias + j, count), load_part<P>(shift + j, count));
            store_part<P>(sum + j, P::add(load_part<P>(sum + j, count), term), count);
          } else {
            body(at + j, count, load_part<P>(bias + j, count), load_part<P>(shift + j, count));
          }
        });
      }
      if (!adds || sums_ == nullptr) continue;
      for (std::int64_t j = 0; j < width; ++j) partial[j] += static_cast<double>(sum[j]);
    }
  }

  void finish() const {
    double* const channel = channel_.of_thread(0);
    const double* partial = partial_.of_thread(0);
    std::fill(channel, channel + shape_.channels, 0.0);
    if (columns_) {
      for (std::int64_t n = 0; n < chunks(); ++n) {
        for (std::int64_t j = 0; j < row_;) {
          for (std::int64_t c = 0; c < shape_.channels; ++c) {
            for (std::int64_t i = 0; i < shape_.inner; ++i) channel[c] += partial[n * row_ + j++];
          }
        }
      }
    } else {
      for (std::int64_t row = 0; row < tiles_.rows; ++row) {
        for (std::int64_t i = 0; i < tiles_.tiles_per_row; ++i) channel[row % shape_.channels] += *partial++;
      }
    }
    for (std::int64_t c = 0; c < shape_.channels; ++c) sums_[c] = static_cast<A>(channel[c]);
  }

  BiasActShape shape_;
  A* sums_;
  int threads_;
  std::int64_t total_;
  bool columns_;
  std::int64_t row_, chunk_rows_;
  Tiles tiles_;
  Workspace<A> values_;
  Workspace<double> partial_, channel_;
};

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
