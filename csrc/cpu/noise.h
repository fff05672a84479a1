// Makes the noise of any run of a tensor's elements, in memory order, one tile at a time.
#pragma once

#include "gencore/philox.h"
#include "tiles.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// The four words of `V::width` blocks, each turned into values by a transform.
struct Normals {
  static void apply(const V::U (&word)[4], V::F (&value)[4]) {
    box_muller<V>(word[0], word[1], value[0], value[1]);
    box_muller<V>(word[2], word[3], value[2], value[3]);
  }
};

struct Uniforms {
  static void apply(const V::U (&word)[4], V::F (&value)[4]) {
    for (int i = 0; i < 4; ++i) value[i] = unit_uniform<V>(word[i]);
  }
};

template <class Transform>
class NoiseSource {
 public:
  NoiseSource(const NoiseShape& shape, const NoiseKey& key)
      : shape_(shape), key_(key), blocks_per_row_(divide_up(shape.elements, 4)) {}

  // Writes to `out` the values of the n elements from `start` on, counted over all rows in memory order. Where rows
  // are channels-last, the run must be whole pixels.
  void fill(std::int64_t start, std::int64_t n, float* out) {
    if (shape_.channels > 1) {
      fill_channels_last(start, n, out);
    } else {
      fill_in_order(start, n, out);
    }
  }

 private:
  static constexpr int group_blocks = V::width, group_values = 4 * V::width;

  // A place in the tensor: an element of a row.
  struct Cursor {
    std::int64_t sample, first_block, offset;
  };

  struct Words {
    std::uint64_t seed, sample;
    std::uint32_t stream;
  };

  Cursor cursor_at(std::int64_t element) const {
    const std::int64_t row = element / shape_.elements;
    return {row % shape_.samples, row / shape_.samples * blocks_per_row_, element % shape_.elements};
  }

  void next_row(Cursor& at) const {
    at.offset = 0;
    if (++at.sample == shape_.samples) {
      at.sample = 0;
      at.first_block += blocks_per_row_;
    }
  }

  // Moves on by n elements, over the ends of rows.
  void advance(Cursor& at, std::int64_t n) const {
    while (n >= shape_.elements - at.offset) {
      n -= shape_.elements - at.offset;
      next_row(at);
    }
    at.offset += n;
  }

  Words words_of(std::int64_t sample) const {
    const std::int64_t* words = key_.words + (key_.rows == 0 ? 0 : 3 * sample);
    const std::uint64_t first = static_cast<std::uint64_t>(words[2]);
    return {static_cast<std::uint64_t>(words[0]), key_.rows == 0 ? first + static_cast<std::uint64_t>(sample) : first,
            static_cast<std::uint32_t>(words[1])};
  }

  void fill_in_order(std::int64_t start, std::int64_t n, float* out) {
    // Blocks of rows without a partial block follow each other in memory like those of one row.
    const bool seamless = shape_.elements % 4 == 0;
    for (Cursor at = cursor_at(start); n > 0;) {
      const std::int64_t inside = shape_.elements - at.offset, skip = at.offset % 4;
      if (skip == 0 && n >= group_values && (seamless || inside >= group_values)) {
        group(at, group_values, out);
        advance(at, group_values);
        out += group_values;
        n -= group_values;
        continue;
      }
      float values[group_values];
      group(at, n, values);
      for (std::int64_t i = skip; i < group_values && n > 0;) {
        std::int64_t run = seamless ? n : shape_.elements - at.offset;
        if (run > group_values - i) run = group_values - i;
        if (run > n) run = n;
        for (std::int64_t j = 0; j < run; ++j) out[j] = values[i + j];
        out += run;
        n -= run;
        advance(at, run);
        i = at.offset == 0 ? divide_up(i + run, 4) * 4 : i + run;
      }
    }
  }

  // The logical order is channel by channel; the values are made in it and scattered.
  void fill_channels_last(std::int64_t start, std::int64_t n, float* out) {
    const std::int64_t channels = shape_.channels, pixels = shape_.elements / channels;
    while (n > 0) {
      const std::int64_t row = start / shape_.elements, first = start % shape_.elements / channels;
      const std::int64_t last = first + n / channels < pixels ? first + n / channels : pixels;
      const std::int64_t base = row * shape_.elements;
      float values[Tiles::target];
      if (first == 0 && last == pixels) {
        std::int64_t channel = 0, pixel = 0;
        for (std::int64_t i = 0; i < shape_.elements; i += Tiles::target) {
          const std::int64_t run = shape_.elements - i < Tiles::target ? shape_.elements - i : Tiles::target;
          fill_in_order(base + i, run, values);
          for (std::int64_t j = 0; j < run; ++j) {
            out[pixel * channels + channel] = values[j];
            if (++pixel == pixels) {
              pixel = 0;
              ++channel;
            }
          }
        }
      } else {
        for (std::int64_t channel = 0; channel < channels; ++channel) {
          for (std::int64_t p = first; p < last; p += Tiles::target) {
            const std::int64_t run = last - p < Tiles::target ? last - p : Tiles::target;
            fill_in_order(base + channel * pixels + p, run, values);
            for (std::int64_t j = 0; j < run; ++j) out[(p - first + j) * channels + channel] = values[j];
          }
        }
      }
      const std::int64_t done = (last - first) * channels;
      out += done;
      start += done;
      n -= done;
    }
  }

