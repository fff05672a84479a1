// How the work of an op is cut into tiles, and how tiles are given to threads.
//
// The cut depends on the shape alone, never on the number of threads, so what is summed per tile has the same bits for
// any number of threads. A tile is whole rows, or a piece of one row.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "vec.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Tiles {
  // Elements of a tile: they stay in the first-level cache with what the op reads and writes beside them. Channels-last
  // tiles of many channels are larger, and stay in the second level.
  static constexpr std::int64_t target = 1024;
  // Values of one channel that are worth making at once.
  static constexpr std::int64_t channel_run = 64;
  // Elements below which waking a second thread costs more than it saves.
  static constexpr std::int64_t grain = 16384;

  std::int64_t rows, elements, repeats, rows_per_tile, tiles_per_row, piece, count;

  // The tiles of `rows` rows of the shape's elements, on each of which the op works `repeats` times.
  Tiles(std::int64_t rows_, const NoiseShape& shape, std::int64_t repeats_ = 1)
      : rows(rows_), elements(shape.elements), repeats(repeats_) {
    std::int64_t unit = 64;
    // Much work on few elements is cut finer, so that there is some for every thread.
    std::int64_t size = repeats < 8 ? target : 2 * unit;
    if (shape.channels > 1) {
      // Channels-last noise is made channel by channel, so a tile holds a run of pixels with all their channels.
      const std::int64_t run = shape.channels <= 1024 ? channel_run : 16;
      unit = run * shape.channels;
      size = divide_up(size, unit) * unit;
    }
    tiles_per_row = elements > size ? divide_up(elements, size) : 1;
    rows_per_tile = elements > 0 && elements < size ? size / elements : 1;
    piece = tiles_per_row == 1 ? elements : divide_up(divide_up(elements, tiles_per_row), unit) * unit;
    if (tiles_per_row > 1) tiles_per_row = divide_up(elements, piece);
    count = elements == 0 ? 0 : divide_up(rows, rows_per_tile) * tiles_per_row;
  }

  // The most elements a tile has.
  std::int64_t capacity() const { return tiles_per_row == 1 ? rows_per_tile * elements : piece; }

  // Calls body(start, n, thread) for every tile: n elements from `start` on, counted over all rows.
  template <class Body>
  void for_each(int threads, Body&& body) const {
    const int team = this->team(threads);
    if (team <= 1) {
      for (std::int64_t tile = 0; tile < count; ++tile) run(tile, 0, body);
      return;
    }
#pragma omp parallel num_threads(team)
    {
#ifdef _OPENMP
      const std::int64_t thread = omp_get_thread_num(), members = omp_get_num_threads();
#else
      const std::int64_t thread = 0, members = 1;
#endif
      const std::int64_t begin = count * thread / members, end = count * (thread + 1) / members;
      for (std::int64_t tile = begin; tile < end; ++tile) run(tile, static_cast<int>(thread), body);
    }
  }

  // How many threads the tiles are worth.
  int team(int threads) const {
    std::int64_t worth = rows * elements * repeats / grain;
    if (worth > count) worth = count;
    return static_cast<int>(threads < worth ? threads : (worth > 1 ? worth : 1));
  }

 private:
  template <class Body>
  void run(std::int64_t tile, int thread, Body& body) const {
    if (tiles_per_row == 1) {
      const std::int64_t first = tile * rows_per_tile;
      const std::int64_t last = first + rows_per_tile < rows ? first + rows_per_tile : rows;
      body(first * elements, (last - first) * elements, thread);
    } else {
      const std::int64_t row = tile / tiles_per_row, offset = tile % tiles_per_row * piece;
      body(row * elements + offset, offset + piece < elements ? piece : elements - offset, thread);
    }
  }
};

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
