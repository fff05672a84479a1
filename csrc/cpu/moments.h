// Mean and sum of squared deviations of many values: each value is read once, and nothing cancels whatever the mean is.
#pragma once

#include <algorithm>

#include "vec.h"
#include "workspace.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  // Those of the values of both (Chan, Golub and LeVeque, 1983).
  void merge(const Moments& other) {
    if (other.count == 0) return;
    if (count == 0) {
      *this = other;
      return;
    }
    const double total = count + other.count, delta = other.mean - mean;
    mean += delta * (other.count / total);
    m2 += other.m2 + delta * delta * (count * (other.count / total));
    count = total;
  }
};

// The sum of term(j) from first to last - 1, in interleaved sums, as one would wait for each addition.
template <class Term>
inline double sum_of(std::int64_t first, std::int64_t last, Term&& term) {
  constexpr int lanes = 8;
  double lane[lanes] = {};
  std::int64_t j = first;
  for (; j + lanes <= last; j += lanes) {
    for (int i = 0; i < lanes; ++i) lane[i] += static_cast<double>(term(j + i));
  }
  for (int i = 0; i < lanes && j < last; ++i, ++j) lane[i] += static_cast<double>(term(j));
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// The moments of some thousand values, which are read twice: their mean first, then the deviations from it.
template <class T, int lanes>
Moments moments_in_lanes(const T* x, std::int64_t n) {
  using P = Arithmetic<T>;
  using A = Accumulator<T>;
  using F = typename P::F;
  constexpr int vectors = lanes / P::width;
  F sum[vectors], square[vectors];
  A sums[lanes], squares[lanes], center = 0;
  // Twice: the sum of the values; that of the deviations, which says what the mean's rounding left, and of their
  // squares.
  for (const bool deviations : {false, true}) {
    const F from = P::set(center);
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) sum[v] = square[v] = P::set(0);
    const auto add = [&](int v, F value) {
      const F d = P::sub(value, from);
      sum[v] = P::add(sum[v], d);
      if (deviations) square[v] = P::fma(d, d, square[v]);
    };
    std::int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) add(v, P::load(x + i + v * P::width));
    }
    if (i < n) {
      // What is past the end deviates by nothing.
      A tail[lanes];
      std::fill(tail, tail + lanes, center);
      const std::int64_t left = n - i;
      for (int j = 0; j < lanes && j < left; j += P::width) {
        const std::int64_t those = std::min<std::int64_t>(P::width, left - j);
        store_part<P>(tail + j, load_part<P>(x + i + j, those), those);
      }
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) add(v, P::load(tail + v * P::width));
    }
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      P::store(sums + v * P::width, sum[v]);
      P::store(squares + v * P::width, square[v]);
    }
    if (!deviations) {
      const double sum_of_lanes = sum_of(0, lanes, [&](std::int64_t j) { return sums[j]; });
      center = static_cast<A>(static_cast<double>(center) + sum_of_lanes / static_cast<double>(n));
    }
  }
  const double count = static_cast<double>(n), d = sum_of(0, lanes, [&](std::int64_t j) { return sums[j]; });
  const double m2 = sum_of(0, lanes, [&](std::int64_t j) { return squares[j]; });
  return {count, static_cast<double>(center) + d / count, m2 - d * (d / count)};
}

// More lanes wait less for each other's additions, and cost more to add up.
template <class T>
Moments moments_of(const T* x, std::int64_t n) {
  return n < 256 ? moments_in_lanes<T, 16>(x, n) : moments_in_lanes<T, 32>(x, n);
}

// The moments of each column of a matrix in memory, whose rows come in order, some at a time.
//
// A tile of rows is summed in A, as deviations d = center - x: with D = sum d and Q = sum d^2 it has the mean
// center - D / n, and Q - D^2 / n is its sum of squared deviations. The center is the mean of the rows before, so what
// cancels there is at most a few times what the tile then adds to the sum of squares, and only its rounding is lost.
// The first tile, which has no rows before it, is short, and its center its first row.
template <class T>
class ColumnMoments {
  using P = Arithmetic<T>;
  using A = Accumulator<T>;
  using F = typename P::F;

 public:
  // What `columns` columns need: doubles of the caller's.
  static std::int64_t space(std::int64_t columns) { return 3 * columns; }

  ColumnMoments(double* space, std::int64_t columns)
      : columns_(columns), mean_(space), m2_(space + columns), center_(reinterpret_cast<A*>(space + 2 * columns)) {}