  // The values of one group of blocks from the block of `at` on, of which the first n are wanted.
  void group(const Cursor& at, std::int64_t n, float* out) {
    const std::int64_t block = at.offset / 4;
    if (block + group_blocks <= blocks_per_row_ || n <= shape_.elements - at.offset) {
      one_row(words_of(at.sample), at.first_block + block, out);
    } else {
      across_rows(at, block, out);
    }
  }

  // All lanes share the seed, the stream and the sample.
  void one_row(const Words& words, std::int64_t block, float* out) {
    schedule(words.seed);
    const V::U c0 = V::add(V::set_bits(static_cast<std::uint32_t>(block)), lane_blocks());
    Wide c[4] = {V::widen(c0), V::wide_set(words.stream), V::wide_set(static_cast<std::uint32_t>(words.sample)),
                 V::wide_set(static_cast<std::uint32_t>(words.sample >> 32))};
    rounds(c);
    finish(c, out);
  }

  // The group runs into the rows after `at`: every lane has a sample of its own, and a seed if the key says so.
  void across_rows(Cursor at, std::int64_t block, float* out) {
    std::uint32_t lanes[6][V::width];
    Words words = words_of(at.sample);
    for (int i = 0; i < V::width; ++i) {
      const int lane = lane_of_block(i);
      lanes[0][lane] = static_cast<std::uint32_t>(at.first_block + block);
      lanes[1][lane] = static_cast<std::uint32_t>(words.sample);
      lanes[2][lane] = static_cast<std::uint32_t>(words.sample >> 32);
      if (key_.rows != 0) {
        lanes[3][lane] = words.stream;
        lanes[4][lane] = static_cast<std::uint32_t>(words.seed);
        lanes[5][lane] = static_cast<std::uint32_t>(words.seed >> 32);
      }
      // Past the last row comes the first one again: the values are not used.
      if (++block == blocks_per_row_) {
        block = 0;
        next_row(at);
        words = words_of(at.sample);
      }
    }
    Wide c[4] = {V::widen(V::load_bits(lanes[0])), V::wide_set(words.stream), V::widen(V::load_bits(lanes[1])),
                 V::widen(V::load_bits(lanes[2]))};
    if (key_.rows == 0) {
      schedule(words.seed);
      rounds(c);
    } else {
      c[1] = V::widen(V::load_bits(lanes[3]));
      Wide k0 = V::widen(V::load_bits(lanes[4])), k1 = V::widen(V::load_bits(lanes[5]));
      for (int i = 0; i < Philox::rounds; ++i) {
        round(c, k0, k1);
        k0 = V::wide_add(k0, Philox::w0);
        k1 = V::wide_add(k1, Philox::w1);
      }
    }
    finish(c, out);
  }

  using Wide = typename V::Wide;

  static void round(Wide (&c)[4], Wide k0, Wide k1) {
    Wide high0, low0, high1, low1;
    V::wide_mul(c[0], Philox::m0, high0, low0);
    V::wide_mul(c[2], Philox::m1, high1, low1);
    c[0] = V::wide_xor(high1, c[1], k0);
    c[1] = low1;
    c[2] = V::wide_xor(high0, c[3], k1);
    c[3] = low0;
  }

  void rounds(Wide (&c)[4]) const {
    for (int i = 0; i < Philox::rounds; ++i) round(c, V::wide_set(round_key_[i][0]), V::wide_set(round_key_[i][1]));
  }

  static void finish(const Wide (&c)[4], float* out) {
    V::U word[4];
    V::F value[4];
    for (int i = 0; i < 4; ++i) word[i] = V::narrow(c[i]);
    Transform::apply(word, value);
    V::store_blocks(out, value[0], value[1], value[2], value[3]);
  }

  static V::U lane_blocks() {
    std::uint32_t blocks[V::width];
    for (int i = 0; i < V::width; ++i) blocks[i] = static_cast<std::uint32_t>(V::block_of_lane[i]);
    return V::load_bits(blocks);
  }

  static int lane_of_block(int block) {
    // block_of_lane is the transpose of a 4 x (width / 4) table, and so is its inverse.
    return V::width == 1 ? 0 : block % (V::width / 4) * 4 + block / (V::width / 4);
  }

  // Computes the round keys of a seed, unless they are there.
  void schedule(std::uint64_t seed) {
    if (scheduled_ && seed == scheduled_seed_) return;
    std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int i = 0; i < Philox::rounds; ++i, k0 += Philox::w0, k1 += Philox::w1) {
      round_key_[i][0] = k0;
      round_key_[i][1] = k1;
    }
    scheduled_seed_ = seed;
    scheduled_ = true;
  }

  NoiseShape shape_;
  NoiseKey key_;
  std::int64_t blocks_per_row_;
  std::uint32_t round_key_[Philox::rounds][2];
  std::uint64_t scheduled_seed_ = 0;
  bool scheduled_ = false;
};

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
