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

  struct Row {
    std::uint64_t seed, sample;
    std::uint32_t stream, first_block;
  };

  Row row_at(std::int64_t row) const {
    const std::int64_t sample = row % shape_.samples, draw = row / shape_.samples;
    const std::int64_t* words = key_.words + (key_.rows == 0 ? 0 : 3 * sample);
    const std::uint64_t first = static_cast<std::uint64_t>(words[2]);
    return {static_cast<std::uint64_t>(words[0]), key_.rows == 0 ? first + static_cast<std::uint64_t>(sample) : first,
            static_cast<std::uint32_t>(words[1]), static_cast<std::uint32_t>(draw * blocks_per_row_)};
  }

  void fill_in_order(std::int64_t start, std::int64_t n, float* out) {
    std::int64_t row = start / shape_.elements, offset = start % shape_.elements;
    Row at = row_at(row);
    while (n > 0) {
      const std::int64_t block = offset / 4, inside = shape_.elements - offset;
      if (offset % 4 == 0 && inside >= group_values && n >= group_values) {
        one_row(at, block, out);
        out += group_values;
        offset += group_values;
        n -= group_values;
      } else {
        float values[group_values];
        if (block + group_blocks <= blocks_per_row_ || n <= inside) {
          one_row(at, block, values);
        } else {
          across_rows(row, block, values);
        }
        for (std::int64_t i = offset % 4; i < group_values && n > 0;) {
          std::int64_t run = shape_.elements - offset;
          if (run > group_values - i) run = group_values - i;
          if (run > n) run = n;
          std::memcpy(out, values + i, static_cast<std::size_t>(run) * sizeof(float));
          out += run;
          n -= run;
          offset += run;
          i += run;
          if (offset == shape_.elements) {
            offset = 0;
            ++row;
            i = divide_up(i, 4) * 4;
          }
        }
        if (n > 0) at = row_at(row);
      }
      if (offset == shape_.elements) {
        offset = 0;
        if (n > 0) at = row_at(++row);
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

  // One group of blocks of one row: all lanes share the seed, the stream and the sample.
  void one_row(const Row& row, std::int64_t block, float* out) {
    if (!scheduled_ || row.seed != scheduled_seed_) schedule(row.seed);
    const V::U c0 = V::add(V::set_bits(row.first_block + static_cast<std::uint32_t>(block)), lane_blocks());
    Wide c[4] = {V::widen(c0), V::wide_set(row.stream), V::wide_set(static_cast<std::uint32_t>(row.sample)),
                 V::wide_set(static_cast<std::uint32_t>(row.sample >> 32))};
    for (int i = 0; i < Philox::rounds; ++i) round(c, V::wide_set(round_key_[i][0]), V::wide_set(round_key_[i][1]));
    finish(c, out);
  }

  // One group of blocks from `block` of `row` on, running into the rows after it: every lane has its own words.
  void across_rows(std::int64_t row, std::int64_t block, float* out) const {
    std::uint32_t words[6][V::width];
    const std::int64_t rows = shape_.samples * shape_.draws;
    Row at = row_at(row);
    for (int i = 0; i < V::width; ++i) {
      const int lane = lane_of_block(i);
      words[0][lane] = at.first_block + static_cast<std::uint32_t>(block);
      words[1][lane] = at.stream;
      words[2][lane] = static_cast<std::uint32_t>(at.sample);
      words[3][lane] = static_cast<std::uint32_t>(at.sample >> 32);
      words[4][lane] = static_cast<std::uint32_t>(at.seed);
      words[5][lane] = static_cast<std::uint32_t>(at.seed >> 32);
      // Past the last row the lanes' values are not used.
      if (++block == blocks_per_row_ && row + 1 < rows) {
        block = 0;
        at = row_at(++row);
      }
    }
    Wide c[4], k[2];
    for (int i = 0; i < 4; ++i) c[i] = V::widen(V::load_bits(words[i]));
    for (int i = 0; i < 2; ++i) k[i] = V::widen(V::load_bits(words[4 + i]));
    for (int i = 0; i < Philox::rounds; ++i) {
      round(c, k[0], k[1]);
      k[0] = V::wide_add(k[0], Philox::w0);
      k[1] = V::wide_add(k[1], Philox::w1);
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

  void schedule(std::uint64_t seed) {
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
