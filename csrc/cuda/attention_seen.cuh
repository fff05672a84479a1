// Which keys the queries of a tile see, and which probabilities are dropped: AttentionOptions, for the kernels of
// attention_simt.cuh.
#pragma once

#include <cmath>

#include "attention_tensors.cuh"
#include "noise.cuh"

namespace gencore::cuda {

// Everyday calls: every query sees every key, each head has keys of its own, values are as large as keys.
struct EveryKey {
  static constexpr bool is_plain = true;

  __device__ __forceinline__ std::int64_t group() const { return 1; }
  __device__ __forceinline__ int value_size(int size) const { return size; }
};

// All others.
template <class F>
struct SomeKeys {
  static constexpr bool is_plain = false;

  // For all batch x heads x queries x keys, by strides that may be 0; without data there is none.
  HeadsTensor mask;
  const std::int64_t* key_lengths;
  NoiseWords noise;
  // Heads of queries for one of keys, which are `heads` in all.
  std::int64_t heads_of_keys, heads;
  F gain;
  float dropped_below;
  int channels_of_values;
  DType mask_dtype;
  bool mask_is_boolean, causal, drops;

  __device__ __forceinline__ std::int64_t group() const { return heads_of_keys; }
  __device__ __forceinline__ int value_size(int) const { return channels_of_values; }
};

template <class F>
SomeKeys<F> some_keys(const AttentionShape& shape, const AttentionOptions& options) {
  SomeKeys<F> sees{};
  sees.mask = options.mask;
  sees.mask_is_boolean = options.mask_is_boolean;
  sees.mask_dtype = options.mask_dtype;
  sees.key_lengths = options.key_lengths;
  sees.causal = options.causal;
  sees.heads = shape.heads;
  sees.heads_of_keys = shape.heads / shape.key_heads;
  sees.channels_of_values = static_cast<int>(shape.value_size);
  sees.drops = options.dropout > 0;
  if (sees.drops) {
    sees.noise = noise_words(options.key);
    // Uniforms are multiples of 2^-24: so the comparison is that with the probability itself.
    sees.dropped_below = static_cast<float>(std::ceil(options.dropout * 0x1p24) * 0x1p-24);
    sees.gain = static_cast<F>(options.dropout < 1 ? 1 / (1 - options.dropout) : 0);
  }
  return sees;
}

// What a block's own tokens, keys or queries, see of the others or are seen by: tile by tile, for one head of queries
// at a time. A thread has the products [i][j] of the own tokens from `row` of the block on and those from `column` of
// the tile on.
template <class Tiles, bool of_keys, class Sees>
class Sight;

template <class Tiles, bool of_keys>
class Sight<Tiles, of_keys, EveryKey> {
  using F = typename Tiles::F;
  static constexpr int micro = Tiles::micro;

 public:
  __device__ __forceinline__ Sight(const EveryKey&, std::int64_t first, int row, int column, std::int64_t queries,
                                   std::int64_t keys, std::int64_t)
      : row_(row),
        column_(column),
        first_(first),
        own_tokens_(of_keys ? keys : queries),
        tokens_(of_keys ? queries : keys) {}

  __device__ __forceinline__ void begin_head(std::int64_t) {}
  // The keys there are, and the tokens at which the tiles begin and end.
  __device__ __forceinline__ std::int64_t keys() const { return of_keys ? own_tokens_ : tokens_; }
  __device__ __forceinline__ std::int64_t begin() const { return 0; }
  __device__ __forceinline__ std::int64_t end() const { return tokens_; }

  // Goes to a tile. Whether nothing in it is seen.
  __device__ __forceinline__ bool skips(std::int64_t at) {
    at_ = at;
    return false;
  }
  // Of the products of an own token.
  __device__ __forceinline__ void make_logits(F (&x)[micro], int, F scale) const {
#pragma unroll
    for (int j = 0; j < micro; ++j) x[j] *= scale;
  }
  // Where `of_all`, of own tokens that do not exist too.
  template <bool of_all>
  __device__ __forceinline__ bool sees(int i, int j) const {
    return (of_all || first_ + row_ + i < own_tokens_) && at_ + column_ + j < tokens_;
  }
  // A probability, or its gradient, after dropout.
  __device__ __forceinline__ F left(F x, int, int) const { return x; }

 private:
  const int row_, column_;
  const std::int64_t first_, own_tokens_, tokens_;
  std::int64_t at_ = 0;
};

template <class Tiles, bool of_keys, class Sees>
class Sight {
  using F = typename Tiles::F;
  static constexpr int micro = Tiles::micro, side = Tiles::side;
  static_assert(micro <= 4);

 public:
  // `first` is the block's first token; `plane`, here and below, counts the heads of queries of all samples.
  __device__ __forceinline__ Sight(const Sees& sees, std::int64_t first, int row, int column, std::int64_t queries,
                                   std::int64_t keys, std::int64_t plane)
      : sees_(sees), row_(row), column_(column), first_(first), queries_(queries), all_keys_(keys), keys_(keys) {
    if (sees.key_lengths != nullptr) {
      const std::int64_t length = sees.key_lengths[plane / sees.heads];
      keys_ = length < 0 ? 0 : length < keys ? length : keys;
    }
  }

