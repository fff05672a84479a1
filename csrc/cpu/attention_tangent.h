// The derivative of attention along a direction, and what the second derivative goes on from.
#pragma once

#include "attention_seen.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// What AttentionJvp and the first pass of AttentionDoubleBackward are given. The tensors of the direction may be null.
// With grad_out, `delta` and `second` get what the second derivative of the logits has for all keys of a query.
template <class A>
struct Along {
  const HeadsTensor &q, &k, &v, &out;
  LogSums<A> lse;
  const HeadsTensor &dq, &dk, &dv, &d_out;
  A* d_lse;
  const HeadsTensor* grad_out;
  A *delta, *second;
  const AttentionShape& shape;
  double scale;
  const AttentionOptions& options;
};

template <class P, class A>
class Tangent {
  using F = typename P::F;
  using Mode = Plain<P, A>;
  static constexpr std::int64_t width = P::width;

 public:
  // Elements of A for one thread.
  static std::int64_t space(const Along<A>& args, const Plan& plan) {
    const AttentionShape& shape = args.shape;
    const std::int64_t of_tile = (2 * shape.size + 2 * shape.value_size + 7) * tile_queries;
    return plan.tiles_per_item * of_tile + shape.value_size * tile_queries +
           2 * (shape.size + shape.value_size) * tile_keys + 2 * tile_keys * row_of(shape.value_size) +
           2 * tile_keys * tile_queries + Seen<P, A>::space(args.options) + Arrays<A>::lost;
  }

  Tangent(const Along<A>& args, const Elements<A>& elements, const Plan& plan, A* space)
      : args_(args),
        elements_(elements),
        plan_(plan),
        size_(args.shape.size),
        value_size_(args.shape.value_size),
        value_row_(row_of(value_size_)),
        arrays_(space),
        seen_(args.options, args.shape, args.scale, arrays_),
        scale_(P::set(static_cast<A>(args.scale))),
        exponential_(seen_.scale_left(args.scale)) {
    const std::int64_t queries = plan.tiles_per_item * tile_queries;
    for (A** tile : {&q_, &dq_}) *tile = arrays_.take(queries * size_);
    for (A** tile : {&sum_, &grad_}) *tile = arrays_.take(queries * value_size_);
    out_ = arrays_.take(value_size_ * tile_queries);
    for (A** values : {&base_, &lse_, &shift_, &mean_, &delta_, &squares_, &others_}) *values = arrays_.take(queries);
    for (A** tile : {&k_, &dk_}) *tile = arrays_.take(size_ * tile_keys);
    for (A** tile : {&v_columns_, &dv_columns_}) *tile = arrays_.take(value_size_ * tile_keys);
    v_ = arrays_.take(tile_keys * value_row_);
    dv_ = arrays_.take(tile_keys * value_row_);
    weights_ = arrays_.take(tile_keys * tile_queries);
    moved_ = arrays_.take(tile_keys * tile_queries);
  }

