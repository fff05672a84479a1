// Attention itself: the forward pass.
#pragma once

#include <iterator>
#include <limits>

#include "attention_seen.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// Writes the logarithms of denominators from query `first` on, from sums relative to the largest scores.
template <class A>
inline void write_log_sums(const Attention& args, std::int64_t first, std::int64_t queries, double scale, const A* most,
                           const A* sum) {
  if (args.lse == nullptr) return;
  A *const lse = static_cast<A*>(args.lse) + first, *const base = static_cast<A*>(args.base) + first;
  for (std::int64_t i = 0; i < queries; ++i) {
    const double top = scale * static_cast<double>(most[i]);
    const A apart = args.base == nullptr || sum[i] == 0 ? A(0) : static_cast<A>(top);
    lse[i] = static_cast<A>(top - static_cast<double>(apart) + std::log(static_cast<double>(sum[i])));
    if (args.base != nullptr) base[i] = apart;
  }
}

// Keys of a part: what parts add up to relative to their largest scores is joined in their order. Few queries have a
// worker for each, many go from one to the next, and both have the same bits.
constexpr std::int64_t part_keys = 1024;

inline std::int64_t parts_of(std::int64_t keys) { return std::max<std::int64_t>(1, divide_up(keys, part_keys)); }

// How a part is joined to those before it, for the queries of vectors.
template <class P>
struct Joint {
  using F = typename P::F;
  F most, of_whole, of_part;

  Joint(const Exponential<P>& exponential, F whole, F part)
      : most(P::max(part, whole)), of_whole(exponential.below(whole, most)), of_part(exponential.below(part, most)) {}
  F operator()(F whole, F part) const { return P::fma(whole, of_whole, P::mul(part, of_part)); }
};

template <class Mode>
class Forward {
  using P = typename Mode::P;
  using F = typename P::F;
  using A = typename Mode::Word;

 public:
  static constexpr std::int64_t words(std::int64_t n) { return divide_up(n, Mode::depth); }

  // Elements of A for one thread.
  static std::int64_t space(const Attention& args, const Plan& plan) {
    const AttentionShape& shape = args.shape;
    const std::int64_t of_sums = (shape.value_size + 2) * tile_queries * (parts_of(shape.keys) > 1 ? 2 : 1);
    const std::int64_t of_tile = words(shape.size) * tile_queries + of_sums;
    return plan.tiles_per_item * of_tile + words(shape.size) * tile_keys + words(tile_keys) * row_of_values(shape) +
           (tile_keys + words(tile_keys)) * tile_queries + Seen<P, A>::space(args.options) + Arrays<A>::lost;
  }

  Forward(const Attention& args, const Elements<A>& elements, const Plan& plan, A* space)
      : args_(args),
        elements_(elements),
        plan_(plan),
        size_(args.shape.size),
        value_size_(args.shape.value_size),
        arrays_(space),
        seen_(args.options, args.shape, std::abs(args.scale), arrays_),
        scale_(seen_.scale_left(std::abs(args.scale))),
        exponential_(scale_) {
    Arrays<A>& arrays = arrays_;
    q_ = arrays.take(plan.tiles_per_item * words(size_) * tile_queries);
    out_ = arrays.take(plan.tiles_per_item * value_size_ * tile_queries);
    most_ = arrays.take(plan.tiles_per_item * tile_queries);
    sum_ = arrays.take(plan.tiles_per_item * tile_queries);
    if (parts_of(args.shape.keys) > 1) {
      whole_out_ = arrays.take(plan.tiles_per_item * value_size_ * tile_queries);
      whole_most_ = arrays.take(plan.tiles_per_item * tile_queries);
      whole_sum_ = arrays.take(plan.tiles_per_item * tile_queries);
    }
    k_ = arrays.take(words(size_) * tile_keys);
    v_ = arrays.take(words(tile_keys) * row_of_values(args.shape));
    scores_ = arrays.take(tile_keys * tile_queries);
    // Rounded probabilities are words of another shape; others take the place of their scores.
    weights_ = Mode::depth == 1 ? scores_ : arrays.take(words(tile_keys) * tile_queries);
  }

