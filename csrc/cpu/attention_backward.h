// The gradients of attention, in float32 for all types but float64.
//
// Keys come in chunks, each of which goes through all queries: so the gradients of its keys and values are whole, and
// that of the queries is a part. How many there are is a matter of the number of keys, and the parts are added in their
// order, whoever computed them: so the bits depend neither on threads nor on what else is in the batch.
#pragma once

#include "attention_tiles.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// Who computes what: an item is some neighbouring chunks of the keys of one head.
struct Chunks {
  std::int64_t tiles, tiles_per_chunk, chunks, chunks_per_item, items_per_head;

  Chunks(const AttentionShape& shape, std::int64_t threads, std::int64_t bytes) {
    // The least of a chunk makes gathering queries cheap beside it.
    constexpr std::int64_t most_chunks = 8, least_tiles = 4, most_bytes = 64 << 20;
    tiles = divide_up(shape.keys, tile_keys);
    tiles_per_chunk = std::max<std::int64_t>(1, std::max(least_tiles, divide_up(tiles, most_chunks)));
    chunks = std::max<std::int64_t>(1, divide_up(tiles, tiles_per_chunk));
    // One item per head needs no memory for parts; but there shall be some for every thread, and none too large.
    const std::int64_t fair = divide_up(2 * threads, std::max<std::int64_t>(1, shape.batch * shape.heads));
    const std::int64_t fitting = divide_up(5 * shape.keys * shape.size * bytes, most_bytes);
    items_per_head = threads == 1 ? fitting : std::max(fair, fitting);
    items_per_head = std::max<std::int64_t>(1, std::min(items_per_head, chunks));
    chunks_per_item = divide_up(chunks, items_per_head);
    items_per_head = divide_up(chunks, chunks_per_item);
  }

  std::int64_t tiles_per_item() const { return std::min(tiles, chunks_per_item * tiles_per_chunk); }
};

template <class P, class A>
class Backward {
  using F = typename P::F;
  using Mode = Plain<P, A>;
  static constexpr std::int64_t width = P::width;

 public:
  // Elements of A for one thread.
  static std::int64_t space(const AttentionShape& shape, const Chunks& chunks) {
    const std::int64_t row = row_of(shape), of_keys = chunks.tiles_per_item() * tile_keys;
    return of_keys * (2 * shape.size + 3 * row) + tile_queries * (5 * shape.size + 2 * row + 2) +
           2 * tile_keys * tile_queries + Arrays<A>::lost;
  }
  // Elements of the gradient of a tile of queries.
  static std::int64_t tile_of_grad_q(const AttentionShape& shape) { return shape.size * tile_queries; }

  // `parts` has room for the gradients of all queries from each chunk; null if an item has all chunks of its head.
  Backward(const AttentionBackward& args, const Elements<A>& elements, const Chunks& chunks, A* space, A* parts)
      : args_(args),
        elements_(elements),
        chunks_(chunks),
        size_(args.shape.size),
        row_(row_of(args.shape)),
        tiles_of_queries_(divide_up(args.shape.queries, tile_queries)),
        parts_(parts),
        exponential_(args.scale) {
    const std::int64_t of_keys = chunks.tiles_per_item() * tile_keys;
    Arrays<A> arrays(space);
    k_columns_ = arrays.take(of_keys * size_);
    v_columns_ = arrays.take(of_keys * size_);
    k_rows_ = arrays.take(of_keys * row_);
    grad_k_ = arrays.take(of_keys * row_);
    grad_v_ = arrays.take(of_keys * row_);
    q_columns_ = arrays.take(size_ * tile_queries);
    grad_columns_ = arrays.take(size_ * tile_queries);
    out_columns_ = arrays.take(size_ * tile_queries);
    part_ = arrays.take(size_ * tile_queries);
    grad_q_ = arrays.take(size_ * tile_queries);
    q_rows_ = arrays.take(tile_queries * row_);
    grad_rows_ = arrays.take(tile_queries * row_);
    lse_ = arrays.take(tile_queries);
    delta_ = arrays.take(tile_queries);
    weights_ = arrays.take(tile_keys * tile_queries);
    grad_scores_ = arrays.take(tile_keys * tile_queries);
  }

