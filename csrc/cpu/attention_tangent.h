// The derivative of attention along a direction, and what the second derivative goes on from.
#pragma once

#include "attention_tiles.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// What AttentionJvp and the first pass of AttentionDoubleBackward are given. The tensors of the direction may be null.
// With grad_out, `delta` and `second` get what the second derivative of the logits has for all keys of a query.
template <class A>
struct Along {
  const HeadsTensor &q, &k, &v, &out;
  const A* lse;
  const HeadsTensor &dq, &dk, &dv, &d_out;
  A* d_lse;
  const HeadsTensor* grad_out;
  A *delta, *second;
  const AttentionShape& shape;
  double scale;
};

template <class P, class A>
class Tangent {
  using F = typename P::F;
  using Mode = Plain<P, A>;
  static constexpr std::int64_t width = P::width;

 public:
  // Elements of A for one thread.
  static std::int64_t space(const AttentionShape& shape, const Plan& plan) {
    const std::int64_t row = row_of(shape), of_tile = (4 * shape.size + 6) * tile_queries;
    return plan.tiles_per_item * of_tile + 4 * shape.size * tile_keys + 2 * tile_keys * row +
           2 * tile_keys * tile_queries + Arrays<A>::lost;
  }

  Tangent(const Along<A>& args, const Elements<A>& elements, const Plan& plan, A* space)
      : args_(args),
        elements_(elements),
        plan_(plan),
        size_(args.shape.size),
        row_(row_of(args.shape)),
        scale_(P::set(static_cast<A>(args.scale))),
        exponential_(args.scale) {
    Arrays<A> arrays(space);
    const std::int64_t queries = plan.tiles_per_item * tile_queries;
    for (A** tile : {&q_, &dq_, &sum_, &grad_}) *tile = arrays.take(queries * size_);
    for (A** values : {&lse_, &shift_, &mean_, &delta_, &squares_, &others_}) *values = arrays.take(queries);
    for (A** tile : {&k_, &dk_, &v_columns_, &dv_columns_}) *tile = arrays.take(size_ * tile_keys);
    v_ = arrays.take(tile_keys * row_);
    dv_ = arrays.take(tile_keys * row_);
    weights_ = arrays.take(tile_keys * tile_queries);
    moved_ = arrays.take(tile_keys * tile_queries);
  }