  __device__ __forceinline__ void begin_head(std::int64_t plane) {
    sample_ = plane / sees_.heads;
    head_ = plane - sample_ * sees_.heads;
  }
  __device__ __forceinline__ std::int64_t keys() const { return keys_; }
  __device__ __forceinline__ std::int64_t begin() const {
    if (of_keys && first_ >= keys_) return queries_;
    return of_keys && sees_.causal ? first_ : 0;
  }
  __device__ __forceinline__ std::int64_t end() const {
    if (of_keys) return queries_;
    return sees_.causal && first_ + side < keys_ ? first_ + side : keys_;
  }

  // All threads come here together.
  __device__ __forceinline__ bool skips(std::int64_t at) {
    at_ = at;
    seen_ = 0;
#pragma unroll
    for (int i = 0; i < micro; ++i) {
#pragma unroll
      for (int j = 0; j < micro; ++j) {
        const bool seen = query(i, j) < queries_ && key(i, j) < keys_ && (!sees_.causal || key(i, j) <= query(i, j));
        seen_ |= static_cast<unsigned>(seen) << (i * micro + j);
      }
    }
    kept_ = ~0u;
    if (sees_.mask.data != nullptr) {
      if (sees_.mask_is_boolean) {
        hide(static_cast<const unsigned char*>(sees_.mask.data));
      } else {
        with_mask([&](auto* mask) { hide(mask); });
      }
      if (!__syncthreads_or(seen_ != 0)) return true;
    }
    if (sees_.drops) drop();
    return false;
  }
  __device__ __forceinline__ void make_logits(F (&x)[micro], int i, F scale) const {
#pragma unroll
    for (int j = 0; j < micro; ++j) x[j] *= scale;
    if (sees_.mask.data == nullptr || sees_.mask_is_boolean) return;
    with_mask([&](auto* mask) {
#pragma unroll
      for (int j = 0; j < micro; ++j) {
        if (has(seen_, i, j)) x[j] += bias(mask[place(i, j)]);
      }
    });
  }
  template <bool>
  __device__ __forceinline__ bool sees(int i, int j) const {
    return has(seen_, i, j);
  }
  __device__ __forceinline__ F left(F x, int i, int j) const {
    if (!sees_.drops) return x;
    return has(kept_, i, j) ? x * sees_.gain : F(0);
  }

 private:
  static __device__ __forceinline__ bool has(unsigned bits, int i, int j) { return bits >> (i * micro + j) & 1u; }
  static __device__ __forceinline__ F bias(unsigned char seen) { return seen != 0 ? F(0) : -F(INFINITY); }
  template <class T>
  static __device__ __forceinline__ F bias(T x) {
    const F added = static_cast<F>(to_arithmetic(x));
    return added <= F(least_bias) ? -F(INFINITY) : added;
  }

  __device__ __forceinline__ std::int64_t query(int i, int j) const {
    return of_keys ? at_ + column_ + j : first_ + row_ + i;
  }
  __device__ __forceinline__ std::int64_t key(int i, int j) const {
    return of_keys ? first_ + row_ + i : at_ + column_ + j;
  }
  __device__ __forceinline__ std::int64_t place(int i, int j) const {
    const HeadsTensor& mask = sees_.mask;
    return sample_ * mask.batch + head_ * mask.head + query(i, j) * mask.token + key(i, j) * mask.channel;
  }

  template <class Body>
  __device__ __forceinline__ void with_mask(Body&& body) const {
    switch (sees_.mask_dtype) {
      case DType::float32: return body(static_cast<const float*>(sees_.mask.data));
      case DType::float64: return body(static_cast<const double*>(sees_.mask.data));
      case DType::bfloat16: return body(static_cast<const bfloat16*>(sees_.mask.data));
      case DType::float16: return body(static_cast<const float16*>(sees_.mask.data));
    }
  }
  template <class T>
  __device__ __forceinline__ void hide(const T* mask) {
#pragma unroll
    for (int i = 0; i < micro; ++i) {
#pragma unroll
      for (int j = 0; j < micro; ++j) {
        if (has(seen_, i, j) && bias(mask[place(i, j)]) == -F(INFINITY)) seen_ &= ~(1u << (i * micro + j));
      }
    }
  }

  // A thread's keys follow one another, and so do the elements of the noise.
  __device__ __forceinline__ void drop() {
    constexpr unsigned all = (1u << micro) - 1;
    RowNoise<true> noise;
    noise.begin_either(sees_.noise, sample_);
    kept_ = 0;
#pragma unroll 1
    for (int n = 0; n < micro; ++n) {
      const std::int64_t element = (head_ * queries_ + query(n, n)) * all_keys_ + key(0, 0);
      const auto skipped = static_cast<int>(element & 3);
      unsigned kept = 0;
#pragma unroll 1
      for (int at = 0; at < skipped + micro; at += 4) {
        const PhiloxBlock block = noise.block(static_cast<std::uint32_t>((element >> 2) + at / 4));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          kept |= static_cast<unsigned>(unit_uniform<Lane>(block.word[i]) >= sees_.dropped_below) << (at + i);
        }
      }
      kept = kept >> skipped & all;
      if constexpr (of_keys) {
#pragma unroll
        for (int i = 0; i < micro; ++i) kept_ |= (kept >> i & 1u) << (i * micro + n);
      } else {
        kept_ |= kept << (n * micro);
      }
    }
  }

  const Sees& sees_;
  const int row_, column_;
  const std::int64_t first_, queries_, all_keys_;
  std::int64_t keys_, at_ = 0, sample_ = 0, head_ = 0;
  // Bit i * micro + j is that of [i][j].
  unsigned seen_ = 0, kept_ = 0;
};

}  // namespace gencore::cuda
