// How kernels get the coefficients of a row.
#pragma once

#include <limits>

#include "items.cuh"

namespace gencore::cuda {

constexpr double no_coefficient = std::numeric_limits<double>::quiet_NaN();

// A table as kernels take it: in device memory, or, where `values` is null, a row that is an argument of the launch.
template <int columns>
struct Table {
  const double* values;
  const std::int64_t* index;
  std::int64_t rows;
  double only[columns];

  explicit Table(const Coefficients& given) : values(nullptr), index(nullptr), rows(given.rows), only{} {
    if (given.on_device) {
      values = given.values;
      index = given.index;
    } else {
      std::copy_n(given.values, columns, only);
    }
  }

  // The row of a sample; NaN where the index is of none.
  __device__ __forceinline__ void read(std::int64_t sample, double (&row)[columns]) const {
    if (values == nullptr) {
#pragma unroll
      for (int i = 0; i < columns; ++i) row[i] = only[i];
      return;
    }
    const std::int64_t at = index != nullptr ? index[sample] : rows == 1 ? 0 : sample;
    const bool inside = at >= 0 && at < rows;
#pragma unroll
    for (int i = 0; i < columns; ++i) {
      row[i] = inside ? values[at * columns + i] : no_coefficient;
    }
  }
};

// Whether there is a row for each sample, where kernels can read it.
inline bool is_acceptable(const Coefficients& table, std::int64_t samples) {
  return is_valid(table, samples) && (table.on_device || (table.rows == 1 && table.index == nullptr));
}

// A tensor of twice the channels has whole items only where the second half of a row begins at a multiple of 16 bytes.
template <class T>
Work with_halves(Work work, bool halves) {
  work.aligned &= !halves || work.elements * sizeof(T) % 16 == 0;
  return work;
}

}  // namespace gencore::cuda
