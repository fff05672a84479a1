// The gradient of attention's gradient.
#pragma once

#include "attention_chunks.h"
#include "attention_tangent.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// The second pass, over the keys: `mean` and `second` are what the first has found of each query.
template <class P, class A>
class DoubleBackward : public OverKeys<P, A, DoubleBackward<P, A>> {
  using Base = OverKeys<P, A, DoubleBackward<P, A>>;
  using Base::columns, Base::rows, Base::grads_, Base::head_, Base::key_head_, Base::seen_, Base::width;
  using Base::size_, Base::row_, Base::value_size_, Base::value_row_;
  using typename Base::F;

 public:
  // Elements of A for one thread.
  static std::int64_t space(const KeyGradients& grads, const Chunks& chunks) {
    const AttentionShape& shape = grads.shape;
    const std::int64_t row = Base::row_of(shape.size), value_row = Base::row_of(shape.value_size);
    const std::int64_t of_keys = chunks.tiles_per_item() * tile_keys;
    return Base::own_space(grads, chunks) + of_keys * (2 * shape.size + 2 * shape.value_size + 2 * row) +
           tile_queries * (2 * shape.size + shape.value_size + 2 * row + value_row + 3) + 4 * tile_keys * tile_queries +
           Arrays<A>::lost;
  }

  DoubleBackward(const AttentionDoubleBackward& args, const KeyGradients& grads, const Elements<A>& elements,
                 const A* mean, const A* delta, const A* second, const Groups<A>& groups, const Chunks& chunks,
                 Arrays<A> arrays, A* parts)
      : Base(grads, elements, groups, chunks, arrays, parts),
        args_(args),
        all_means_(mean),
        all_deltas_(delta),
        all_seconds_(second),
        scale_(P::set(static_cast<A>(args.scale))) {
    const std::int64_t of_keys = chunks.tiles_per_item() * tile_keys;
    for (A** tiles : {&k_columns_, &dk_columns_}) *tiles = arrays.take(of_keys * size_);
    for (A** tiles : {&v_columns_, &dv_columns_}) *tiles = arrays.take(of_keys * value_size_);
    k_rows_ = arrays.take(of_keys * row_);
    dk_rows_ = arrays.take(of_keys * row_);
    for (A** tile : {&q_columns_, &dq_columns_}) *tile = arrays.take(size_ * tile_queries);
    grad_columns_ = arrays.take(value_size_ * tile_queries);
    for (A** tile : {&q_rows_, &dq_rows_}) *tile = arrays.take(tile_queries * row_);
    grad_rows_ = arrays.take(tile_queries * value_row_);
    for (A** values : {&delta_, &mean_, &second_}) *values = arrays.take(tile_queries);
    for (A** tile : {&weights_, &moved_, &grad_scores_, &second_scores_}) {
      *tile = arrays.take(tile_keys * tile_queries);
    }
  }

  void begin_keys(std::int64_t tile, std::int64_t key) {
    const std::int64_t keys = Base::keys_from(key), of_columns = tile * size_ * tile_keys;
    const std::int64_t of_rows = tile * tile_keys * row_, of_values = tile * value_size_ * tile_keys;
    columns(k_columns_ + of_columns, args_.k, key_head_, key, keys, size_);
    columns(v_columns_ + of_values, args_.v, key_head_, key, keys, value_size_);
    rows(k_rows_ + of_rows, args_.k, key_head_, key, keys, size_);
    if (there(args_.dk)) {
      columns(dk_columns_ + of_columns, args_.dk, key_head_, key, keys, size_);
      rows(dk_rows_ + of_rows, args_.dk, key_head_, key, keys, size_);
    }
    if (there(args_.dv)) columns(dv_columns_ + of_values, args_.dv, key_head_, key, keys, value_size_);
  }

  void begin_queries(std::int64_t query) {
    const std::int64_t queries = Base::queries_from(query), place = Base::first_query() + query;
    columns(q_columns_, args_.q, head_, query, queries, size_);
    columns(grad_columns_, args_.grad_out, head_, query, queries, value_size_);
    rows(q_rows_, args_.q, head_, query, queries, size_);
    rows(grad_rows_, args_.grad_out, head_, query, queries, value_size_);
    if (there(args_.dq)) {
      columns(dq_columns_, args_.dq, head_, query, queries, size_);
      rows(dq_rows_, args_.dq, head_, query, queries, size_);
    }
    Base::read_log_sums({args_.base, args_.lse}, query, queries);
    for (std::int64_t i = 0; i < tile_queries; ++i) {
      mean_[i] = i < queries ? all_means_[place + i] : 0;
      delta_[i] = i < queries ? all_deltas_[place + i] : 0;
      second_[i] = i < queries ? all_seconds_[place + i] : 0;
    }
  }

