// Which keys the queries of a tile see, and which probabilities are dropped: AttentionOptions, tile by tile.
#pragma once

#include "attention_tiles.h"
#include "noise.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

template <class T, class A>
inline void read_mask(A* row, const void* mask, std::int64_t step, std::int64_t keys) {
  const T* const from = static_cast<const T*>(mask);
  const auto bias = [](T value) {
    const A x = static_cast<A>(value_of(value));
    return x <= static_cast<A>(least_bias) ? -std::numeric_limits<A>::infinity() : x;
  };
  if (step == 1) {
    for (std::int64_t i = 0; i < keys; ++i) row[i] = bias(from[i]);
  } else {
    for (std::int64_t i = 0; i < keys; ++i) row[i] = bias(from[i * step]);
  }
}

// A worker's view of the options. `prepare` makes what the scores of a tile of queries and keys go through:
//   score = score * factor() + bias        p = p * kept
// Tiles of `bias` and `kept` have a row of queries for each key, or, for few queries, a row of keys for each query.
template <class P, class A>
class Seen {
  using F = typename P::F;
  static constexpr std::int64_t width = P::width;
  static constexpr std::int64_t tile = tile_keys * tile_queries;
  static constexpr double least_scale = 1e-30;

 public:
  // Elements of A for one thread.
  static std::int64_t space(const AttentionOptions& options) {
    return (hides(options) ? 2 * tile : 0) + (options.dropout > 0 ? 2 * tile : 0);
  }

  Seen(const AttentionOptions& options, const AttentionShape& shape, double scale, Arrays<A>& arrays)
      : options_(options),
        shape_(shape),
        // Minus infinity, as a logit, takes the scale's place where that would turn it or, as 0 in A, make it a NaN.
        scaled_(options.mask.data != nullptr && !options.mask_is_boolean ? true
                                                                         : hides(options) && !(scale > least_scale)),
        factor_(P::set(static_cast<A>(scaled_ ? scale : 1))),
        noise_({shape.batch, 1, shape.heads * shape.queries * shape.keys, 0}, options.key) {
    if (hides(options)) {
      rows_ = arrays.take(tile);
      bias_tile_ = arrays.take(tile);
    }
    if (options.dropout > 0) {
      kept_rows_ = arrays.take(tile);
      kept_tile_ = arrays.take(tile);
    }
  }

  // Whether some queries may see no key.
  bool may_see_none() const { return hides(options_) || options_.key_lengths != nullptr; }
  // What the maximum begins with: finite, so that a logit of minus infinity, of infinite inputs, has the probability 0,
  // and so are differences to it. Masks may add the least number there is.
  A least() const {
    constexpr A number = -std::numeric_limits<A>::max();
    return may_see_none() ? number : number / 4;
  }
  // What the sum of a query's weighed values is divided by, from that of the weights.
  A divisor(A sum) const { return sum == 0 && may_see_none() ? std::numeric_limits<A>::infinity() : sum; }
  // What scores are multiplied by to be logits, once they have gone through factor() and bias.
  double scale_left(double scale) const { return scaled_ ? 1 : scale; }
  bool gives_logits() const { return scaled_; }
  F factor() const { return factor_; }

  // The keys of a sample.
  std::int64_t keys(std::int64_t batch) const {
    if (options_.key_lengths == nullptr) return shape_.keys;
    return std::clamp<std::int64_t>(options_.key_lengths[batch], 0, shape_.keys);
  }
  // Those among the first `keys` that queries before `query` see.
  std::int64_t keys_before(std::int64_t query, std::int64_t keys) const {
    return options_.causal ? std::min(keys, query) : keys;
  }
  // Whether none of the queries sees a key from `key` on.
  bool skips(std::int64_t query, std::int64_t queries, std::int64_t key) const {
    return options_.causal && key >= query + queries;
  }

