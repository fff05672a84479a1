// Attention of few queries to many keys, as in the generation of text: keys, and channels of values, lie in the lanes
// of vectors, and each key is read once for all queries whose heads share it. Every sum has the order that
// attention_forward.h gives it, and so the same bits.
#pragma once

#include "attention_forward.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// Queries of a head up to which this is faster.
constexpr std::int64_t few_queries = 8;

inline bool are_few(const AttentionShape& shape) { return shape.queries <= few_queries; }

// What the queries of a head of keys, its rows, have from parts of the keys: sums of weighed values, and for each row
// the largest score and the sum of weights.
template <class A>
struct PartsOfRows {
  std::int64_t parts, rows, value_row;

  explicit PartsOfRows(const AttentionShape& shape)
      : parts(parts_of(shape.keys)),
        rows(shape.queries * (shape.heads / shape.key_heads)),
        value_row(round_up(shape.value_size, Arrays<A>::unit)) {}
  // Elements of one part of one head of keys.
  std::int64_t size() const { return round_up(rows, Arrays<A>::unit) * 2 + rows * value_row; }
};

// An item is a part of the keys of a head, with all queries that go to it.
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
    const PartsOfRows<A> parts(shape);
    return words(shape.size) * (step_of(parts.rows) + tile_keys) + words(tile_keys) * parts.value_row +
           2 * std::min(parts.rows, tile_queries) * tile_keys + Seen<P, A>::space(args.options) + Arrays<A>::lost;
  }

  // `sums` has room for all parts of all heads of keys.
  Few(const Attention& args, const Elements<A>& elements, A* space, A* sums)
      : args_(args),
        elements_(elements),
        parts_(args.shape),
        size_(args.shape.size),
        value_size_(args.shape.value_size),
        value_row_(parts_.value_row),
        shared_(args.shape.heads / args.shape.key_heads),
        rows_(parts_.rows),
        step_(step_of(rows_)),
        arrays_(space),
        seen_(args.options, args.shape, std::abs(args.scale), arrays_),
        scale_(seen_.scale_left(std::abs(args.scale))),
        exponential_(scale_),
        sums_(sums) {
    q_ = arrays_.take(words(size_) * step_);
    k_ = arrays_.take(words(size_) * tile_keys);
    v_ = arrays_.take(words(tile_keys) * value_row_);
    scores_ = arrays_.take(std::min(rows_, tile_queries) * tile_keys);
    weights_ = Mode::depth == 1 ? scores_ : arrays_.take(std::min(rows_, tile_queries) * row_of_weights);
  }

  void run(std::int64_t item) {
    const Head key_head = key_head_of(item / parts_.parts);
    const std::int64_t queries = args_.shape.queries, all_keys = seen_.keys(key_head.batch);
    const std::int64_t begin = item % parts_.parts * part_keys;
    const std::int64_t end = std::min(begin + part_keys, seen_.keys_before(queries, all_keys));
    use(item);
    if (begin > 0 && begin >= end) return;
    for (std::int64_t g = 0; g < shared_; ++g) {
      // What is written beyond a head's queries, the next one's write over.
      elements_.read(q_ + g * queries, step_, head(key_head, g).at(args_.q, 0, elements_.size), size_, queries,
                     args_.q.channel, args_.q.token, args_.scale < 0);
    }
    std::fill_n(out_, rows_ * value_row_, A(0));
    std::fill_n(most_, rows_, seen_.least());
    std::fill_n(sum_, rows_, A(0));
    for (std::int64_t key = begin; key < end; key += tile_keys) add(key_head, key, all_keys);
    if (parts_.parts == 1) finish(key_head);
  }

  // Joins the parts of a head of keys, where there are several.
  void join(std::int64_t number) {
    const Head key_head = key_head_of(number);
    const std::int64_t last = seen_.keys_before(args_.shape.queries, seen_.keys(key_head.batch));
    for (std::int64_t part = 1; part * part_keys < last; ++part) {
      use(number * parts_.parts + part);
      const A *const out = out_, *const most = most_, *const sum = sum_;
      use(number * parts_.parts);
      for (std::int64_t i = 0; i < rows_; ++i) {
        const Joint<P> joint(exponential_, P::set(most_[i]), P::set(most[i]));
        most_[i] = first_of(joint.most);
        sum_[i] = first_of(joint(P::set(sum_[i]), P::set(sum[i])));
        for (std::int64_t c = i * value_row_; c < (i + 1) * value_row_; c += width) {
          P::store(out_ + c, joint(P::load(out_ + c), P::load(out + c)));
        }
      }
    }
    use(number * parts_.parts);
    finish(key_head);
  }

 private:
  // Room for a vector behind the last query.
  static std::int64_t step_of(std::int64_t rows) { return round_up(rows + width, Arrays<A>::unit); }

  static A first_of(F x) {
    A lanes[width];
    P::store(lanes, x);
    return lanes[0];
  }

  Head key_head_of(std::int64_t number) const {
    return {number / args_.shape.key_heads, number % args_.shape.key_heads};
  }
  // Of those that share a head of keys.
  Head head(const Head& key_head, std::int64_t number) const {
    return {key_head.batch, key_head.head * shared_ + number};
  }

  // Has the sums of an item in use.
  void use(std::int64_t item) {
    out_ = sums_ + item * parts_.size();
    most_ = out_ + rows_ * value_row_;
    sum_ = most_ + round_up(rows_, Arrays<A>::unit);
  }

  // Adds a tile of keys.
  void add(const Head& key_head, std::int64_t key, std::int64_t all_keys) {
    const std::int64_t queries = args_.shape.queries;
    const std::int64_t keys = std::min(tile_keys, all_keys - key), later = all_keys - key - keys;
    const char* const k = static_cast<const char*>(key_head.at(args_.k, key, elements_.size));
    const char* const v = static_cast<const char*>(key_head.at(args_.v, key, elements_.size));
    const std::int64_t k_step = args_.k.token * elements_.size, v_step = args_.v.token * elements_.size;
    const bool k_in_place = rows_ <= most_rows && lies_in_rows(args_.k, size_, 1);
    const bool v_in_place =
        lies_in_rows(args_.v, value_size_, Mode::depth * width) && (Mode::depth == 1 || rows_ <= most_rows);
    if (!k_in_place) {
      for_blocks(args_.k, k, keys, later, size_, [&](auto i, auto c, auto* from, auto tokens, auto channels) {
        elements_.read(k_ + words(c) * tile_keys + i, tile_keys, from, channels, tokens, args_.k.channel, args_.k.token,
                       false);
      });
    }
    if (!v_in_place) {
      for_blocks(args_.v, v, keys, later, value_size_, [&](auto i, auto c, auto* from, auto tokens, auto channels) {
        elements_.read(v_ + words(i) * value_row_ + c, value_row_, from, tokens, channels, args_.v.token,
                       args_.v.channel, false);
      });
    }
    // What is seen has room for a tile of rows.
    const std::int64_t heads_at_once = std::max<std::int64_t>(1, tile_queries / queries);
    for (std::int64_t first = 0; first < shared_; first += heads_at_once) {
      const std::int64_t heads = std::min(heads_at_once, shared_ - first);
      for (std::int64_t g = 0; g < heads; ++g) {
        seen_.prepare_rows(head(key_head, first + g), 0, queries, key, keys, g * queries);
      }
      for_row_blocks(heads * queries, [&](std::int64_t row, auto rows) {
        const std::int64_t of_all = first * queries + row;
        if (k_in_place) {
          find_scores_in_place<rows>(row, k, k_step, keys, later);
        } else {
          find_scores<rows>(row, of_all, keys);
        }
        F shrink[rows];
        for (int r = 0; r < rows; ++r) shrink[r] = P::set(weigh(row + r, of_all + r, keys));
        const std::int64_t ahead = of_all == 0 && later >= keys ? tile_keys : 0;
        if constexpr (Mode::depth == 1) {
          const A* const from = v_in_place ? reinterpret_cast<const A*>(v) : v_;
          add_values<rows>(row, of_all, keys, from, v_in_place ? args_.v.token : value_row_, v_in_place ? ahead : 0,
                           shrink);
        } else if (v_in_place) {
          add_pairs<rows>(row, of_all, keys, v, v_step, ahead, shrink);
        } else {
          add_values<rows>(row, of_all, keys, v_, value_row_, 0, shrink);
        }
      });
    }
  }

  // Whether the channels of a tensor can be read as words where they are, `unit` at a time.
  bool lies_in_rows(const HeadsTensor& tensor, std::int64_t size, std::int64_t unit) const {
    return tensor.channel == 1 && elements_.size * Mode::depth == sizeof(A) && size % (unit * Mode::depth) == 0;
  }

  // Calls body(i, c, from, tokens, channels) for blocks of a tile of tokens, from token i and channel c of it on, and
  // asks memory for the same of the next tile where there are `later` ones. Few queries wait for memory, which answers
  // some requests at a time: asked for whole tiles, it lets others wait.
  template <class Body>
  void for_blocks(const HeadsTensor& tensor, const char* tile, std::int64_t count, std::int64_t later,
                  std::int64_t size, Body&& body) const {
    const std::int64_t step = tensor.token * elements_.size;
    for (std::int64_t i = 0; i < count; i += block) {
      for (std::int64_t c = 0; c < size; c += block) {
        const char* const from = tile + i * step + c * tensor.channel * elements_.size;
        for (std::int64_t j = 0; later > 0 && j < block; ++j) __builtin_prefetch(from + (tile_keys + j) * step, 0, 2);
        body(i, c, from, std::min(block, count - i), std::min(block, size - c));
      }
    }
  }

  void store_score(std::int64_t i, F score) {
    if (seen_.bias() != nullptr) score = P::fma(score, seen_.factor(), P::load(seen_.bias() + i));
    P::store(scores_ + i, score);
  }

  // The scores of rows, from `row` on of those that are seen and `of_all` on of all.
  template <int rows>
  void find_scores(std::int64_t row, std::int64_t of_all, std::int64_t keys) {
    for_panels<P>(keys, [&](std::int64_t lane, auto vectors) {
      F c[rows][vectors];
      clear(c);
      multiply<Mode, rows, vectors, 1>(words(size_), q_ + of_all, step_, k_ + lane, tile_keys, c);
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < vectors; ++n) store_score((row + r) * tile_keys + lane + n * width, c[r][n]);
      }
    });
  }

  // The same from keys where they are, a vector of them at a time, turned in registers.
  template <int rows>
  void find_scores_in_place(std::int64_t row, const char* k, std::int64_t step, std::int64_t keys, std::int64_t later) {
    const std::int64_t count = words(size_);
    for (std::int64_t lane = 0; lane < keys; lane += width) {
      const std::int64_t there = std::min(width, keys - lane);
      F c[rows][1];
      clear(c);
      for (std::int64_t w = 0; w < count; w += width) {
        const std::int64_t some = std::min(width, count - w);
        F x[width];
        for (std::int64_t i = 0; i < width; ++i) {
          const char* const at = k + (lane + std::min(i, there - 1)) * step + w * sizeof(A);
          if (later > 0) __builtin_prefetch(at + tile_keys * step, 0, 2);
          x[i] = load_part<P>(reinterpret_cast<const A*>(at), some);
        }
        P::transpose(x);
        for (std::int64_t i = 0; i < some; ++i) {
          for (int r = 0; r < rows; ++r) c[r][0] = Mode::multiply(q_[(w + i) * step_ + row + r], x[i], c[r][0]);
        }
      }
      for (int r = 0; r < rows; ++r) store_score((row + r) * tile_keys + lane, c[r][0]);
    }
  }

  // Adds weighed values. `ahead`: tokens from those of the tile to those that memory is asked for; 0: none.
  template <int rows>
  void add_values(std::int64_t row, std::int64_t of_all, std::int64_t keys, const A* v, std::int64_t step,
                  std::int64_t ahead, const F (&shrink)[rows]) {
    for_panels<P>(value_size_, [&](std::int64_t channel, auto vectors) {
      F c[rows][vectors];
      clear(c);
      const auto product = [&](auto&& ask) {
        multiply<Mode, rows, vectors, row_of_weights>(words(keys), weights_ + row * row_of_weights, 1, v + channel,
                                                      step, c, ask);
      };
      if (ahead > 0) {
        const A* const next = v + ahead * step + channel;
        product([&](std::int64_t i) {
          constexpr std::int64_t of_line = line / sizeof(A);
          for (std::int64_t n = 0; n < vectors * width; n += of_line) __builtin_prefetch(next + i * step + n, 0, 2);
        });
      } else {
        product([](std::int64_t) {});
      }
      store_sums<rows, vectors>(of_all, channel, shrink, c);
    });
  }

  // The same from values in pairs where they are: the words of two tokens are made in registers.
  template <int rows>
  void add_pairs([[maybe_unused]] std::int64_t row, [[maybe_unused]] std::int64_t of_all,
                 [[maybe_unused]] std::int64_t keys, [[maybe_unused]] const char* v, [[maybe_unused]] std::int64_t step,
                 [[maybe_unused]] std::int64_t ahead, [[maybe_unused]] const F (&shrink)[rows]) {
#if GENCORE_SIMD_NUMBER == 3
    alignas(64) std::uint16_t order[2][32];
    for (int i = 0; i < 32; ++i) {
      for (int half = 0; half < 2; ++half) order[half][i] = static_cast<std::uint16_t>(half * 16 + i / 2 + i % 2 * 32);
    }
    const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    const A* const weights = weights_ + row * row_of_weights;
    const auto add = [&](std::int64_t channel, auto loads) {
      constexpr int vectors = 2 * loads;
      F c[rows][vectors];
      clear(c);
      for (std::int64_t i = 0; i < keys; i += 2) {
        const char* const first = v + i * step + channel * 2;
        const char* const second = first + step;
        F x[vectors];
        for (int n = 0; n < loads; ++n) {
          if (ahead > 0) {
            __builtin_prefetch(first + ahead * step + n * line, 0, 2);
            __builtin_prefetch(second + ahead * step + n * line, 0, 2);
          }
          const __m512i a = _mm512_loadu_si512(first + n * line);
          const __m512i b = i + 1 < keys ? _mm512_loadu_si512(second + n * line) : _mm512_setzero_si512();
          x[2 * n] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, low, b));
          x[2 * n + 1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, high, b));
        }
        for (int r = 0; r < rows; ++r) {
          for (int n = 0; n < vectors; ++n) {
            c[r][n] = Mode::multiply(weights[r * row_of_weights + i / 2], x[n], c[r][n]);
          }
        }
      }
      store_sums<rows, vectors>(of_all, channel, shrink, c);
    };
    std::int64_t channel = 0;
    for (; channel + 64 <= value_size_; channel += 64) add(channel, std::integral_constant<int, 2>{});
    if (channel < value_size_) add(channel, std::integral_constant<int, 1>{});
