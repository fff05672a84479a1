#include "gencore/attention.h"

#include <algorithm>
#include <iterator>
#include <limits>

#include "attention_backward.h"
#include "attention_double_backward.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

template <class Mode>
class Forward {
  using P = typename Mode::P;
  using F = typename P::F;
  using A = typename Mode::Word;

 public:
  static constexpr std::int64_t words(std::int64_t n) { return divide_up(n, Mode::depth); }

  // Elements of A for one thread.
  static std::int64_t space(const AttentionShape& shape, const Plan& plan) {
    const std::int64_t of_tile = (words(shape.size) + shape.size + 2) * tile_queries;
    return plan.tiles_per_item * of_tile + words(shape.size) * tile_keys + words(tile_keys) * row_of_values(shape) +
           (tile_keys + words(tile_keys)) * tile_queries + Arrays<A>::lost;
  }

  Forward(const Attention& args, const Elements<A>& elements, const Plan& plan, A* space)
      : args_(args),
        elements_(elements),
        plan_(plan),
        size_(args.shape.size),
        scale_(std::abs(args.scale)),
        exponential_(scale_) {
    Arrays<A> arrays(space);
    q_ = arrays.take(plan.tiles_per_item * words(size_) * tile_queries);
    out_ = arrays.take(plan.tiles_per_item * size_ * tile_queries);
    most_ = arrays.take(plan.tiles_per_item * tile_queries);
    sum_ = arrays.take(plan.tiles_per_item * tile_queries);
    k_ = arrays.take(words(size_) * tile_keys);
    v_ = arrays.take(words(tile_keys) * row_of_values(args.shape));
    scores_ = arrays.take(tile_keys * tile_queries);
    // Rounded probabilities are words of another shape; others take the place of their scores.
    weights_ = Mode::depth == 1 ? scores_ : arrays.take(words(tile_keys) * tile_queries);
  }

