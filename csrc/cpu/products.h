// Matrix products whose operands lie in the first- and second-level cache: what attention is made of.
//
// C(r, l) = sum_i A(r, i) B(i, l). B and C have their columns l in the lanes of vectors, and A gives single values that
// are broadcast. A block of C of `rows` rows and N vectors stays in registers while i runs.
#pragma once

#include <type_traits>

#include "vec.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// Rows of C in a block: with N vectors each, those of B and one of A they fill the registers.
constexpr int most_rows = 6;
// Vectors of a row of C in a block.
constexpr int most_vectors = GENCORE_SIMD_NUMBER >= 2 ? 4 : 2;

// How values are multiplied. A word is what is broadcast, and a lane of B.
template <class P_, class Word_>
struct Plain {
  using P = P_;
  using F = typename P::F;
  using Word = Word_;
  // Steps of the sum that are in a word.
  static constexpr int depth = 1;
  static F multiply(Word a, F b, F c) { return P::fma(P::set(a), b, c); }
};

#if GENCORE_SIMD_NUMBER == 3
// Words are two bfloat16 that follow each other in the sum; a float has their bits.
struct Pairs {
  using P = V;
  using F = V::F;
  using Word = float;
  static constexpr int depth = 2;
  static F multiply(Word a, F b, F c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(V::set(a)), reinterpret_cast<__m512bh>(b));
  }
};
#endif

template <int rows, int vectors, class F>
inline void clear(F (&c)[rows][vectors]) {
  for (int r = 0; r < rows; ++r) {
    for (int n = 0; n < vectors; ++n) c[r][n] = F{};
  }
}

// Adds the product over `depth` words to c. a_row: from a row of A to the next; a_step, b_step: along the sum. Each
// step calls ahead(i), which may ask memory for what comes later.
template <class Mode, int rows, int vectors, int a_row, class Ahead>
inline void multiply(std::int64_t depth, const typename Mode::Word* a, std::int64_t a_step,
                     const typename Mode::Word* b, std::int64_t b_step, typename Mode::F (&c)[rows][vectors],
                     Ahead&& ahead) {
  using P = typename Mode::P;
  for (std::int64_t i = 0; i < depth; ++i) {
    ahead(i);
    typename Mode::F lanes[vectors];
    GENCORE_UNROLL
    for (int n = 0; n < vectors; ++n) lanes[n] = P::load(b + n * P::width);
    GENCORE_UNROLL
    for (int r = 0; r < rows; ++r) {
      GENCORE_UNROLL
      for (int n = 0; n < vectors; ++n) c[r][n] = Mode::multiply(a[r * a_row], lanes[n], c[r][n]);
    }
    a += a_step;
    b += b_step;
  }
}

template <class Mode, int rows, int vectors, int a_row>
inline void multiply(std::int64_t depth, const typename Mode::Word* a, std::int64_t a_step,
                     const typename Mode::Word* b, std::int64_t b_step, typename Mode::F (&c)[rows][vectors]) {
  multiply<Mode, rows, vectors, a_row>(depth, a, a_step, b, b_step, c, [](std::int64_t) {});
}

template <int least, int most, class Body>
inline void with_count(std::int64_t count, Body&& body) {
  if constexpr (least < most) {
    if (count != least) return with_count<least + 1, most>(count, body);
  }
  body(std::integral_constant<int, least>{});
}

// Calls body(first, rows) for blocks of `count` rows, where `rows` is a constant, most_rows but for the last.
template <class Body>
inline void for_row_blocks(std::int64_t count, Body&& body) {
  std::int64_t first = 0;
  for (; first + most_rows <= count; first += most_rows) body(first, std::integral_constant<int, most_rows>{});
  if (first < count) with_count<1, most_rows>(count - first, [&](auto rows) { body(first, rows); });
}

// Calls body(first, vectors) for panels of `lanes` lanes rounded up to vectors; `first` counts lanes.
template <class P, class Body>
inline void for_panels(std::int64_t lanes, Body&& body) {
  constexpr std::int64_t panel = most_vectors * P::width;
  std::int64_t first = 0;
  for (; first + panel <= lanes; first += panel) body(first, std::integral_constant<int, most_vectors>{});
  if (first < lanes) {
    const std::int64_t vectors = (lanes - first + P::width - 1) / P::width;
    with_count<1, most_vectors>(vectors, [&](auto count) { body(first, count); });
  }
}

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