  void run(std::int64_t item) {
    const std::int64_t head = item / plan_.items_per_head, first = item % plan_.items_per_head * plan_.tiles_per_item;
    head_ = {head / args_.shape.heads, head % args_.shape.heads};
    const std::int64_t tiles = std::min(plan_.tiles_per_item, plan_.tiles - first);
    for (std::int64_t tile = 0; tile < tiles; ++tile) begin(tile, (first + tile) * plan_.queries_per_tile);
    for (std::int64_t key = 0; key < args_.shape.keys; key += tile_keys) {
      const std::int64_t keys = std::min(tile_keys, args_.shape.keys - key);
      columns(k_, tile_keys, args_.k, key, keys);
      rows(v_, args_.v, key, keys);
      if (there(args_.dk)) columns(dk_, tile_keys, args_.dk, key, keys);
      if (there(args_.dv)) rows(dv_, args_.dv, key, keys);
      if (has_second()) {
        columns(v_columns_, tile_keys, args_.v, key, keys);
        if (there(args_.dv)) columns(dv_columns_, tile_keys, args_.dv, key, keys);
      }
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const std::int64_t queries = queries_from((first + tile) * plan_.queries_per_tile);
        if (key == 0) find_shift(tile, queries);
        for_panels<P>(queries, [&](std::int64_t lane, auto vectors) { add<vectors>(tile, lane, keys); });
      }
    }
    for (std::int64_t tile = 0; tile < tiles; ++tile) finish(tile, (first + tile) * plan_.queries_per_tile);
  }

 private:
  static std::int64_t row_of(const AttentionShape& shape) { return round_up(shape.size, Arrays<A>::unit); }
  static bool there(const HeadsTensor& tensor) { return tensor.data != nullptr; }
  bool has_second() const { return args_.second != nullptr; }

  std::int64_t queries_from(std::int64_t query) const {
    return std::min(plan_.queries_per_tile, args_.shape.queries - query);
  }
  std::int64_t place_of(std::int64_t query) const {
    return (head_.batch * args_.shape.heads + head_.head) * args_.shape.queries + query;
  }

  void columns(A* tile, std::int64_t step, const HeadsTensor& tensor, std::int64_t token, std::int64_t tokens) const {
    elements_.read(tile, step, head_.at(tensor, token, elements_.size), size_, tokens, tensor.channel, tensor.token,
                   false);
  }
  void rows(A* tile, const HeadsTensor& tensor, std::int64_t token, std::int64_t tokens) const {
    elements_.read(tile, row_, head_.at(tensor, token, elements_.size), tokens, size_, tensor.token, tensor.channel,
                   false);
  }

  void begin(std::int64_t tile, std::int64_t query) {
    const std::int64_t queries = queries_from(query), of_tile = tile * size_ * tile_queries;
    columns(q_ + of_tile, tile_queries, args_.q, query, queries);
    if (there(args_.dq)) columns(dq_ + of_tile, tile_queries, args_.dq, query, queries);
    if (has_second()) columns(grad_ + of_tile, tile_queries, *args_.grad_out, query, queries);
    read_lse<P>(lse_ + tile * tile_queries, args_.lse + place_of(query), queries);
    std::fill_n(sum_ + of_tile, size_ * tile_queries, A(0));
    for (A* values : {mean_, delta_, squares_, others_}) {
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
  void products(std::initializer_list<std::pair<const A*, const A*>> factors, std::int64_t lane, std::int64_t keys,
                Body&& body) const {
    for_row_blocks(keys, [&](std::int64_t key, auto rows) {
      F c[rows][vectors];
      clear(c);
      for (const auto& [of_keys, of_queries] : factors) {
        multiply<Mode, rows, vectors, 1>(size_, of_keys + key, tile_keys, of_queries + lane, tile_queries, c);
      }
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < vectors; ++n) body((key + r) * tile_queries + lane + n * width, n, c[r][n]);
      }
    });
  }

  template <int vectors>
  void add(std::int64_t tile, std::int64_t lane, std::int64_t keys) {
    const std::int64_t of_tile = tile * size_ * tile_queries, of_values = tile * tile_queries + lane;
    const A *const q = q_ + of_tile, *const dq = dq_ + of_tile, *const grad = grad_ + of_tile;
    F lse[vectors], shift[vectors], mean[vectors];
    for (int n = 0; n < vectors; ++n) {
      lse[n] = P::load(lse_ + of_values + n * width);
      shift[n] = P::load(shift_ + of_values + n * width);
      mean[n] = P::load(mean_ + of_values + n * width);
    }
    products<vectors>({{k_, q}}, lane, keys, [&](std::int64_t i, int n, F score) {
      P::store(weights_ + i, exponential_.normalized(score, lse[n]));
    });
    const auto move = [&](std::int64_t i, int n, F t) {
      const F moved = P::mul(P::load(weights_ + i), P::sub(P::mul(scale_, t), shift[n]));
      mean[n] = P::add(mean[n], moved);
      P::store(moved_ + i, moved);
    };
    if (there(args_.dq) && there(args_.dk)) {
      products<vectors>({{k_, dq}, {dk_, q}}, lane, keys, move);
    } else if (there(args_.dq)) {
      products<vectors>({{k_, dq}}, lane, keys, move);
    } else if (there(args_.dk)) {
      products<vectors>({{dk_, q}}, lane, keys, move);
    } else {
      for (std::int64_t key = 0; key < keys; ++key) {
        for (int n = 0; n < vectors; ++n) P::store(moved_ + key * tile_queries + lane + n * width, P::set(0));
      }
    }
    for (int n = 0; n < vectors; ++n) P::store(mean_ + of_values + n * width, mean[n]);
    if (has_second()) add_second<vectors>(grad, lane, of_values, keys);

    A* const sum = sum_ + of_tile + lane;
    for_row_blocks(size_, [&](std::int64_t channel, auto rows) {
      F c[rows][vectors];
      clear(c);
      multiply<Mode, rows, vectors, 1>(keys, v_ + channel, row_, moved_ + lane, tile_queries, c);
      if (there(args_.dv)) {
        multiply<Mode, rows, vectors, 1>(keys, dv_ + channel, row_, weights_ + lane, tile_queries, c);
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
    products<vectors>({{v_columns_, grad}}, lane, keys, [&](std::int64_t i, int n, F dp) {
      delta[n] = P::fma(P::load(weights_ + i), dp, delta[n]);
      squares[n] = P::fma(P::load(moved_ + i), dp, squares[n]);
    });
    if (there(args_.dv)) {
      products<vectors>({{dv_columns_, grad}}, lane, keys,
                        [&](std::int64_t i, int n, F e) { others[n] = P::fma(P::load(weights_ + i), e, others[n]); });
    }
    for (int n = 0; n < vectors; ++n) {
      P::store(delta_ + of_values + n * width, delta[n]);
      P::store(squares_ + of_values + n * width, squares[n]);
      P::store(others_ + of_values + n * width, others[n]);
    }
  }

  void finish(std::int64_t tile, std::int64_t query) {
    const std::int64_t queries = queries_from(query), of_tile = tile * size_ * tile_queries;
    A* const mean = mean_ + tile * tile_queries;
    A* const out = q_ + of_tile;  // What was there is no longer needed.
    columns(out, tile_queries, args_.out, query, queries);
    for (std::int64_t lane = 0; lane < queries; lane += width) {
      const F m = P::load(mean + lane);
      for (std::int64_t c = 0; c < size_; ++c) {
        const std::int64_t i = c * tile_queries + lane;
        A* const to = sum_ + of_tile + i;
        const F value = P::load(out + i);
        P::store(to, P::sub(P::load(to), P::mul(m, value)));
      }
    }
    if (there(args_.d_out)) {
      elements_.write(sum_ + of_tile, tile_queries, head_.at(args_.d_out, query, elements_.size), size_, queries,
                      args_.d_out.channel, args_.d_out.token);
    }
    for (std::int64_t i = 0; i < queries; ++i) {
      const std::int64_t at = tile * tile_queries + i;
      if (args_.d_lse != nullptr) args_.d_lse[place_of(query) + i] = mean[i] + shift_[at];
      if (has_second()) {
        args_.delta[place_of(query) + i] = delta_[at];
        args_.second[place_of(query) + i] = squares_[at] - delta_[at] * mean[i] + others_[at];
      }
    }
  }

  const Along<A>& args_;
  const Elements<A>& elements_;
  const Plan& plan_;
  const std::int64_t size_, row_;
  const F scale_;
  const Exponential<P> exponential_;
  Head head_{};
  A *q_, *dq_, *sum_, *grad_, *lse_, *shift_, *mean_, *delta_, *squares_, *others_;
  A *k_, *dk_, *v_columns_, *dv_columns_, *v_, *dv_, *weights_, *moved_;
};

template <class P, class A>
Status tangent(const Along<A>& args, const Elements<A>& elements, int threads) {
  const Plan plan(args.shape, threads, 2 * sizeof(A));
  const Workspace<A> space(plan.team, Tangent<P, A>::space(args.shape, plan));
  if (!space.ok()) return Status::out_of_memory;
  for_items(plan.items, plan.team,
            [&](int thread) { return Tangent<P, A>(args, elements, plan, space.of_thread(thread)); });
  return Status::ok;
}

template <class P, class A>
Status jvp(const AttentionJvp& args, const Elements<A>& elements, int threads) {
  const Along<A> along{args.q,  args.k,  args.v,  args.out,   static_cast<const A*>(args.lse),
                       args.dq, args.dk, args.dv, args.d_out, static_cast<A*>(args.d_lse),
                       nullptr, nullptr, nullptr, args.shape, args.scale};
  return tangent<P>(along, elements, threads);
}

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
