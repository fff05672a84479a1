// Tiles of strided tensors, gathered for products.h and spread again.
//
// A tile is `rows` x `lanes` values in rows of `step` words, with what is missing of a last vector 0. In the tensor a
// row and a lane are row_stride and lane_stride elements from the next; where either is 1, vectors are read and
// written.
#pragma once

#include <algorithm>

#include "half.h"
#include "products.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

template <class T>
inline Accumulator<T> value_of(T x) {
  if constexpr (sizeof(T) == 2) {
    return to_float(x);
  } else {
    return x;
  }
}

template <class T>
inline void assign(T& to, Accumulator<T> x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    to = to_bfloat16(x);
  } else if constexpr (std::is_same_v<T, float16>) {
    to = to_float16(x);
  } else {
    to = x;
  }
}

// Reads a tile of elements of type T, or the negative of one.
template <class T>
void gather(Accumulator<T>* tile, std::int64_t step, const void* elements, std::int64_t rows, std::int64_t lanes,
            std::int64_t row_stride, std::int64_t lane_stride, bool negative) {
  const T* const from = static_cast<const T*>(elements);
  using P = Arithmetic<T>;
  using F = typename P::F;
  constexpr std::int64_t width = P::width;
  const Accumulator<T> factor = negative ? -1 : 1;
  const F f = P::set(factor);
  if (lane_stride == 1) {
    for (std::int64_t r = 0; r < rows; ++r) {
      for_vectors<P>(lanes, [&](std::int64_t l, std::int64_t count) {
        P::store(tile + r * step + l, P::mul(f, load_part<P>(from + r * row_stride + l, count)));
      });
    }
    return;
  }
  for (std::int64_t l = 0; l < lanes; l += width) {
    const std::int64_t there = std::min(width, lanes - l);
    std::int64_t r = 0;
    if (row_stride == 1) {
      for (; r < rows; r += width) {
        const std::int64_t count = std::min(width, rows - r);
        F x[width];
        for (std::int64_t i = 0; i < width; ++i) {
          x[i] = i < there ? P::mul(f, load_part<P>(from + (l + i) * lane_stride + r, count)) : P::set(0);
        }
        P::transpose(x);
        for (std::int64_t i = 0; i < count; ++i) P::store(tile + (r + i) * step + l, x[i]);
      }
      continue;
    }
    for (; r < rows; ++r) {
      for (std::int64_t i = 0; i < width; ++i) {
        tile[r * step + l + i] = i < there ? factor * value_of(from[r * row_stride + (l + i) * lane_stride]) : 0;
      }
    }
  }
}

// Writes a tile, rounded to T.
template <class T>
void spread(const Accumulator<T>* tile, std::int64_t step, void* elements, std::int64_t rows, std::int64_t lanes,
            std::int64_t row_stride, std::int64_t lane_stride) {
  T* const to = static_cast<T*>(elements);
  using P = Arithmetic<T>;
  using F = typename P::F;
  constexpr std::int64_t width = P::width;
  if (lane_stride == 1) {
    for (std::int64_t r = 0; r < rows; ++r) {
      for_vectors<P>(lanes, [&](std::int64_t l, std::int64_t count) {
        store_part<P>(to + r * row_stride + l, P::load(tile + r * step + l), count);
      });
    }
    return;
  }
  for (std::int64_t l = 0; l < lanes; l += width) {
    const std::int64_t there = std::min(width, lanes - l);
    if (row_stride == 1) {
      for (std::int64_t r = 0; r < rows; r += width) {
        const std::int64_t count = std::min(width, rows - r);
        F x[width];
        for (std::int64_t i = 0; i < width; ++i) x[i] = P::load(tile + (r + std::min(i, count - 1)) * step + l);
        P::transpose(x);
        for (std::int64_t i = 0; i < there; ++i) store_part<P>(to + (l + i) * lane_stride + r, x[i], count);
      }
      continue;
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t i = 0; i < there; ++i) {
        assign(to[r * row_stride + (l + i) * lane_stride], tile[r * step + l + i]);
      }
    }
  }
}

#if GENCORE_SIMD_NUMBER == 3
// Sixteen pairs, `low` in the lower halves of the words.
inline __m512i paired(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// As `gather` of bfloat16, where a word of row r has rows 2 r and 2 r + 1.
inline void gather_pairs(float* tile, std::int64_t step, const void* elements, std::int64_t rows, std::int64_t lanes,
                         std::int64_t row_stride, std::int64_t lane_stride, bool negative) {
  const bfloat16* const from = static_cast<const bfloat16*>(elements);
  constexpr std::int64_t width = 16;
  const std::int64_t words = (rows + 1) / 2;
  const std::uint32_t sign = negative ? 0x80008000u : 0u;
  const __m512i turned = _mm512_set1_epi32(static_cast<int>(sign));
  for (std::int64_t l = 0; l < lanes; l += width) {
    const std::int64_t there = std::min(width, lanes - l);
    const __mmask16 mask = static_cast<__mmask16>((1u << there) - 1);
    if (lane_stride == 1) {
      for (std::int64_t r = 0; r < words; ++r) {
        const bfloat16* const row = from + 2 * r * row_stride + l;
        const __m256i low = _mm256_maskz_loadu_epi16(mask, row);
        const __m256i high = _mm256_maskz_loadu_epi16(2 * r + 1 < rows ? mask : 0, row + row_stride);
        _mm512_storeu_si512(tile + r * step + l, _mm512_xor_si512(paired(low, high), turned));
      }
    } else if (row_stride == 1) {
      for (std::int64_t r = 0; r < words; r += width) {
        const std::int64_t values = std::min(2 * width, rows - 2 * r), count = (values + 1) / 2;
        const __mmask32 inside = static_cast<__mmask32>((std::uint64_t{1} << values) - 1);
        __m512 x[width];
        for (std::int64_t i = 0; i < width; ++i) {
          const __m512i row = _mm512_maskz_loadu_epi16(i < there ? inside : 0, from + (l + i) * lane_stride + 2 * r);
          x[i] = _mm512_castsi512_ps(_mm512_xor_si512(row, turned));
        }
        V::transpose(x);
        for (std::int64_t i = 0; i < count; ++i) _mm512_storeu_ps(tile + (r + i) * step + l, x[i]);
      }
    } else {
      for (std::int64_t r = 0; r < words; ++r) {
        for (std::int64_t i = 0; i < width; ++i) {
          const bfloat16* const at = from + 2 * r * row_stride + (l + i) * lane_stride;
          const std::uint32_t low = i < there ? at[0].bits : 0;
          const std::uint32_t high = i < there && 2 * r + 1 < rows ? at[row_stride].bits : 0;
          tile[r * step + l + i] = float_of((low | high << 16) ^ sign);
        }
      }
    }
  }
}
#endif

// All that a kernel over tiles of A knows of its tensors' type: one kernel, compiled once, serves every type.
template <class A>
struct Elements {
  // Of one, in bytes.
  std::int64_t size;
  decltype(&gather<A>) read;
  decltype(&spread<A>) write;
};

template <class T>
constexpr Elements<Accumulator<T>> elements_of{sizeof(T), gather<T>, spread<T>};

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