  // Forgets the rows before.
  void clear() { rows_ = rest_ = 0; }

  void add(const T* x, std::int64_t rows) {
    for (std::int64_t row = 0; row < rows;) {
      const std::int64_t tile = rows_ == 0 ? first_tile : later_tile, n = rows - row < tile ? rows - row : tile;
      add_tile(x + row * columns_, n, columns_);
      row += n;
      rows_ += n;
    }
  }

  // A last row, which ends before the last column.
  void add_rest(const T* x, std::int64_t columns) {
    if (columns == 0) return;
    add_tile(x, 1, columns);
    rest_ = columns;
  }

  // Those of columns first to last - 1 together, each with `offset` added.
  Moments of_columns(std::int64_t first, std::int64_t last, double offset = 0) const {
    const std::int64_t middle = std::clamp(rest_, first, last);
    Moments all = of_equal_columns(first, middle, rows_ + 1);
    all.merge(of_equal_columns(middle, last, rows_));
    all.mean += offset;
    return all;
  }

 private:
  static constexpr std::int64_t first_tile = 8, later_tile = 64;
  // Vectors of a row that are summed at once: as many as leave registers for the rest.
  static constexpr int block = P::width == 1 ? 16 : 4;

  // Of columns of `rows` rows each.
  Moments of_equal_columns(std::int64_t first, std::int64_t last, std::int64_t rows) const {
    if (first == last || rows == 0) return {};
    const double columns = static_cast<double>(last - first), n = static_cast<double>(rows), base = mean_[first];
    const double mean = base + sum_of(first, last, [&](std::int64_t j) { return mean_[j] - base; }) / columns;
    const double m2 = sum_of(first, last, [&](std::int64_t j) {
      const double delta = mean_[j] - mean;
      return m2_[j] + n * (delta * delta);
    });
    return {columns * n, mean, m2};
  }

  void add_tile(const T* x, std::int64_t n, std::int64_t columns) {
    std::int64_t j = 0;
    for (; j + block * P::width <= columns; j += block * P::width) add_block<block, true>(x + j, n, j, P::width);
    for (; j + P::width <= columns; j += P::width) add_block<1, true>(x + j, n, j, P::width);
    if (j < columns) add_block<1, false>(x + j, n, j, columns - j);
  }

  // n rows of `vectors` vectors from column j on; a vector that is not whole has `width` columns.
  template <int vectors, bool whole>
  void add_block(const T* x, std::int64_t n, std::int64_t j, std::int64_t width) {
    const auto load = [width](const auto* p) { return whole ? P::load(p) : load_part<P>(p, width); };
    F center[vectors], sum[vectors], square[vectors];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      center[v] = rows_ == 0 ? load(x + v * P::width) : load(center_ + j + v * P::width);
      sum[v] = square[v] = P::set(0);
    }
    for (std::int64_t row = 0; row < n; ++row) {
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) {
        // An instruction less than the other way round, as one of them can read its second operand from memory.
        const F d = P::sub(center[v], load(x + row * columns_ + v * P::width));
        sum[v] = P::add(sum[v], d);
        square[v] = P::fma(d, d, square[v]);
      }
    }
    A sums[vectors * P::width], squares[vectors * P::width], centers[vectors * P::width];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      P::store(sums + v * P::width, sum[v]);
      P::store(squares + v * P::width, square[v]);
      P::store(centers + v * P::width, center[v]);
    }
    const std::int64_t m = (vectors - 1) * P::width + width;
    const double inverse = 1.0 / static_cast<double>(n), before = static_cast<double>(rows_);
    const double share = static_cast<double>(n) / (before + static_cast<double>(n)), weight = before * share;
    for (std::int64_t i = 0; i < m; ++i) {
      const double d = static_cast<double>(sums[i]), mean = static_cast<double>(centers[i]) - d * inverse;
      const double m2 = static_cast<double>(squares[i]) - d * (d * inverse);
      if (rows_ == 0) {
        mean_[j + i] = mean;
        m2_[j + i] = m2;
      } else {
        const double delta = mean - mean_[j + i];
        mean_[j + i] += delta * share;
        m2_[j + i] += m2 + delta * delta * weight;
      }
      center_[j + i] = static_cast<A>(mean_[j + i]);
    }
  }

  std::int64_t columns_;
  double *mean_, *m2_;
  A* center_;
  std::int64_t rows_ = 0, rest_ = 0;
};

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