  void run(std::int64_t item) {
    const std::int64_t head = item / plan_.items_per_head, first = item % plan_.items_per_head * plan_.tiles_per_item;
    head_ = {head / args_.shape.heads, head % args_.shape.heads};
    const Head key_head = head_of_keys(args_.shape, head_);
    const std::int64_t tiles = std::min(plan_.tiles_per_item, plan_.tiles - first);
    for (std::int64_t tile = 0; tile < tiles; ++tile) begin(tile, (first + tile) * plan_.queries_per_tile);
    const std::int64_t all_keys = seen_.keys(head_.batch);
    const std::int64_t last_key = seen_.keys_before((first + tiles) * plan_.queries_per_tile, all_keys);
    for (std::int64_t key = 0; key < last_key; key += tile_keys) {
      if (key > 0 && key % part_keys == 0) join(tiles, key == part_keys);
      const std::int64_t keys = std::min(tile_keys, all_keys - key);
      elements_.read(k_, tile_keys, key_head.at(args_.k, key, elements_.size), size_, keys, args_.k.channel,
                     args_.k.token, false);
      elements_.read(v_, row_of_values(args_.shape), key_head.at(args_.v, key, elements_.size), keys, value_size_,
                     args_.v.token, args_.v.channel, false);
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const std::int64_t query = (first + tile) * plan_.queries_per_tile, queries = queries_from(query);
        if (seen_.skips(query, queries, key)) continue;
        seen_.prepare(head_, query, queries, key, keys);
        if (seen_.bias() != nullptr || seen_.kept() != nullptr) {
          for_panels<P>(queries, [&](std::int64_t lane, auto vectors) { add<vectors, true>(tile, lane, keys); });
        } else {
          for_panels<P>(queries, [&](std::int64_t lane, auto vectors) { add<vectors, false>(tile, lane, keys); });
        }
      }
    }
    if (last_key > part_keys) {
      join(tiles, false);
      std::swap(out_, whole_out_);
      std::swap(most_, whole_most_);
      std::swap(sum_, whole_sum_);
    }
    for (std::int64_t tile = 0; tile < tiles; ++tile) finish(tile, (first + tile) * plan_.queries_per_tile);
  }

 private:
  static std::int64_t row_of_values(const AttentionShape& shape) { return round_up(shape.value_size, Arrays<A>::unit); }

  std::int64_t queries_from(std::int64_t query) const {
    return std::min(plan_.queries_per_tile, args_.shape.queries - query);
  }

  void* at(const HeadsTensor& tensor, std::int64_t token) const { return head_.at(tensor, token, elements_.size); }

  void begin(std::int64_t tile, std::int64_t query) {
    // A negative scale turns the queries instead, so that a greater product is a greater logit.
    elements_.read(q_ + tile * words(size_) * tile_queries, tile_queries, at(args_.q, query), size_,
                   queries_from(query), args_.q.channel, args_.q.token, args_.scale < 0);
    clear_sums(tile);
  }

  void clear_sums(std::int64_t tile) {
    std::fill_n(out_ + tile * value_size_ * tile_queries, value_size_ * tile_queries, A(0));
    std::fill_n(most_ + tile * tile_queries, tile_queries, seen_.least());
    std::fill_n(sum_ + tile * tile_queries, tile_queries, A(0));
  }

  // Joins the sums of a part to the whole, or begins it, and clears them.
  void join(std::int64_t tiles, bool begins) {
    constexpr std::int64_t width = P::width;
    if (begins) {
      std::swap(out_, whole_out_);
      std::swap(most_, whole_most_);
      std::swap(sum_, whole_sum_);
    }
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      for (std::int64_t lane = 0; !begins && lane < tile_queries; lane += width) {
        const std::int64_t i = tile * tile_queries + lane, of_values = tile * value_size_ * tile_queries + lane;
        const Joint<P> joint(exponential_, P::load(whole_most_ + i), P::load(most_ + i));
        P::store(whole_most_ + i, joint.most);
        P::store(whole_sum_ + i, joint(P::load(whole_sum_ + i), P::load(sum_ + i)));
        for (std::int64_t c = 0; c < value_size_; ++c) {
          A* const to = whole_out_ + of_values + c * tile_queries;
          P::store(to, joint(P::load(to), P::load(out_ + of_values + c * tile_queries)));
        }
      }
      clear_sums(tile);
    }
  }

  // Adds a tile of keys to the vectors of queries from `lane` on. `limited`: by what `seen_` has prepared.
  template <int vectors, bool limited>
  void add(std::int64_t tile, std::int64_t lane, std::int64_t keys) {
    const A* const q = q_ + tile * words(size_) * tile_queries + lane;
    A* const scores = scores_ + lane;
    A* const most = most_ + tile * tile_queries + lane;
    A* const sum = sum_ + tile * tile_queries + lane;
    A* const out = out_ + tile * value_size_ * tile_queries + lane;
    constexpr std::int64_t width = P::width;
    const A* const bias = limited && seen_.bias() != nullptr ? seen_.bias() + lane : nullptr;
    const F factor = seen_.factor();

    F before[vectors], now[vectors];
    for (int n = 0; n < vectors; ++n) now[n] = before[n] = P::load(most + n * width);
    for_row_blocks(keys, [&](std::int64_t key, auto rows) {
      F c[rows][vectors];
      clear(c);
      multiply<Mode, rows, vectors, 1>(words(size_), k_ + key, tile_keys, q, tile_queries, c);
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < vectors; ++n) {
          if constexpr (limited) {
            if (bias != nullptr) {
              c[r][n] = P::fma(c[r][n], factor, P::load(bias + (key + r) * tile_queries + n * width));
            }
          }
          P::store(scores + (key + r) * tile_queries + n * width, c[r][n]);
          now[n] = P::max(c[r][n], now[n]);
        }
      }
    });

    F shrink[vectors], total[vectors];
    for (int n = 0; n < vectors; ++n) {
      shrink[n] = exponential_.below(before[n], now[n]);
      total[n] = P::set(0);
      P::store(most + n * width, now[n]);
    }
    weigh<vectors, limited>(lane, keys, now, total);
    for (int n = 0; n < vectors; ++n) P::store(sum + n * width, P::fma(P::load(sum + n * width), shrink[n], total[n]));

    const std::int64_t row_of_v = row_of_values(args_.shape);
    for_row_blocks(value_size_, [&](std::int64_t channel, auto rows) {
      F c[rows][vectors];
      clear(c);
      multiply<Mode, rows, vectors, 1>(words(keys), v_ + channel, row_of_v, weights_ + lane, tile_queries, c);
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < vectors; ++n) {
          A* const to = out + (channel + r) * tile_queries + n * width;
          P::store(to, P::fma(P::load(to), shrink[n], c[r][n]));
        }
      }
    });
  }

  // From scores to probabilities, but for the denominator, whose part is added to `total`.
  template <int vectors, bool limited>
  void weigh(std::int64_t lane, std::int64_t keys, const F (&most)[vectors], F (&total)[vectors]) {
    constexpr std::int64_t width = P::width;
    const A* const kept = limited && seen_.kept() != nullptr ? seen_.kept() + lane : nullptr;
    const auto left = [&](F p, std::int64_t i) {
      if constexpr (limited) {
        if (kept != nullptr) return P::mul(p, P::load(kept + i));
      }
      return p;
    };
    const Exponential<P> exponential = exponential_;
    A* const scores = scores_ + lane;
    if constexpr (Mode::depth == 1) {
      for (std::int64_t key = 0; key < keys; ++key) {
        for (int n = 0; n < vectors; ++n) {
          A* const score = scores + key * tile_queries + n * width;
          const F p = exponential.below(P::load(score), most[n]);
          total[n] = P::add(total[n], p);
          P::store(score, left(p, key * tile_queries + n * width));
        }
      }
    } else {
#if GENCORE_SIMD_NUMBER == 3
      A* const weights = weights_ + lane;
      // Alternating, the words of the one and of the other.
      const __m512i alternate = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      for (std::int64_t key = 0; key < keys; key += 2) {
        for (int n = 0; n < vectors; ++n) {
          const A* const score = scores + key * tile_queries + n * width;
          F p = exponential.below(P::load(score), most[n]);
          total[n] = P::add(total[n], p);
          p = left(p, key * tile_queries + n * width);
          F other = P::set(0);
          if (key + 1 < keys) {
            other = exponential.below(P::load(score + tile_queries), most[n]);
            total[n] = P::add(total[n], other);
            other = left(other, (key + 1) * tile_queries + n * width);
          }
          const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(other, p));
          _mm512_storeu_si512(weights + key / 2 * tile_queries + n * width, _mm512_permutexvar_epi16(alternate, both));
        }
      }
#endif
    }
  }

  void finish(std::int64_t tile, std::int64_t query) {
    constexpr std::int64_t width = P::width;
    const std::int64_t queries = queries_from(query);
    A* const out = out_ + tile * value_size_ * tile_queries;
    A* const most = most_ + tile * tile_queries;
    A* const sum = sum_ + tile * tile_queries;
    if (args_.shape.keys > 0) {
      A* const divisor = scores_;  // What was there is no longer needed.
      for (std::int64_t i = 0; i < tile_queries; ++i) divisor[i] = seen_.divisor(sum[i]);
      for (std::int64_t lane = 0; lane < queries; lane += width) {
        const F inverse = P::div(P::set(1), P::load(divisor + lane));
        for (std::int64_t c = 0; c < value_size_; ++c) {
          A* const to = out + c * tile_queries + lane;
          P::store(to, P::mul(P::load(to), inverse));
        }
      }
    }
    elements_.write(out, tile_queries, at(args_.out, query), value_size_, queries, args_.out.channel, args_.out.token);
    write_log_sums(args_, (head_.batch * args_.shape.heads + head_.head) * args_.shape.queries + query, queries, scale_,
                   most, sum);
  }

  const Attention& args_;
  const Elements<A>& elements_;
  const Plan& plan_;
  const std::int64_t size_, value_size_;
  Arrays<A> arrays_;
  Seen<P, A> seen_;
  const double scale_;
  const Exponential<P> exponential_;
  Head head_{};
  A *q_, *out_, *most_, *sum_, *k_, *v_, *scores_, *weights_;
  // Of the parts before, where there are several.
  A *whole_out_ = nullptr, *whole_most_ = nullptr, *whole_sum_ = nullptr;
};

template <class Mode, class A>
Status forward(const Attention& args, const Elements<A>& elements, int threads) {
  using Worker = Forward<Mode>;
  const Plan plan(args.shape, threads, sizeof(A));
  const Workspace<A> space(plan.team, Worker::space(args, plan));
  if (!space.ok()) return Status::out_of_memory;
  for_items(plan.items, plan.team, [&](int thread) { return Worker(args, elements, plan, space.of_thread(thread)); });
  return Status::ok;
}

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