  void run(std::int64_t item) {
    const std::int64_t head = item / chunks_.items_per_head;
    head_ = {head / args_.shape.heads, head % args_.shape.heads};
    const std::int64_t first_chunk = item % chunks_.items_per_head * chunks_.chunks_per_item;
    const std::int64_t last_chunk = std::min(chunks_.chunks, first_chunk + chunks_.chunks_per_item);
    const std::int64_t first = first_chunk * chunks_.tiles_per_chunk;
    const std::int64_t last = std::min(chunks_.tiles, last_chunk * chunks_.tiles_per_chunk);
    for (std::int64_t tile = first; tile < last; ++tile) begin_keys(tile - first, tile * tile_keys);
    for (std::int64_t of_queries = 0; of_queries < tiles_of_queries_; ++of_queries) {
      const std::int64_t query = of_queries * tile_queries;
      begin_queries(query);
      for (std::int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
        std::fill_n(part_, size_ * tile_queries, A(0));
        const std::int64_t begin = chunk * chunks_.tiles_per_chunk;
        const std::int64_t end = std::min(chunks_.tiles, begin + chunks_.tiles_per_chunk);
        for (std::int64_t tile = begin; tile < end; ++tile) {
          add(tile - first, keys_from(tile * tile_keys), queries_from(query));
        }
        if (args_.grad_q.data != nullptr) finish_part(head, chunk, of_queries);
      }
      if (args_.grad_q.data != nullptr && parts_ == nullptr)
        spread_grad_q(args_, elements_, head_, of_queries, grad_q_);
    }
    for (std::int64_t tile = first; tile < last; ++tile) finish_keys(tile - first, tile * tile_keys);
  }

 private:
  static std::int64_t row_of(const AttentionShape& shape) { return round_up(shape.size, Arrays<A>::unit); }

  std::int64_t keys_from(std::int64_t key) const { return std::min(tile_keys, args_.shape.keys - key); }
  std::int64_t queries_from(std::int64_t query) const { return std::min(tile_queries, args_.shape.queries - query); }

  void* at(const HeadsTensor& tensor, std::int64_t token) const { return head_.at(tensor, token, elements_.size); }

  // Channels in rows, tokens in lanes.
  void columns(A* tile, std::int64_t step, const HeadsTensor& tensor, std::int64_t token, std::int64_t tokens) const {
    elements_.read(tile, step, at(tensor, token), size_, tokens, tensor.channel, tensor.token, false);
  }
  // Tokens in rows, channels in lanes.
  void rows(A* tile, const HeadsTensor& tensor, std::int64_t token, std::int64_t tokens) const {
    elements_.read(tile, row_, at(tensor, token), tokens, size_, tensor.token, tensor.channel, false);
  }

  void begin_keys(std::int64_t tile, std::int64_t key) {
    const std::int64_t keys = keys_from(key), of_columns = tile * size_ * tile_keys, of_rows = tile * tile_keys * row_;
    columns(k_columns_ + of_columns, tile_keys, args_.k, key, keys);
    columns(v_columns_ + of_columns, tile_keys, args_.v, key, keys);
    rows(k_rows_ + of_rows, args_.k, key, keys);
    std::fill_n(grad_k_ + of_rows, tile_keys * row_, A(0));
    std::fill_n(grad_v_ + of_rows, tile_keys * row_, A(0));
  }

  void begin_queries(std::int64_t query) {
    const std::int64_t queries = queries_from(query);
    columns(q_columns_, tile_queries, args_.q, query, queries);
    columns(grad_columns_, tile_queries, args_.grad_out, query, queries);
    columns(out_columns_, tile_queries, args_.out, query, queries);
    rows(q_rows_, args_.q, query, queries);
    rows(grad_rows_, args_.grad_out, query, queries);
    const std::int64_t row = head_.batch * args_.shape.heads + head_.head;
    const A* const lse = static_cast<const A*>(args_.lse) + row * args_.shape.queries + query;
    for (std::int64_t i = 0; i < tile_queries; ++i) {
      lse_[i] = i < queries ? static_cast<A>(static_cast<double>(lse[i]) * Exponential<P>::unit) : 0;
    }
    for (std::int64_t lane = 0; lane < queries; lane += width) {
      F delta = P::set(0);
      for (std::int64_t c = 0; c < size_; ++c) {
        const std::int64_t at = c * tile_queries + lane;
        delta = P::fma(P::load(grad_columns_ + at), P::load(out_columns_ + at), delta);
      }
      P::store(delta_ + lane, delta);
    }
  }