  void run(std::int64_t item) {
    const std::int64_t head = item / plan_.items_per_head, first = item % plan_.items_per_head * plan_.tiles_per_item;
    head_ = {head / args_.shape.heads, head % args_.shape.heads};
    const Head of_keys = head_of_keys(args_.shape, head_);
    const std::int64_t tiles = std::min(plan_.tiles_per_item, plan_.tiles - first);
    for (std::int64_t tile = 0; tile < tiles; ++tile) begin(tile, (first + tile) * plan_.queries_per_tile);
    const std::int64_t all_keys = seen_.keys(head_.batch);
    const std::int64_t last_key = seen_.keys_before((first + tiles) * plan_.queries_per_tile, all_keys);
    for (std::int64_t key = 0; key < last_key; key += tile_keys) {
      const std::int64_t keys = std::min(tile_keys, all_keys - key);
      columns(k_, args_.k, of_keys, key, keys, size_);
      rows(v_, args_.v, of_keys, key, keys);
      if (there(args_.dk)) columns(dk_, args_.dk, of_keys, key, keys, size_);
      if (there(args_.dv)) rows(dv_, args_.dv, of_keys, key, keys);
      if (has_second()) {
        columns(v_columns_, args_.v, of_keys, key, keys, value_size_);
        if (there(args_.dv)) columns(dv_columns_, args_.dv, of_keys, key, keys, value_size_);
      }
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const std::int64_t query = (first + tile) * plan_.queries_per_tile, queries = queries_from(query);
        if (key == 0) find_shift(tile, queries);
        if (seen_.skips(query, queries, key)) continue;
        seen_.prepare(head_, query, queries, key, keys);
        for_panels<P>(queries, [&](std::int64_t lane, auto vectors) { add<vectors>(tile, lane, keys); });
      }
    }
    for (std::int64_t tile = 0; tile < tiles; ++tile) finish(tile, (first + tile) * plan_.queries_per_tile);
  }

 private:
  static std::int64_t row_of(std::int64_t size) { return round_up(size, Arrays<A>::unit); }
  static bool there(const HeadsTensor& tensor) { return tensor.data != nullptr; }
  bool has_second() const { return args_.second != nullptr; }

  std::int64_t queries_from(std::int64_t query) const {
    return std::min(plan_.queries_per_tile, args_.shape.queries - query);
  }
  std::int64_t place_of(std::int64_t query) const {
    return (head_.batch * args_.shape.heads + head_.head) * args_.shape.queries + query;
  }

  void columns(A* tile, const HeadsTensor& tensor, const Head& head, std::int64_t token, std::int64_t tokens,
               std::int64_t size) const {
    static_assert(tile_keys == tile_queries);
    elements_.read(tile, tile_keys, head.at(tensor, token, elements_.size), size, tokens, tensor.channel, tensor.token,
                   false);
  }
  // Of values.
  void rows(A* tile, const HeadsTensor& tensor, const Head& head, std::int64_t token, std::int64_t tokens) const {
    elements_.read(tile, value_row_, head.at(tensor, token, elements_.size), tokens, value_size_, tensor.token,
                   tensor.channel, false);
  }

  void begin(std::int64_t tile, std::int64_t query) {
    const std::int64_t queries = queries_from(query), of_tile = tile * size_ * tile_queries;
    const std::int64_t of_values = tile * value_size_ * tile_queries;
    columns(q_ + of_tile, args_.q, head_, query, queries, size_);
    if (there(args_.dq)) columns(dq_ + of_tile, args_.dq, head_, query, queries, size_);
    if (has_second()) columns(grad_ + of_values, *args_.grad_out, head_, query, queries, value_size_);
    args_.lse.template read<P>(base_ + tile * tile_queries, lse_ + tile * tile_queries, place_of(query), queries,
                               seen_.may_see_none(), seen_.gives_logits());
    std::fill_n(sum_ + of_values, value_size_ * tile_queries, A(0));
    for (A* values : {shift_, mean_, delta_, squares_, others_}) {
      std::fill_n(values + tile * tile_queries, tile_queries, A(0));
    }
  }

  // The change of the first key's logit. What all logits change by alike changes nothing, and is left out of sums: a
  // large one would take their digits.
  void find_shift(std::int64_t tile, std::int64_t queries) {
    const A *const q = q_ + tile * size_ * tile_queries, *const dq = dq_ + tile * size_ * tile_queries;
    for (std::int64_t lane = 0; lane < queries; lane += width) {
      F t = P::set(0);
      for (std::int64_t c = 0; c < size_; ++c) {
        const std::int64_t i = c * tile_queries + lane;
        if (there(args_.dq)) t = P::fma(P::set(k_[c * tile_keys]), P::load(dq + i), t);
        if (there(args_.dk)) t = P::fma(P::set(dk_[c * tile_keys]), P::load(q + i), t);
      }
      P::store(shift_ + tile * tile_queries + lane, P::mul(scale_, t));
    }
  }

  // Calls body(i, n, c) for the places of a tile of keys by vectors of queries, with the sum of the products of
  // columns.
  template <int vectors, class Body>
  void products(std::int64_t size, std::initializer_list<std::pair<const A*, const A*>> factors, std::int64_t lane,
                std::int64_t keys, Body&& body) const {
    for_row_blocks(keys, [&](std::int64_t key, auto rows) {
      F c[rows][vectors];
      clear(c);
      for (const auto& [of_keys, of_queries] : factors) {
        multiply<Mode, rows, vectors, 1>(size, of_keys + key, tile_keys, of_queries + lane, tile_queries, c);
      }
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < vectors; ++n) body((key + r) * tile_queries + lane + n * width, n, c[r][n]);
      }
    });
  }

  template <int vectors>
  void add(std::int64_t tile, std::int64_t lane, std::int64_t keys) {
    const std::int64_t of_tile = tile * size_ * tile_queries, of_values = tile * tile_queries + lane;
    const A *const q = q_ + of_tile, *const dq = dq_ + of_tile, *const bias = seen_.bias(), *const kept = seen_.kept();
    const F factor = seen_.factor();
    F lse[vectors], shift[vectors], mean[vectors];
    for (int n = 0; n < vectors; ++n) {
      lse[n] = P::load(lse_ + of_values + n * width);
      shift[n] = P::load(shift_ + of_values + n * width);
      mean[n] = P::load(mean_ + of_values + n * width);
    }
    products<vectors>(size_, {{k_, q}}, lane, keys, [&](std::int64_t i, int n, F score) {
      if (bias == nullptr) return P::store(weights_ + i, exponential_.normalized(score, lse[n]));
      score = P::fma(score, factor, P::load(bias + i));
      P::store(weights_ + i, exponential_.normalized(score, P::load(base_ + of_values + n * width), lse[n]));
    });
    const auto move = [&](std::int64_t i, int n, F t) {
      const F moved = P::mul(P::load(weights_ + i), P::sub(P::mul(scale_, t), shift[n]));
      mean[n] = P::add(mean[n], moved);
      P::store(moved_ + i, moved);
    };
    if (there(args_.dq) && there(args_.dk)) {
      products<vectors>(size_, {{k_, dq}, {dk_, q}}, lane, keys, move);
    } else if (there(args_.dq)) {
      products<vectors>(size_, {{k_, dq}}, lane, keys, move);
    } else if (there(args_.dk)) {
      products<vectors>(size_, {{dk_, q}}, lane, keys, move);
    } else {
      for (std::int64_t key = 0; key < keys; ++key) {
        for (int n = 0; n < vectors; ++n) P::store(moved_ + key * tile_queries + lane + n * width, P::set(0));
      }
    }
    for (int n = 0; n < vectors; ++n) P::store(mean_ + of_values + n * width, mean[n]);
    // From here on both are without what is dropped.
    if (kept != nullptr) {
      for (std::int64_t key = 0; key < keys; ++key) {
        for (int n = 0; n < vectors; ++n) {
          const std::int64_t i = key * tile_queries + lane + n * width;
          for (A* values : {weights_, moved_}) P::store(values + i, P::mul(P::load(values + i), P::load(kept + i)));
        }
      }
    }
    if (has_second()) add_second<vectors>(grad_ + tile * value_size_ * tile_queries, lane, of_values, keys);

    A* const sum = sum_ + tile * value_size_ * tile_queries + lane;
    for_row_blocks(value_size_, [&](std::int64_t channel, auto rows) {
      F c[rows][vectors];
      clear(c);
      multiply<Mode, rows, vectors, 1>(keys, v_ + channel, value_row_, moved_ + lane, tile_queries, c);
      if (there(args_.dv)) {
        multiply<Mode, rows, vectors, 1>(keys, dv_ + channel, value_row_, weights_ + lane, tile_queries, c);
      }
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < vectors; ++n) {
          A* const to = sum + (channel + r) * tile_queries + n * width;
          P::store(to, P::add(P::load(to), c[r][n]));
        }
      }
    });
  }

  // The sums of p dp, p t dp and p e of each query, dp the gradients of the probabilities and e those that dv has.
  template <int vectors>
  void add_second(const A* grad, std::int64_t lane, std::int64_t of_values, std::int64_t keys) {
    F delta[vectors], squares[vectors], others[vectors];
    for (int n = 0; n < vectors; ++n) {
      delta[n] = P::load(delta_ + of_values + n * width);
      squares[n] = P::load(squares_ + of_values + n * width);
      others[n] = P::load(others_ + of_values + n * width);
    }
    products<vectors>(value_size_, {{v_columns_, grad}}, lane, keys, [&](std::int64_t i, int n, F dp) {
      delta[n] = P::fma(P::load(weights_ + i), dp, delta[n]);
      squares[n] = P::fma(P::load(moved_ + i), dp, squares[n]);
    });
    if (there(args_.dv)) {
      products<vectors>(value_size_, {{dv_columns_, grad}}, lane, keys,
                        [&](std::int64_t i, int n, F e) { others[n] = P::fma(P::load(weights_ + i), e, others[n]); });
    }
    for (int n = 0; n < vectors; ++n) {
      P::store(delta_ + of_values + n * width, delta[n]);
      P::store(squares_ + of_values + n * width, squares[n]);
      P::store(others_ + of_values + n * width, others[n]);
    }
  }

  void finish(std::int64_t tile, std::int64_t query) {
    const std::int64_t queries = queries_from(query), of_tile = tile * value_size_ * tile_queries;
    A* const mean = mean_ + tile * tile_queries;
    A* const out = out_;
    columns(out, args_.out, head_, query, queries, value_size_);
    for (std::int64_t lane = 0; lane < queries; lane += width) {
      const F m = P::load(mean + lane);
      for (std::int64_t c = 0; c < value_size_; ++c) {
        const std::int64_t i = c * tile_queries + lane;
        A* const to = sum_ + of_tile + i;
        const F value = P::load(out + i);
        P::store(to, P::sub(P::load(to), P::mul(m, value)));
      }
    }
    if (there(args_.d_out)) {
      elements_.write(sum_ + of_tile, tile_queries, head_.at(args_.d_out, query, elements_.size), value_size_, queries,
                      args_.d_out.channel, args_.d_out.token);
    }
    for (std::int64_t i = 0; i < queries; ++i) {
      const std::int64_t at = tile * tile_queries + i;
      if (args_.d_lse != nullptr) {
        // Of a query that sees no key lse is large, and the sum of the probabilities 0.
        const bool sees_none = lse_[at] >= std::numeric_limits<A>::max() / 4;
        args_.d_lse[place_of(query) + i] = sees_none ? A(0) : mean[i] + shift_[at];
      }
      if (has_second()) {
        args_.delta[place_of(query) + i] = delta_[at];
        args_.second[place_of(query) + i] = squares_[at] - delta_[at] * mean[i] + others_[at];
      }
    }
  }

  const Along<A>& args_;
  const Elements<A>& elements_;
  const Plan& plan_;
  const std::int64_t size_, value_size_, value_row_;
  Arrays<A> arrays_;
  Seen<P, A> seen_;
  const F scale_;
  const Exponential<P> exponential_;
  Head head_{};
  A *q_, *dq_, *sum_, *grad_, *out_, *base_, *lse_, *shift_, *mean_, *delta_, *squares_, *others_;
  A *k_, *dk_, *v_columns_, *dv_columns_, *v_, *dv_, *weights_, *moved_;
};

template <class P, class A>
Status tangent(const Along<A>& args, const Elements<A>& elements, int threads) {
  const Plan plan(args.shape, threads, 2 * sizeof(A));
  const Workspace<A> space(plan.team, Tangent<P, A>::space(args, plan));
  if (!space.ok()) return Status::out_of_memory;
  for_items(plan.items, plan.team,
            [&](int thread) { return Tangent<P, A>(args, elements, plan, space.of_thread(thread)); });
  return Status::ok;
}

template <class P, class A>
Status jvp(const AttentionJvp& args, const Elements<A>& elements, int threads) {
  const Along<A> along{args.q,      args.k,  args.v,  args.out,   LogSums<A>(args.base, args.lse),
                       args.dq,     args.dk, args.dv, args.d_out, static_cast<A*>(args.d_lse),
                       nullptr,     nullptr, nullptr, args.shape, args.scale,
                       args.options};
  return tangent<P>(along, elements, threads);
}

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
