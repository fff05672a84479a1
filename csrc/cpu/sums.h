// Sums over the elements of each row of a tensor, in an order that no SIMD level and no number of threads changes.
#pragma once

#include "tiles.h"
#include "workspace.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// The sum of n values: 16 interleaved sums in A (as many as the widest vector has lanes), added up pairwise in
// binary64.
template <class A>
double sum(const A* x, std::int64_t n) {
  constexpr int lanes = 16;
  A lane[lanes] = {};
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int j = 0; j < lanes; ++j) lane[j] += x[i + j];
  }
  for (int j = 0; i < n; ++i, ++j) lane[j] += x[i];
  double total[lanes];
  for (int j = 0; j < lanes; ++j) total[j] = static_cast<double>(lane[j]);
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) total[j] += total[j + half];
  }
  return total[0];
}

// One sum for each row of `tiles`, divided by a number: of the row's only tile, or of the sums of its tiles.
class RowSums {
 public:
  RowSums(const Tiles& tiles, bool wanted, double divisor = 1)
      : tiles_(tiles),
        divisor_(divisor),
        pieces_(wanted && tiles.tiles_per_row > 1),
        space_(1, pieces_ ? tiles.count : 0) {}

  bool ok() const { return space_.ok(); }

  // Takes in the n terms of the tile that begins at `start`; threads may do so at once.
  template <class A>
  void add(std::int64_t start, std::int64_t n, const A* term, A* sums) const {
    if (pieces_) {
      const std::int64_t row = start / tiles_.elements, piece = start % tiles_.elements / tiles_.piece;
      space_.of_thread(0)[row * tiles_.tiles_per_row + piece] = sum(term, n);
      return;
    }
    for (std::int64_t i = 0; i < n; i += tiles_.elements) {
      sums[(start + i) / tiles_.elements] = static_cast<A>(sum(term + i, tiles_.elements) / divisor_);
    }
  }

  // Completes the sums, once every tile was taken in.
  template <class A>
  void finish(A* sums) const {
    if (!pieces_) return;
    const double* const piece = space_.of_thread(0);
    for (std::int64_t row = 0; row < tiles_.rows; ++row) {
      double total = 0;
      for (std::int64_t i = 0; i < tiles_.tiles_per_row; ++i) total += piece[row * tiles_.tiles_per_row + i];
      sums[row] = static_cast<A>(total / divisor_);
    }
  }

 private:
  const Tiles& tiles_;
  double divisor_;
  bool pieces_;
  Workspace<double> space_;
};

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
