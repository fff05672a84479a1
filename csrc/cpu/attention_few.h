// Attention of few queries to many keys, as in the generation of text: keys, and channels of values, lie in the lanes
// of vectors, and each key is read once for all queries whose heads share it. Every sum has the order that
// attention_forward.h gives it, and so the same bits.
#pragma once

#include "attention_forward.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// Queries of a head up to which this is faster.
constexpr std::int64_t few_queries = 8;

inline bool are_few(const AttentionShape& shape) {
  return shape.queries <= few_queries && shape.queries * (shape.heads / shape.key_heads) <= tile_queries;
}

// An item is a head of keys with all queries that go to it. A row is one of these.
template <class Mode>
class Few {
  using P = typename Mode::P;
  using F = typename P::F;
  using A = typename Mode::Word;
  static constexpr std::int64_t width = P::width, row_of_weights = tile_keys / Mode::depth;
  static constexpr std::int64_t words(std::int64_t n) { return divide_up(n, Mode::depth); }
  // Bytes of a line of a cache; tokens, or channels, of a block that is read at once.
  static constexpr std::int64_t line = 64, block = 16;

 public:
  // Elements of A for one thread.
  static std::int64_t space(const Attention& args) {
    const AttentionShape& shape = args.shape;
    const std::int64_t rows = shape.queries * (shape.heads / shape.key_heads);
    return words(shape.size) * (step_of(rows) + tile_keys) + (rows + words(tile_keys)) * row_of_values(shape) +
           2 * round_up(rows, Arrays<A>::unit) + 2 * rows * tile_keys + Seen<P, A>::space(args.options) +
           Arrays<A>::lost;
  }

  Few(const Attention& args, const Elements<A>& elements, A* space)
      : args_(args),
        elements_(elements),
        size_(args.shape.size),
        value_size_(args.shape.value_size),
        value_row_(row_of_values(args.shape)),
        shared_(args.shape.heads / args.shape.key_heads),
        rows_(args.shape.queries * shared_),
        step_(step_of(rows_)),
        arrays_(space),
        seen_(args.options, args.shape, std::abs(args.scale), arrays_),
        scale_(seen_.scale_left(std::abs(args.scale))),
        exponential_(scale_) {
    q_ = arrays_.take(words(size_) * step_);
    out_ = arrays_.take(rows_ * value_row_);
    most_ = arrays_.take(rows_);
    sum_ = arrays_.take(rows_);
    k_ = arrays_.take(words(size_) * tile_keys);
    v_ = arrays_.take(words(tile_keys) * value_row_);
    scores_ = arrays_.take(rows_ * tile_keys);
    weights_ = Mode::depth == 1 ? scores_ : arrays_.take(rows_ * row_of_weights);
  }

  void run(std::int64_t item) {
    const std::int64_t key_heads = args_.shape.key_heads, queries = args_.shape.queries;
    const Head key_head{item / key_heads, item % key_heads};
    const auto head = [&](std::int64_t g) { return Head{key_head.batch, key_head.head * shared_ + g}; };
    for (std::int64_t g = 0; g < shared_; ++g) {
      // What is written beyond a head's queries, the next one's write over.
      elements_.read(q_ + g * queries, step_, head(g).at(args_.q, 0, elements_.size), size_, queries, args_.q.channel,
                     args_.q.token, args_.scale < 0);
    }
    std::fill_n(out_, rows_ * value_row_, A(0));
    std::fill_n(most_, rows_, seen_.least());
    std::fill_n(sum_, rows_, A(0));
    const std::int64_t all_keys = seen_.keys(key_head.batch), last_key = seen_.keys_before(queries, all_keys);
    for (std::int64_t key = 0; key < last_key; key += tile_keys) {
      const std::int64_t keys = std::min(tile_keys, all_keys - key),
                         later = std::max<std::int64_t>(0, all_keys - key - keys);
      for_blocks(args_.k, key_head, key, keys, later, size_,
                 [&](auto i, auto c, auto* from, auto tokens, auto channels) {
                   elements_.read(k_ + words(c) * tile_keys + i, tile_keys, from, channels, tokens, args_.k.channel,
                                  args_.k.token, false);
                 });
      for (std::int64_t g = 0; g < shared_; ++g) {
        seen_.prepare_rows(head(g), 0, queries, key, keys, g * queries);
      }
      if (values_lie_in_rows()) {
        add(keys, later, static_cast<const A*>(key_head.at(args_.v, key, elements_.size)), args_.v.token);
        continue;
      }
      for_blocks(args_.v, key_head, key, keys, later, value_size_,
                 [&](auto i, auto c, auto* from, auto tokens, auto channels) {
                   elements_.read(v_ + words(i) * value_row_ + c, value_row_, from, tokens, channels, args_.v.token,
                                  args_.v.channel, false);
                 });
      add(keys, 0, v_, value_row_);
    }
    for (std::int64_t g = 0; g < shared_; ++g) finish(head(g), g * queries);
  }

