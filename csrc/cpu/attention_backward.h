// The gradients of attention.
#pragma once

#include "attention_chunks.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

template <class P, class A>
class Backward : public OverKeys<P, A, Backward<P, A>> {
  using Base = OverKeys<P, A, Backward<P, A>>;
  using Base::columns, Base::rows, Base::grads_, Base::head_, Base::key_head_, Base::width;
  using Base::size_, Base::row_, Base::value_size_, Base::value_row_;
  using typename Base::F;

 public:
  // Elements of A for one thread.
  static std::int64_t space(const KeyGradients& grads, const Chunks& chunks) {
    const AttentionShape& shape = grads.shape;
    const std::int64_t row = Base::row_of(shape.size), value_row = Base::row_of(shape.value_size);
    const std::int64_t of_keys = chunks.tiles_per_item() * tile_keys;
    return Base::own_space(grads, chunks) + of_keys * (shape.size + shape.value_size + row) +
           tile_queries * (shape.size + 2 * shape.value_size + row + value_row + 1) + 2 * tile_keys * tile_queries +
           Arrays<A>::lost;
  }

  Backward(const AttentionBackward& args, const KeyGradients& grads, const Elements<A>& elements,
           const Groups<A>& groups, const Chunks& chunks, Arrays<A> arrays, A* parts)
      : Base(grads, elements, groups, chunks, arrays, parts), args_(args) {
    const std::int64_t of_keys = chunks.tiles_per_item() * tile_keys;
    k_columns_ = arrays.take(of_keys * size_);
    v_columns_ = arrays.take(of_keys * value_size_);
    k_rows_ = arrays.take(of_keys * row_);
    q_columns_ = arrays.take(size_ * tile_queries);
    grad_columns_ = arrays.take(value_size_ * tile_queries);
    out_columns_ = arrays.take(value_size_ * tile_queries);
    q_rows_ = arrays.take(tile_queries * row_);
    grad_rows_ = arrays.take(tile_queries * value_row_);
    delta_ = arrays.take(tile_queries);
    weights_ = arrays.take(tile_keys * tile_queries);
    grad_scores_ = arrays.take(tile_keys * tile_queries);
  }

  void begin_keys(std::int64_t tile, std::int64_t key) {
    const std::int64_t keys = Base::keys_from(key);
    columns(k_columns_ + tile * size_ * tile_keys, args_.k, key_head_, key, keys, size_);
    columns(v_columns_ + tile * value_size_ * tile_keys, args_.v, key_head_, key, keys, value_size_);
    rows(k_rows_ + tile * tile_keys * row_, args_.k, key_head_, key, keys, size_);
  }

  void begin_queries(std::int64_t query) {
    const std::int64_t queries = Base::queries_from(query);
    columns(q_columns_, args_.q, head_, query, queries, size_);
    columns(grad_columns_, args_.grad_out, head_, query, queries, value_size_);
    columns(out_columns_, args_.out, head_, query, queries, value_size_);
    rows(q_rows_, args_.q, head_, query, queries, size_);
    rows(grad_rows_, args_.grad_out, head_, query, queries, value_size_);
    Base::read_log_sums({args_.base, args_.lse}, query, queries);
    Base::find_delta(delta_, grad_columns_, out_columns_, queries);
  }

  void add(std::int64_t tile, const Region& region) {
    const std::int64_t keys = region.keys, queries = region.queries;
    const A *const k = k_columns_ + tile * size_ * tile_keys, *const v = v_columns_ + tile * value_size_ * tile_keys;
    for_panels<P>(queries, [&](std::int64_t lane, auto vectors) { find_weights<vectors>(k, v, lane, keys); });
    const std::int64_t of_rows = tile * tile_keys * row_;
    if (grads_.v.data != nullptr) {
      A* const grad_v = Base::grad_v_ + tile * tile_keys * value_row_;
      Base::add_by_queries(grad_v, weights_, grad_rows_, keys, queries, value_size_);
    }
    if (grads_.k.data != nullptr) {
      Base::add_by_queries(Base::grad_k_ + of_rows, grad_scores_, q_rows_, keys, queries, size_);
    }
    if (grads_.q.data != nullptr) Base::add_by_keys(grad_scores_, k_rows_ + of_rows, keys, queries);
    if (grads_.mask.data != nullptr) Base::add_to_mask(grad_scores_, region);
  }

 private:
  // For a tile of keys and vectors of queries what values weigh, and the gradients of the logits.
  template <int vectors>
  void find_weights(const A* k, const A* v, std::int64_t lane, std::int64_t keys) {
    const bool drops = Base::seen_.kept() != nullptr;
    F delta[vectors];
    for (int n = 0; n < vectors; ++n) delta[n] = P::load(delta_ + lane + n * width);
    Base::template find_probabilities<vectors>(weights_, k, q_columns_, lane, keys);
    Base::template products<vectors>(value_size_, v, grad_columns_, lane, keys, [&](std::int64_t i, int n, F grad) {
      const F p = P::load(weights_ + i);
      P::store(grad_scores_ + i, P::mul(p, P::sub(Base::left(grad, i), delta[n])));
      if (drops) P::store(weights_ + i, Base::left(p, i));
    });
  }

  const AttentionBackward& args_;
  A *k_columns_, *v_columns_, *k_rows_;
  A *q_columns_, *grad_columns_, *out_columns_, *q_rows_, *grad_rows_, *delta_;
  A *weights_, *grad_scores_;
};

template <class P, class A>
Status backward(const AttentionBackward& args, const Elements<A>& elements, int threads) {
  const KeyGradients grads{args.grad_q, args.grad_k, args.grad_v, args.shape, args.scale, args.options, args.grad_mask};
  return over_keys<Backward<P, A>>(
      grads, elements, threads, [&](const Groups<A>& groups, const Chunks& chunks, A* space, A* parts) {
        return Backward<P, A>(args, grads, elements, groups, chunks, Arrays<A>(space), parts);
      });
}

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