  void add(std::int64_t tile, std::int64_t keys, std::int64_t queries) {
    const std::int64_t of_columns = tile * size_ * tile_keys, of_rows = tile * tile_keys * row_;
    for_panels<P>(queries, [&](std::int64_t lane, auto vectors) {
      find_weights<vectors>(k_columns_ + of_columns, v_columns_ + of_columns, lane, keys);
    });
    if (args_.grad_v.data != nullptr) add_by_queries(grad_v_ + of_rows, weights_, grad_rows_, keys, queries);
    if (args_.grad_k.data != nullptr) add_by_queries(grad_k_ + of_rows, grad_scores_, q_rows_, keys, queries);
    if (args_.grad_q.data == nullptr) return;
    for_panels<P>(queries, [&](std::int64_t lane, auto vectors) {
      add_product<vectors, 1>(part_ + lane, tile_queries, size_, keys, k_rows_ + of_rows, row_, grad_scores_ + lane,
                              tile_queries);
    });
  }

  // For a tile of keys and vectors of queries the probabilities, and the gradients of the logits.
  template <int vectors>
  void find_weights(const A* k, const A* v, std::int64_t lane, std::int64_t keys) {
    F lse[vectors], delta[vectors];
    for (int n = 0; n < vectors; ++n) {
      lse[n] = P::load(lse_ + lane + n * width);
      delta[n] = P::load(delta_ + lane + n * width);
    }
    const Exponential<P> exponential = exponential_;
    for_row_blocks(keys, [&](std::int64_t key, auto rows) {
      F c[rows][vectors];
      clear(c);
      multiply<Mode, rows, vectors, 1>(size_, k + key, tile_keys, q_columns_ + lane, tile_queries, c);
      A* const to = weights_ + key * tile_queries + lane;
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < vectors; ++n)
          P::store(to + r * tile_queries + n * width, exponential.normalized(c[r][n], lse[n]));
      }
    });
    for_row_blocks(keys, [&](std::int64_t key, auto rows) {
      F c[rows][vectors];
      clear(c);
      multiply<Mode, rows, vectors, 1>(size_, v + key, tile_keys, grad_columns_ + lane, tile_queries, c);
      const std::int64_t at = key * tile_queries + lane;
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < vectors; ++n) {
          const std::int64_t i = at + r * tile_queries + n * width;
          P::store(grad_scores_ + i, P::mul(P::load(weights_ + i), P::sub(c[r][n], delta[n])));
        }
      }
    });
  }

  // Adds to rows of keys: of a tile's weights, times rows of queries.
  void add_by_queries(A* to, const A* weights, const A* of_queries, std::int64_t keys, std::int64_t queries) {
    for_panels<P>(size_, [&](std::int64_t channel, auto vectors) {
      add_product<vectors, tile_queries>(to + channel, row_, keys, queries, weights, 1, of_queries + channel, row_);
    });
  }

  template <int vectors, int a_row>
  static void add_product(A* to, std::int64_t step, std::int64_t row_count, std::int64_t depth, const A* a,
                          std::int64_t a_step, const A* b, std::int64_t b_step) {
    for_row_blocks(row_count, [&](std::int64_t row, auto rows) {
      F c[rows][vectors];
      clear(c);
      multiply<Mode, rows, vectors, a_row>(depth, a + row * a_row, a_step, b, b_step, c);
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < vectors; ++n) {
          A* const at = to + (row + r) * step + n * width;
          P::store(at, P::add(P::load(at), c[r][n]));
        }
      }
    });
  }

  static void times(A* tile, std::int64_t count, double factor) {
    const F f = P::set(static_cast<A>(factor));
    for (std::int64_t i = 0; i < count; i += width) P::store(tile + i, P::mul(f, P::load(tile + i)));
  }

  // The first part of an item begins the sum, others are added to it, as AddParts does.
  void finish_part(std::int64_t head, std::int64_t chunk, std::int64_t of_queries) {
    const std::int64_t size = size_ * tile_queries;
    times(part_, size, args_.scale);
    if (parts_ != nullptr) {
      std::copy_n(part_, size, parts_ + ((head * chunks_.chunks + chunk) * tiles_of_queries_ + of_queries) * size);
    } else if (chunk == 0) {
      std::swap(part_, grad_q_);
    } else {
      sum_into(grad_q_, part_, size);
    }
  }

  void finish_keys(std::int64_t tile, std::int64_t key) {
    const std::int64_t of_rows = tile * tile_keys * row_;
    times(grad_k_ + of_rows, tile_keys * row_, args_.scale);
    for (const auto& [to, from] : {std::pair{&args_.grad_k, grad_k_}, std::pair{&args_.grad_v, grad_v_}}) {
      if (to->data == nullptr) continue;
      elements_.write(from + of_rows, row_, at(*to, key), keys_from(key), size_, to->token, to->channel);
    }
  }

 public:
  static void sum_into(A* sum, const A* part, std::int64_t size) {
    for (std::int64_t i = 0; i < size; i += width) P::store(sum + i, P::add(P::load(sum + i), P::load(part + i)));
  }

  static void spread_grad_q(const AttentionBackward& args, const Elements<A>& elements, const Head& head,
                            std::int64_t tile, const A* grad) {
    const std::int64_t query = tile * tile_queries, queries = std::min(tile_queries, args.shape.queries - query);
    const HeadsTensor& to = args.grad_q;
    elements.write(grad, tile_queries, head.at(to, query, elements.size), args.shape.size, queries, to.channel,
                   to.token);
  }

 private:
  const AttentionBackward& args_;
  const Elements<A>& elements_;
  const Chunks& chunks_;
  const std::int64_t size_, row_, tiles_of_queries_;
  A* const parts_;
  const Exponential<P> exponential_;
  Head head_{};
  A *k_columns_, *v_columns_, *k_rows_, *grad_k_, *grad_v_;
  A *q_columns_, *grad_columns_, *out_columns_, *part_, *grad_q_, *q_rows_, *grad_rows_, *lse_, *delta_;
  A *weights_, *grad_scores_;
};