  void run(std::int64_t item) {
    const std::int64_t head = item / plan_.items_per_head, first = item % plan_.items_per_head * plan_.tiles_per_item;
    head_ = {head / args_.shape.heads, head % args_.shape.heads};
    const std::int64_t tiles = std::min(plan_.tiles_per_item, plan_.tiles - first);
    for (std::int64_t tile = 0; tile < tiles; ++tile) begin(tile, (first + tile) * plan_.queries_per_tile);
    for (std::int64_t key = 0; key < args_.shape.keys; key += tile_keys) {
      const std::int64_t keys = std::min(tile_keys, args_.shape.keys - key);
      elements_.read(k_, tile_keys, at(args_.k, key), size_, keys, args_.k.channel, args_.k.token, false);
      elements_.read(v_, row_of_values(args_.shape), at(args_.v, key), keys, size_, args_.v.token, args_.v.channel,
                     false);
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const std::int64_t queries = queries_from((first + tile) * plan_.queries_per_tile);
        for_panels<P>(queries, [&](std::int64_t lane, auto vectors) { add<vectors>(tile, lane, keys); });
      }
    }
    for (std::int64_t tile = 0; tile < tiles; ++tile) finish(tile, (first + tile) * plan_.queries_per_tile);
  }

 private:
  static std::int64_t row_of_values(const AttentionShape& shape) { return round_up(shape.size, Arrays<A>::unit); }

  std::int64_t queries_from(std::int64_t query) const {
    return std::min(plan_.queries_per_tile, args_.shape.queries - query);
  }

  void* at(const HeadsTensor& tensor, std::int64_t token) const { return head_.at(tensor, token, elements_.size); }

  void begin(std::int64_t tile, std::int64_t query) {
    // A negative scale turns the queries instead, so that a greater product is a greater logit.
    elements_.read(q_ + tile * words(size_) * tile_queries, tile_queries, at(args_.q, query), size_,
                   queries_from(query), args_.q.channel, args_.q.token, args_.scale < 0);
    std::fill_n(out_ + tile * size_ * tile_queries, size_ * tile_queries, A(0));
    // Finite, so that a logit of minus infinity, of infinite inputs, has the probability 0, and so are differences to
    // it.
    std::fill_n(most_ + tile * tile_queries, tile_queries, -std::numeric_limits<A>::max() / 4);
    std::fill_n(sum_ + tile * tile_queries, tile_queries, A(0));
  }

  // Adds a tile of keys to the vectors of queries from `lane` on.
  template <int vectors>
  void add(std::int64_t tile, std::int64_t lane, std::int64_t keys) {
    const A* const q = q_ + tile * words(size_) * tile_queries + lane;
    A* const scores = scores_ + lane;
    A* const most = most_ + tile * tile_queries + lane;
    A* const sum = sum_ + tile * tile_queries + lane;
    A* const out = out_ + tile * size_ * tile_queries + lane;
    constexpr std::int64_t width = P::width;

    F before[vectors], now[vectors];
    for (int n = 0; n < vectors; ++n) now[n] = before[n] = P::load(most + n * width);
    for_row_blocks(keys, [&](std::int64_t key, auto rows) {
      F c[rows][vectors];
      clear(c);
      multiply<Mode, rows, vectors, 1>(words(size_), k_ + key, tile_keys, q, tile_queries, c);
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < vectors; ++n) {
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
    weigh<vectors>(lane, keys, now, total);
    for (int n = 0; n < vectors; ++n) P::store(sum + n * width, P::fma(P::load(sum + n * width), shrink[n], total[n]));

    const std::int64_t row_of_v = row_of_values(args_.shape);
    for_row_blocks(size_, [&](std::int64_t channel, auto rows) {
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
  template <int vectors>
  void weigh(std::int64_t lane, std::int64_t keys, const F (&most)[vectors], F (&total)[vectors]) {
    constexpr std::int64_t width = P::width;
    const Exponential<P> exponential = exponential_;
    A* const scores = scores_ + lane;
    if constexpr (Mode::depth == 1) {
      for (std::int64_t key = 0; key < keys; ++key) {
        for (int n = 0; n < vectors; ++n) {
          A* const score = scores + key * tile_queries + n * width;
          const F p = exponential.below(P::load(score), most[n]);
          total[n] = P::add(total[n], p);
          P::store(score, p);
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
          const F p = exponential.below(P::load(score), most[n]);
          total[n] = P::add(total[n], p);
          F other = P::set(0);
          if (key + 1 < keys) {
            other = exponential.below(P::load(score + tile_queries), most[n]);
            total[n] = P::add(total[n], other);
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
    A* const out = out_ + tile * size_ * tile_queries;
    A* const most = most_ + tile * tile_queries;
    A* const sum = sum_ + tile * tile_queries;
    if (args_.shape.keys > 0) {
      for (std::int64_t lane = 0; lane < queries; lane += width) {
        const F inverse = P::div(P::set(1), P::load(sum + lane));
        for (std::int64_t c = 0; c < size_; ++c) {
          A* const to = out + c * tile_queries + lane;
          P::store(to, P::mul(P::load(to), inverse));
        }
      }
    }
    elements_.write(out, tile_queries, at(args_.out, query), size_, queries, args_.out.channel, args_.out.token);
    if (args_.lse == nullptr) return;
    A* const lse =
        static_cast<A*>(args_.lse) + (head_.batch * args_.shape.heads + head_.head) * args_.shape.queries + query;
    for (std::int64_t i = 0; i < queries; ++i) {
      lse[i] = static_cast<A>(scale_ * static_cast<double>(most[i]) + std::log(static_cast<double>(sum[i])));
    }
  }

  const Attention& args_;
  const Elements<A>& elements_;
  const Plan& plan_;
  const std::int64_t size_;
  const double scale_;
  const Exponential<P> exponential_;
  Head head_{};
  A *q_, *out_, *most_, *sum_, *k_, *v_, *scores_, *weights_;
};

template <class Mode, class A>
Status forward(const Attention& args, const Elements<A>& elements, int threads) {
  using Worker = Forward<Mode>;
  const Plan plan(args.shape, threads, sizeof(A));
  const Workspace<A> space(plan.team, Worker::space(args.shape, plan));
  if (!space.ok()) return Status::out_of_memory;
  for_items(plan.items, plan.team, [&](int thread) { return Worker(args, elements, plan, space.of_thread(thread)); });
  return Status::ok;
}

}  // namespace

#if GENCORE_SIMD_NUMBER == 3
Status attention(const Attention& args, int threads) {
  return forward<Pairs>(args, Elements<float>{sizeof(bfloat16), gather_pairs, spread<bfloat16>}, threads);
}
#else
Status attention(const Attention& args, int threads) {
  return with_type_of_level(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return forward<Plain<Arithmetic<T>, Accumulator<T>>>(args, elements_of<T>, threads);
  });
}

Status attention_backward(const AttentionBackward& args, int threads) {
  return with_type_of_level(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return backward<Arithmetic<T>>(args, elements_of<T>, threads);
  });
}

Status attention_jvp(const AttentionJvp& args, int threads) {
  return with_type_of_level(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return jvp<Arithmetic<T>>(args, elements_of<T>, threads);
  });
}

Status attention_double_backward(const AttentionDoubleBackward& args, int threads) {
  return with_type_of_level(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return double_backward<Arithmetic<T>>(args, elements_of<T>, threads);
  });
}
#endif

}  // namespace gencore::cpu::GENCORE_SIMD

#if GENCORE_SIMD_NUMBER == 0
namespace gencore::cpu {

GENCORE_DECLARE_LEVELS(Status attention(const Attention& args, int threads);
                       Status attention_backward(const AttentionBackward& args, int threads);
                       Status attention_jvp(const AttentionJvp& args, int threads);
                       Status attention_double_backward(const AttentionDoubleBackward& args, int threads))

namespace {

// Whether what every query and every key has is there.
bool lacks(const AttentionShape& shape, std::initializer_list<const void*> of_queries,
           std::initializer_list<const void*> of_keys) {
  const auto is_null = [](const void* data) { return data == nullptr; };
  return (shape.queries > 0 && std::any_of(of_queries.begin(), of_queries.end(), is_null)) ||
         (shape.keys > 0 && std::any_of(of_keys.begin(), of_keys.end(), is_null));
}

bool is_empty(const AttentionShape& shape) {
  return shape.batch == 0 || shape.heads == 0 || (shape.queries == 0 && shape.keys == 0);
}

}  // namespace

#ifdef GENCORE_X86_LEVELS
namespace avx512_bf16 {
Status attention(const Attention& args, int threads);
}
#endif

Status attention(const Attention& args, int threads) {
  const AttentionShape& shape = args.shape;
  if (threads < 1 || !is_valid(shape)) return Status::invalid_argument;
  if (shape.batch == 0 || shape.heads == 0 || shape.queries == 0) return Status::ok;
  const bool has_keys = args.k.data != nullptr && args.v.data != nullptr;
  if (args.q.data == nullptr || args.out.data == nullptr || (shape.keys > 0 && !has_keys)) {
    return Status::invalid_argument;
  }
#ifdef GENCORE_X86_LEVELS
  if (args.dtype == DType::bfloat16 && simd_level() == SimdLevel::avx512_bf16) {
    return avx512_bf16::attention(args, threads);
  }
#endif
  if (args.dtype == DType::float64) return scalar::attention(args, threads);
  GENCORE_DISPATCH(attention, args, threads);
}

Status attention_backward(const AttentionBackward& args, int threads) {
  const AttentionShape& shape = args.shape;
  if (threads < 1 || !is_valid(shape)) return Status::invalid_argument;
  if (is_empty(shape)) return Status::ok;
  if (lacks(shape, {args.grad_out.data, args.q.data, args.out.data, args.lse}, {args.k.data, args.v.data})) {
    return Status::invalid_argument;
  }
  if (args.dtype == DType::float64) return scalar::attention_backward(args, threads);
  GENCORE_DISPATCH(attention_backward, args, threads);
}

Status attention_jvp(const AttentionJvp& args, int threads) {
  const AttentionShape& shape = args.shape;
  if (threads < 1 || !is_valid(shape)) return Status::invalid_argument;
  if (is_empty(shape) || shape.queries == 0) return Status::ok;
  if (lacks(shape, {args.q.data, args.out.data, args.lse, args.d_out.data}, {args.k.data, args.v.data})) {
    return Status::invalid_argument;
  }
  if (args.dtype == DType::float64) return scalar::attention_jvp(args, threads);
  GENCORE_DISPATCH(attention_jvp, args, threads);
}

Status attention_double_backward(const AttentionDoubleBackward& args, int threads) {
  const AttentionShape& shape = args.shape;
  if (threads < 1 || !is_valid(shape)) return Status::invalid_argument;
  if (is_empty(shape)) return Status::ok;
  if (lacks(shape, {args.grad_out.data, args.q.data, args.out.data, args.lse}, {args.k.data, args.v.data})) {
    return Status::invalid_argument;
  }
  if (args.dtype == DType::float64) return scalar::attention_double_backward(args, threads);
  GENCORE_DISPATCH(attention_double_backward, args, threads);
}

}  // namespace gencore::cpu
#endif
