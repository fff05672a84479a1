// What ops of diffusion share: coefficients of each row, and tensors with twice the channels.
#pragma once

#include "tiles.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

inline const double* row_of(const Coefficients& table, std::int64_t sample, int columns) {
  const std::int64_t row = table.index != nullptr ? table.index[sample] : (table.rows == 1 ? 0 : sample);
  return table.values + row * columns;
}

// Calls body(row, offset, length) for each part of the n elements from `start` on that lies in one row; `offset` counts
// from `start`.
template <class Body>
inline void for_each_row(std::int64_t start, std::int64_t n, std::int64_t elements, Body&& body) {
  for (std::int64_t offset = 0; offset < n;) {
    const std::int64_t row = (start + offset) / elements, rest = (row + 1) * elements - (start + offset);
    const std::int64_t length = rest < n - offset ? rest : n - offset;
    body(row, offset, length);
    offset += length;
  }
}

// A part of a row: of the prediction, and of what places the variance, if the tensor has that.
template <class T>
struct Halves {
  const T* prediction;
  const T* place;
};

// Where the elements from `start` on are in a tensor that may have twice the channels. Where that scatters them, they
// are gathered in `space`, of 2 `length` elements.
template <class T>
inline Halves<T> halves_of(const T* tensor, bool doubled, const NoiseShape& shape, std::int64_t row, std::int64_t start,
                           std::int64_t length, T* space) {
  if (!doubled) return {tensor + start, nullptr};
  if (shape.channels <= 1) {
    const T* const first = tensor + start + row * shape.elements;
    return {first, first + shape.elements};
  }
  const std::int64_t channels = shape.channels;
  for (std::int64_t i = 0; i < length; i += channels) {
    const T* const pixel = tensor + 2 * (start + i);
    for (std::int64_t c = 0; c < channels; ++c) {
      space[i + c] = pixel[c];
      space[length + i + c] = pixel[channels + c];
    }
  }
  return {space, space + length};
}

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