  void add(std::int64_t tile, const Region& region) {
    const std::int64_t keys = region.keys, queries = region.queries;
    const std::int64_t of_rows = tile * tile_keys * row_;
    for_panels<P>(queries, [&](std::int64_t lane, auto vectors) { find_weights<vectors>(tile, lane, keys); });
    A *const grad_k = Base::grad_k_ + of_rows, *const grad_v = Base::grad_v_ + tile * tile_keys * value_row_;
    if (there(grads_.v)) Base::add_by_queries(grad_v, moved_, grad_rows_, keys, queries, value_size_);
    if (there(grads_.k)) {
      Base::add_by_queries(grad_k, second_scores_, q_rows_, keys, queries, size_);
      if (there(args_.dq)) Base::add_by_queries(grad_k, grad_scores_, dq_rows_, keys, queries, size_);
    }
    if (there(grads_.q)) {
      Base::add_by_keys(second_scores_, k_rows_ + of_rows, keys, queries);
      if (there(args_.dk)) Base::add_by_keys(grad_scores_, dk_rows_ + of_rows, keys, queries);
    }
  }

 private:
  static bool there(const HeadsTensor& tensor) { return tensor.data != nullptr; }

  // For a tile of keys and vectors of queries: in grad_scores_ the gradients of the logits, in second_scores_ those of
  // the gradient, in moved_ those of the products of grad_out with v.
  template <int vectors>
  void find_weights(std::int64_t tile, std::int64_t lane, std::int64_t keys) {
    F delta[vectors], mean[vectors], second[vectors];
    for (int n = 0; n < vectors; ++n) {
      delta[n] = P::load(delta_ + lane + n * width);
      mean[n] = P::load(mean_ + lane + n * width);
      second[n] = P::load(second_ + lane + n * width);
    }
    const std::int64_t of_columns = tile * size_ * tile_keys, of_values = tile * value_size_ * tile_keys;
    const A *const k = k_columns_ + of_columns, *const v = v_columns_ + of_values;
    const A *const dk = dk_columns_ + of_columns, *const dv = dv_columns_ + of_values;
    Base::template find_probabilities<vectors>(weights_, k, q_columns_, lane, keys);
    for (std::int64_t key = 0; key < keys; ++key) {
      for (int n = 0; n < vectors; ++n) P::store(moved_ + key * tile_queries + lane + n * width, P::set(0));
    }
    // The logits' change, t.
    const auto move = [&](std::int64_t i, int, F t) { P::store(moved_ + i, P::fma(scale_, t, P::load(moved_ + i))); };
    if (there(args_.dq)) Base::template products<vectors>(size_, k, dq_columns_, lane, keys, move);
    if (there(args_.dk)) Base::template products<vectors>(size_, dk, q_columns_, lane, keys, move);
    // p (t - m), without what is dropped, p (dp - delta), and p ((t - m) (dp - delta) - the mean of that), to which e
    // is added below.
    Base::template products<vectors>(value_size_, v, grad_columns_, lane, keys, [&](std::int64_t i, int n, F dp) {
      const F p = P::load(weights_ + i), changed = P::sub(P::load(moved_ + i), mean[n]);
      const F grad = P::sub(Base::left(dp, i), delta[n]);
      P::store(moved_ + i, Base::left(P::mul(p, changed), i));
      P::store(grad_scores_ + i, P::mul(p, grad));
      P::store(second_scores_ + i, P::mul(p, P::sub(P::mul(changed, grad), second[n])));
    });
    if (!there(args_.dv)) return;
    Base::template products<vectors>(value_size_, dv, grad_columns_, lane, keys, [&](std::int64_t i, int, F e) {
      P::store(second_scores_ + i, P::fma(P::load(weights_ + i), Base::left(e, i), P::load(second_scores_ + i)));
    });
  }

  const AttentionDoubleBackward& args_;
  const A *const all_means_, *const all_deltas_, *const all_seconds_;
  const F scale_;
  A *k_columns_, *v_columns_, *dk_columns_, *dv_columns_, *k_rows_, *dk_rows_;
  A *q_columns_, *dq_columns_, *grad_columns_, *q_rows_, *dq_rows_, *grad_rows_;
  A *delta_, *mean_, *second_;
  A *weights_, *moved_, *grad_scores_, *second_scores_;
};

template <class P, class A>
Status double_backward(const AttentionDoubleBackward& args, const Elements<A>& elements, int threads) {
  const std::int64_t queries = args.shape.batch * args.shape.heads * args.shape.queries;
  const Workspace<A> values(1, 3 * queries);
  if (!values.ok()) return Status::out_of_memory;
  A *const mean = values.of_thread(0), *const delta = mean + queries, *const second = delta + queries;
  const Along<A> along{args.q,         args.k,  args.v,  args.out,           LogSums<A>(args.base, args.lse),
                       args.dq,        args.dk, args.dv, args.grad_grad_out, mean,
                       &args.grad_out, delta,   second,  args.shape,         args.scale,
                       args.options};
  const Status status = tangent<P>(along, elements, threads);
  if (status != Status::ok) return status;
  const KeyGradients grads{args.grad_q, args.grad_k, args.grad_v, args.shape, args.scale, args.options};
  return over_keys<DoubleBackward<P, A>>(grads, elements, threads,
                                         [&](const Groups<A>& groups, const Chunks& chunks, A* space, A* parts) {
                                           return DoubleBackward<P, A>(args, grads, elements, mean, delta, second,
                                                                       groups, chunks, Arrays<A>(space), parts);
                                         });
}

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