 private:
  // Room for a vector behind the last query.
  static std::int64_t step_of(std::int64_t rows) { return round_up(rows + width, Arrays<A>::unit); }
  static std::int64_t row_of_values(const AttentionShape& shape) { return round_up(shape.value_size, Arrays<A>::unit); }

  // Calls body(i, c, from, tokens, channels) for blocks of a tile of tokens, from token i and channel c of it on, and
  // asks memory for the same of the next tile where there are `later` ones. Few queries wait for memory, which answers
  // some requests at a time: asked for whole tiles, it lets others wait.
  template <class Body>
  void for_blocks(const HeadsTensor& tensor, const Head& head, std::int64_t token, std::int64_t count,
                  std::int64_t later, std::int64_t size, Body&& body) const {
    const std::int64_t step = tensor.token * elements_.size;
    for (std::int64_t i = 0; i < count; i += block) {
      const char* const row = static_cast<const char*>(head.at(tensor, token + i, elements_.size));
      for (std::int64_t c = 0; c < size; c += block) {
        const char* const from = row + c * tensor.channel * elements_.size;
        for (std::int64_t j = 0; later > 0 && j < block; ++j) __builtin_prefetch(from + (tile_keys + j) * step, 0, 2);
        body(i, c, from, std::min(block, count - i), std::min(block, size - c));
      }
    }
  }

  // Whether values can be multiplied where they are.
  bool values_lie_in_rows() const {
    return Mode::depth == 1 && elements_.size == sizeof(A) && args_.v.channel == 1 && value_size_ % width == 0;
  }

  // `later`: the keys that follow, whose values lie behind those of the tile and are asked for.
  void add(std::int64_t keys, std::int64_t later, const A* v, std::int64_t v_step) {
    for_row_blocks(rows_,
                   [&](std::int64_t row, auto rows) { add_rows<rows>(row, keys, row == 0 ? later : 0, v, v_step); });
  }