#endif
  }

  template <int rows, int vectors>
  void store_sums(std::int64_t row, std::int64_t channel, const F (&shrink)[rows], const F (&c)[rows][vectors]) {
    for (int r = 0; r < rows; ++r) {
      for (int n = 0; n < vectors; ++n) {
        A* const to = out_ + (row + r) * value_row_ + channel + n * width;
        P::store(to, P::fma(P::load(to), shrink[r], c[r][n]));
      }
    }
  }

  // From the scores of a row to its probabilities; what the sums before are to be multiplied by.
  A weigh(std::int64_t row, std::int64_t of_all, std::int64_t keys) {
    A* const scores = scores_ + row * tile_keys;
    const A before = most_[of_all];
    std::fill(scores + keys, scores + round_up(keys, width), before);
    F most = P::set(before);
    for (std::int64_t i = 0; i < keys; i += width) most = P::max(P::load(scores + i), most);
    A lanes[width];
    P::store(lanes, most);
    A now = lanes[0];
    for (int i = 1; i < width; ++i) now = lanes[i] > now ? lanes[i] : now;
    most_[of_all] = now;

    const Exponential<P> exponential = exponential_;
    for (std::int64_t i = 0; i < keys; i += width) {
      P::store(scores + i, exponential.below(P::load(scores + i), P::set(now)));
    }
    A total = 0;
    for (std::int64_t i = 0; i < keys; ++i) total += scores[i];
    const F shrink = exponential.below(P::set(before), P::set(now));
    sum_[of_all] = first_of(P::fma(P::set(sum_[of_all]), shrink, P::set(total)));

    if (const A* const kept = seen_.kept()) {
      for (std::int64_t i = 0; i < keys; i += width) {
        P::store(scores + i, P::mul(P::load(scores + i), P::load(kept + row * tile_keys + i)));
      }
    }
    if constexpr (Mode::depth == 2) round_to_pairs(weights_ + row * row_of_weights, scores, keys);
    return first_of(shrink);
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

  void finish(const Head& key_head) {
    const std::int64_t queries = args_.shape.queries;
    for (std::int64_t g = 0; g < shared_; ++g) finish(head(key_head, g), g * queries);
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
  const PartsOfRows<A> parts_;
  const std::int64_t size_, value_size_, value_row_, shared_, rows_, step_;
  Arrays<A> arrays_;
  Seen<P, A> seen_;
  const double scale_;
  const Exponential<P> exponential_;
  A* const sums_;
  A *q_, *k_, *v_, *scores_, *weights_, *out_ = nullptr, *most_ = nullptr, *sum_ = nullptr;
};

// Joins the parts of a head of keys for each item.
template <class Mode>
struct JoinParts {
  Few<Mode> few;

  void run(std::int64_t item) { few.join(item); }
};

template <class Mode, class A>
Status attend(const Attention& args, const Elements<A>& elements, int threads) {
  const AttentionShape& shape = args.shape;
  if (!are_few(shape)) return forward<Mode>(args, elements, threads);
  const PartsOfRows<A> parts(shape);
  const std::int64_t heads = shape.batch * shape.key_heads, items = heads * parts.parts;
  // Bytes of keys and values below which waking another thread costs more than it saves: they take as long as to read.
  constexpr std::int64_t grain = 512 << 10;
  const std::int64_t worth = heads * shape.keys * (shape.size + shape.value_size) * elements.size / grain;
  const std::int64_t useful = std::max(useful_threads(shape, threads), std::min<std::int64_t>(threads, worth));
  const int team = static_cast<int>(std::min(useful, items));
  const Workspace<A> space(team, Few<Mode>::space(args)), sums(1, items * parts.size());
  if (!space.ok() || !sums.ok()) return Status::out_of_memory;
  const auto worker = [&](int thread) { return Few<Mode>(args, elements, space.of_thread(thread), sums.of_thread(0)); };
  for_items(items, team, worker);
  if (parts.parts > 1) for_items(heads, team, [&](int thread) { return JoinParts<Mode>{worker(thread)}; });
  return Status::ok;
}

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