  // For queries in lanes.
  void prepare(const Head& head, std::int64_t query, std::int64_t queries, std::int64_t key, std::int64_t keys) {
    prepare_rows(head, query, queries, key, keys);
    if (bias_ != nullptr) bias_ = turned(bias_tile_, bias_, queries, keys);
    if (kept_ != nullptr) kept_ = turned(kept_tile_, kept_, queries, keys);
  }
  // For keys in lanes. `at`: where the rows begin among those of the tile.
  void prepare_rows(const Head& head, std::int64_t query, std::int64_t queries, std::int64_t key, std::int64_t keys,
                    std::int64_t at = 0) {
    const bool crosses = options_.causal && key + keys - 1 > query;
    bias_ = nullptr;
    if (options_.mask.data != nullptr || crosses || scaled_) {
      for (std::int64_t q = 0; q < queries; ++q) {
        A* const row = rows_ + (at + q) * tile_keys;
        fill_bias(row, head, query + q, key, keys);
        for (std::int64_t k = std::max<std::int64_t>(0, query + q - key + 1); options_.causal && k < keys; ++k) {
          row[k] = -std::numeric_limits<A>::infinity();
        }
      }
      bias_ = rows_;
    }
    kept_ = nullptr;
    if (options_.dropout > 0) {
      for (std::int64_t q = 0; q < queries; ++q) {
        fill_kept(kept_rows_ + (at + q) * tile_keys, head, query + q, key, keys);
      }
      kept_ = kept_rows_;
    }
  }

  const A* bias() const { return bias_; }
  const A* kept() const { return kept_; }

 private:
  static bool hides(const AttentionOptions& options) { return options.mask.data != nullptr || options.causal; }

  void fill_bias(A* row, const Head& head, std::int64_t query, std::int64_t key, std::int64_t keys) const {
    const HeadsTensor& mask = options_.mask;
    if (mask.data == nullptr) return std::fill_n(row, keys, A(0)), void();
    const std::int64_t first =
        head.batch * mask.batch + head.head * mask.head + query * mask.token + key * mask.channel;
    if (options_.mask_is_boolean) {
      const auto* const from = static_cast<const unsigned char*>(mask.data) + first;
      constexpr A hidden = -std::numeric_limits<A>::infinity();
      if (mask.channel == 1) {
        for (std::int64_t i = 0; i < keys; ++i) row[i] = from[i] != 0 ? A(0) : hidden;
      } else {
        for (std::int64_t i = 0; i < keys; ++i) row[i] = from[i * mask.channel] != 0 ? A(0) : hidden;
      }
      return;
    }
    with_type(options_.mask_dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      read_mask<T>(row, static_cast<const T*>(mask.data) + first, mask.channel, keys);
      return Status::ok;
    });
  }

  void fill_kept(A* row, const Head& head, std::int64_t query, std::int64_t key, std::int64_t keys) {
    float uniforms[tile_keys];
    const std::int64_t of_sample = shape_.heads * shape_.queries * shape_.keys;
    const std::int64_t element = (head.head * shape_.queries + query) * shape_.keys + key;
    noise_.fill(head.batch * of_sample + element, keys, uniforms);
    const A factor = static_cast<A>(options_.dropout < 1 ? 1 / (1 - options_.dropout) : 0);
    // Uniforms are multiples of 2^-24: so the comparison is that with the probability itself.
    const float bound = static_cast<float>(std::ceil(options_.dropout * 0x1p24) * 0x1p-24);
    for (std::int64_t i = 0; i < keys; ++i) row[i] = uniforms[i] >= bound ? factor : A(0);
  }

  // Rows of keys become rows of queries.
  static const A* turned(A* to, const A* from, std::int64_t queries, std::int64_t keys) {
    for (std::int64_t q = 0; q < queries; q += width) {
      for (std::int64_t k = 0; k < keys; k += width) {
        F x[width];
        for (std::int64_t i = 0; i < width; ++i) x[i] = P::load(from + (q + i) * tile_keys + k);
        P::transpose(x);
        for (std::int64_t i = 0; i < width; ++i) P::store(to + (k + i) * tile_queries + q, x[i]);
      }
    }
    return to;
  }

  const AttentionOptions& options_;
  const AttentionShape& shape_;
  const bool scaled_;
  const F factor_;
  NoiseSource<Uniforms> noise_;
  A *rows_ = nullptr, *bias_tile_ = nullptr, *kept_rows_ = nullptr, *kept_tile_ = nullptr;
  const A *bias_ = nullptr, *kept_ = nullptr;
};

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