  template <int rows>
  void add_rows(std::int64_t row, std::int64_t keys, std::int64_t later, const A* v, std::int64_t v_step) {
    for_panels<P>(keys, [&](std::int64_t lane, auto vectors) {
      F c[rows][vectors];
      clear(c);
      multiply<Mode, rows, vectors, 1>(words(size_), q_ + row, step_, k_ + lane, tile_keys, c);
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < vectors; ++n) {
          const std::int64_t i = (row + r) * tile_keys + lane + n * width;
          F score = c[r][n];
          if (seen_.bias() != nullptr) score = P::fma(score, seen_.factor(), P::load(seen_.bias() + i));
          P::store(scores_ + i, score);
        }
      }
    });
    F shrink[rows];
    for (int r = 0; r < rows; ++r) shrink[r] = P::set(weigh(row + r, keys));
    for_panels<P>(value_size_, [&](std::int64_t channel, auto vectors) {
      F c[rows][vectors];
      clear(c);
      const A* const weights = weights_ + row * row_of_weights;
      const auto product = [&](auto&& ahead) {
        multiply<Mode, rows, vectors, row_of_weights>(words(keys), weights, 1, v + channel, v_step, c, ahead);
      };
      if (later >= keys) {
        const A* const next = v + tile_keys * v_step + channel;
        product([&](std::int64_t i) {
          constexpr std::int64_t of_line = line / sizeof(A);
          for (std::int64_t n = 0; n < vectors * width; n += of_line) __builtin_prefetch(next + i * v_step + n, 0, 2);
        });
      } else {
        product([](std::int64_t) {});
      }
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < vectors; ++n) {
          A* const to = out_ + (row + r) * value_row_ + channel + n * width;
          P::store(to, P::fma(P::load(to), shrink[r], c[r][n]));
        }
      }
    });
  }

  // From the scores of a row to its probabilities; what the sums before are to be multiplied by.
  A weigh(std::int64_t row, std::int64_t keys) {
    A* const scores = scores_ + row * tile_keys;
    const A before = most_[row];
    std::fill(scores + keys, scores + round_up(keys, width), before);
    F most = P::set(before);
    for (std::int64_t i = 0; i < keys; i += width) most = P::max(P::load(scores + i), most);
    A lanes[width];
    P::store(lanes, most);
    A now = lanes[0];
    for (int i = 1; i < width; ++i) now = lanes[i] > now ? lanes[i] : now;
    most_[row] = now;

    const Exponential<P> exponential = exponential_;
    for (std::int64_t i = 0; i < keys; i += width) {
      P::store(scores + i, exponential.below(P::load(scores + i), P::set(now)));
    }
    A total = 0;
    for (std::int64_t i = 0; i < keys; ++i) total += scores[i];
    const F shrink = exponential.below(P::set(before), P::set(now));
    P::store(lanes, P::fma(P::set(sum_[row]), shrink, P::set(total)));
    sum_[row] = lanes[0];

    if (const A* const kept = seen_.kept()) {
      for (std::int64_t i = 0; i < keys; i += width) {
        P::store(scores + i, P::mul(P::load(scores + i), P::load(kept + row * tile_keys + i)));
      }
    }
    if constexpr (Mode::depth == 2) round_to_pairs(weights_ + row * row_of_weights, scores, keys);
    P::store(lanes, shrink);
    return lanes[0];
  }

  static void round_to_pairs([[maybe_unused]] A* pairs, [[maybe_unused]] A* p, [[maybe_unused]] std::int64_t keys) {
#if GENCORE_SIMD_NUMBER == 3
    std::fill(p + keys, p + tile_keys, 0.0f);
    for (std::int64_t i = 0; i < tile_keys; i += 2 * width) {
      const __m512bh both = _mm512_cvtne2ps_pbh(P::load(p + i + width), P::load(p + i));
      _mm512_storeu_si512(pairs + i / 2, reinterpret_cast<__m512i>(both));
    }
#endif
  }

  void finish(const Head& head, std::int64_t row) {
    const std::int64_t queries = args_.shape.queries;
    for (std::int64_t i = row; i < row + queries && args_.shape.keys > 0; ++i) {
      const F inverse = P::div(P::set(1), P::set(seen_.divisor(sum_[i])));
      for (std::int64_t c = 0; c < value_size_; c += width) {
        A* const to = out_ + i * value_row_ + c;
        P::store(to, P::mul(P::load(to), inverse));
      }
    }
    elements_.write(out_ + row * value_row_, value_row_, head.at(args_.out, 0, elements_.size), queries, value_size_,
                    args_.out.token, args_.out.channel);
    write_log_sums(args_, (head.batch * args_.shape.heads + head.head) * queries, queries, scale_, most_ + row,
                   sum_ + row);
  }

  const Attention& args_;
  const Elements<A>& elements_;
  const std::int64_t size_, value_size_, value_row_, shared_, rows_, step_;
  Arrays<A> arrays_;
  Seen<P, A> seen_;
  const double scale_;
  const Exponential<P> exponential_;
  A *q_, *out_, *most_, *sum_, *k_, *v_, *scores_, *weights_;
};

template <class Mode, class A>
Status attend(const Attention& args, const Elements<A>& elements, int threads) {
  if (!are_few(args.shape)) return forward<Mode>(args, elements, threads);
  const std::int64_t items = args.shape.batch * args.shape.key_heads;
  const int team = static_cast<int>(std::min(useful_threads(args.shape, threads), items));
  const Workspace<A> space(team, Few<Mode>::space(args));
  if (!space.ok()) return Status::out_of_memory;
  for_items(items, team, [&](int thread) { return Few<Mode>(args, elements, space.of_thread(thread)); });
  return Status::ok;
}

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
