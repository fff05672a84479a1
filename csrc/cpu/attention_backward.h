// The gradients of attention.
#pragma once

#include "attention_chunks.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

template <class P, class A>
class Backward : public OverKeys<P, A, Backward<P, A>> {
  using Base = OverKeys<P, A, Backward<P, A>>;
  using Base::columns, Base::rows, Base::grads_, Base::size_, Base::row_, Base::width;
  using typename Base::F;

 public:
  // Elements of A for one thread.
  static std::int64_t space(const AttentionShape& shape, const Chunks& chunks) {
    const std::int64_t row = Base::row_of(shape), of_keys = chunks.tiles_per_item() * tile_keys;
    return Base::own_space(shape, chunks) + of_keys * (2 * shape.size + row) +
           tile_queries * (3 * shape.size + 2 * row + 2) + 2 * tile_keys * tile_queries + Arrays<A>::lost;
  }

  Backward(const AttentionBackward& args, const KeyGradients& grads, const Elements<A>& elements, const Chunks& chunks,
           Arrays<A> arrays, A* parts)
      : Base(grads, elements, chunks, arrays, parts), args_(args), exponential_(args.scale) {
    const std::int64_t of_keys = chunks.tiles_per_item() * tile_keys;
    k_columns_ = arrays.take(of_keys * size_);
    v_columns_ = arrays.take(of_keys * size_);
    k_rows_ = arrays.take(of_keys * row_);
    q_columns_ = arrays.take(size_ * tile_queries);
    grad_columns_ = arrays.take(size_ * tile_queries);
    out_columns_ = arrays.take(size_ * tile_queries);
    q_rows_ = arrays.take(tile_queries * row_);
    grad_rows_ = arrays.take(tile_queries * row_);
    lse_ = arrays.take(tile_queries);
    delta_ = arrays.take(tile_queries);
    weights_ = arrays.take(tile_keys * tile_queries);
    grad_scores_ = arrays.take(tile_keys * tile_queries);
  }

  void begin_keys(std::int64_t tile, std::int64_t key) {
    const std::int64_t keys = Base::keys_from(key), of_columns = tile * size_ * tile_keys;
    columns(k_columns_ + of_columns, tile_keys, args_.k, key, keys);
    columns(v_columns_ + of_columns, tile_keys, args_.v, key, keys);
    rows(k_rows_ + tile * tile_keys * row_, args_.k, key, keys);
  }

  void begin_queries(std::int64_t query) {
    const std::int64_t queries = Base::queries_from(query);
    columns(q_columns_, tile_queries, args_.q, query, queries);
    columns(grad_columns_, tile_queries, args_.grad_out, query, queries);
    columns(out_columns_, tile_queries, args_.out, query, queries);
    rows(q_rows_, args_.q, query, queries);
    rows(grad_rows_, args_.grad_out, query, queries);
    read_lse<P>(lse_, static_cast<const A*>(args_.lse) + Base::first_query() + query, queries);
    Base::find_delta(delta_, grad_columns_, out_columns_, queries);
  }

  void add(std::int64_t tile, std::int64_t keys, std::int64_t queries) {
    const std::int64_t of_columns = tile * size_ * tile_keys, of_rows = tile * tile_keys * row_;
    for_panels<P>(queries, [&](std::int64_t lane, auto vectors) {
      find_weights<vectors>(k_columns_ + of_columns, v_columns_ + of_columns, lane, keys);
    });
    if (grads_.v.data != nullptr) Base::add_by_queries(Base::grad_v_ + of_rows, weights_, grad_rows_, keys, queries);
    if (grads_.k.data != nullptr) Base::add_by_queries(Base::grad_k_ + of_rows, grad_scores_, q_rows_, keys, queries);
    if (grads_.q.data != nullptr) Base::add_by_keys(grad_scores_, k_rows_ + of_rows, keys, queries);
  }

 private:
  // For a tile of keys and vectors of queries the probabilities, and the gradients of the logits.
  template <int vectors>
  void find_weights(const A* k, const A* v, std::int64_t lane, std::int64_t keys) {
    F lse[vectors], delta[vectors];
    for (int n = 0; n < vectors; ++n) {
      lse[n] = P::load(lse_ + lane + n * width);
      delta[n] = P::load(delta_ + lane + n * width);
    }
    const Exponential<P> exponential = exponential_;
    Base::template products<vectors>(k, q_columns_, lane, keys, [&](std::int64_t i, int n, F score) {
      P::store(weights_ + i, exponential.normalized(score, lse[n]));
    });
    Base::template products<vectors>(v, grad_columns_, lane, keys, [&](std::int64_t i, int n, F grad) {
      P::store(grad_scores_ + i, P::mul(P::load(weights_ + i), P::sub(grad, delta[n])));
    });
  }

  const AttentionBackward& args_;
  const Exponential<P> exponential_;
  A *k_columns_, *v_columns_, *k_rows_;
  A *q_columns_, *grad_columns_, *out_columns_, *q_rows_, *grad_rows_, *lse_, *delta_;
  A *weights_, *grad_scores_;
};

template <class P, class A>
Status backward(const AttentionBackward& args, const Elements<A>& elements, int threads) {
  const KeyGradients grads{args.grad_q, args.grad_k, args.grad_v, args.shape, args.scale};
  return over_keys<Backward<P, A>>(grads, elements, threads, [&](const Chunks& chunks, A* space, A* parts) {
    return Backward<P, A>(args, grads, elements, chunks, Arrays<A>(space), parts);
  });
}

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