// Adds the parts of the queries' gradient, in the order of the chunks.
template <class P, class A>
struct AddParts {
  const AttentionBackward& args;
  const Elements<A>& elements;
  std::int64_t chunks, tiles;
  A* parts;

  void run(std::int64_t item) const {
    const std::int64_t head = item / tiles, tile = item % tiles, size = Backward<P, A>::tile_of_grad_q(args.shape);
    const auto part = [&](std::int64_t chunk) { return parts + ((head * chunks + chunk) * tiles + tile) * size; };
    A* const sum = part(0);
    for (std::int64_t chunk = 1; chunk < chunks; ++chunk) Backward<P, A>::sum_into(sum, part(chunk), size);
    Backward<P, A>::spread_grad_q(args, elements, {head / args.shape.heads, head % args.shape.heads}, tile, sum);
  }
};

template <class P, class A>
Status backward(const AttentionBackward& args, const Elements<A>& elements, int threads) {
  using Worker = Backward<P, A>;
  const std::int64_t heads = args.shape.batch * args.shape.heads, tiles = divide_up(args.shape.queries, tile_queries);
  const std::int64_t useful = useful_threads(args.shape, threads);
  const Chunks chunks(args.shape, useful, sizeof(A));
  const std::int64_t items = heads * chunks.items_per_head;
  const int team = static_cast<int>(std::min(useful, std::max<std::int64_t>(1, items)));
  const bool in_parts = chunks.items_per_head > 1 && args.grad_q.data != nullptr;
  const Workspace<A> space(team, Worker::space(args.shape, chunks));
  const Workspace<A> parts(1, in_parts ? heads * chunks.chunks * tiles * Worker::tile_of_grad_q(args.shape) : 0);
  if (!space.ok() || !parts.ok()) return Status::out_of_memory;
  A* const of_chunks = in_parts ? parts.of_thread(0) : nullptr;
  for_items(items, team,
            [&](int thread) { return Worker(args, elements, chunks, space.of_thread(thread), of_chunks); });
  if (in_parts) {
    for_items(heads * tiles, team,
              [&](int) { return AddParts<P, A>{args, elements, chunks.chunks, tiles, of_chunks}; });
  }
  return Status::ok;
}

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
