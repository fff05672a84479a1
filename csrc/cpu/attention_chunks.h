// How gradients of attention go over keys, in float32 for all types but float64.
//
// Keys come in chunks, each of which goes through all queries: so the gradients of its keys and values are whole, and
// that of the queries is a part. How many there are is a matter of the number of keys, and the parts are added in their
// order, whoever computed them: so the bits depend neither on threads nor on what else is in the batch.
#pragma once

#include "attention_mask_gradient.h"
#include "attention_seen.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// Who computes what: an item is some neighbouring chunks of the keys of one head, that of all queries' heads which
// share it, and after it of the other heads of its group.
struct Chunks {
  std::int64_t tiles, tiles_per_chunk, chunks, chunks_per_item, items_per_head;

  Chunks(const AttentionShape& shape, std::int64_t groups, std::int64_t threads, std::int64_t bytes) {
    // The least of a chunk makes gathering queries cheap beside it.
    constexpr std::int64_t most_chunks = 8, least_tiles = 4, most_bytes = 64 << 20;
    tiles = divide_up(shape.keys, tile_keys);
    tiles_per_chunk = std::max<std::int64_t>(1, std::max(least_tiles, divide_up(tiles, most_chunks)));
    chunks = std::max<std::int64_t>(1, divide_up(tiles, tiles_per_chunk));
    // One item per head needs no memory for parts; but there shall be some for every thread, and none too large.
    const std::int64_t fair = divide_up(2 * threads, std::max<std::int64_t>(1, groups));
    const std::int64_t fitting = divide_up(5 * shape.keys * shape.size * bytes, most_bytes);
    items_per_head = threads == 1 ? fitting : std::max(fair, fitting);
    items_per_head = std::max<std::int64_t>(1, std::min(items_per_head, chunks));
    chunks_per_item = divide_up(chunks, items_per_head);
    items_per_head = divide_up(chunks, chunks_per_item);
  }

  std::int64_t tiles_per_item() const { return std::min(tiles, chunks_per_item * tiles_per_chunk); }
};

// What the gradients of one call are written to, and the sizes that they go by.
struct KeyGradients {
  const HeadsTensor &q, &k, &v;
  const AttentionShape& shape;
  double scale;
  const AttentionOptions& options;
  HeadsTensor mask{};
};

// Keys and queries of a tile: the first, and how many.
struct Region {
  std::int64_t key, keys, query, queries;
};

// A worker's way over the chunks of an item. `Derived` has begin_keys(tile, key) and begin_queries(query), which read
// what it needs of their tokens, and add(tile, region), which adds to part_, grad_k_, grad_v_ and the gradient of the
// mask what a tile of keys and one of queries give. The first two are multiplied by the scale in the end.
template <class P, class A, class Derived>
class OverKeys {
 protected:
  using F = typename P::F;
  using Mode = Plain<P, A>;
  static constexpr std::int64_t width = P::width;

 public:
  // Elements of the gradient of a tile of queries.
  static std::int64_t tile_of_grad_q(const AttentionShape& shape) { return shape.size * tile_queries; }

  void run(std::int64_t item) {
    const std::int64_t group = item / chunks_.items_per_head;
    const std::int64_t first_chunk = item % chunks_.items_per_head * chunks_.chunks_per_item;
    mask_ = groups_.part_of(group);
    groups_.for_heads(group, [&](const Head& head) { run_head(head, first_chunk); });
  }

  void run_head(const Head& key_head, std::int64_t first_chunk) {
    Derived& derived = static_cast<Derived&>(*this);
    const std::int64_t shared = grads_.shape.heads / grads_.shape.key_heads;
    key_head_ = key_head;
    all_keys_ = seen_.keys(key_head_.batch);
    const std::int64_t last_chunk = std::min(chunks_.chunks, first_chunk + chunks_.chunks_per_item);
    const std::int64_t first = first_chunk * chunks_.tiles_per_chunk;
    const std::int64_t last = std::min(chunks_.tiles, last_chunk * chunks_.tiles_per_chunk);
    for (std::int64_t tile = first; tile < last; ++tile) {
      if (keys_from(tile * tile_keys) > 0) derived.begin_keys(tile - first, tile * tile_keys);
      std::fill_n(grad_k_ + (tile - first) * tile_keys * row_, tile_keys * row_, A(0));
      std::fill_n(grad_v_ + (tile - first) * tile_keys * value_row_, tile_keys * value_row_, A(0));
    }
    for (std::int64_t i = 0; i < shared * tiles_of_queries_; ++i) {
      head_ = {key_head_.batch, key_head_.head * shared + i / tiles_of_queries_};
      const std::int64_t of_queries = i % tiles_of_queries_, query = of_queries * tile_queries;
      derived.begin_queries(query);
      for (std::int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
        std::fill_n(part_, size_ * tile_queries, A(0));
        const std::int64_t begin = chunk * chunks_.tiles_per_chunk;
        const std::int64_t end = std::min(chunks_.tiles, begin + chunks_.tiles_per_chunk);
        for (std::int64_t tile = begin; tile < end; ++tile) add_tile(derived, tile - first, tile * tile_keys, query);
        if (grads_.q.data != nullptr) finish_part(chunk, of_queries);
      }
      if (grads_.q.data != nullptr && parts_ == nullptr) spread_grad_q(grads_, elements_, head_, of_queries, grad_q_);
    }
    for (std::int64_t tile = first; tile < last; ++tile) finish_keys(tile - first, tile * tile_keys);
  }

  static void sum_into(A* sum, const A* part, std::int64_t size) {
    for (std::int64_t i = 0; i < size; i += width) P::store(sum + i, P::add(P::load(sum + i), P::load(part + i)));
  }

  static void spread_grad_q(const KeyGradients& grads, const Elements<A>& elements, const Head& head, std::int64_t tile,
                            const A* grad) {
    const std::int64_t query = tile * tile_queries, queries = std::min(tile_queries, grads.shape.queries - query);
    const HeadsTensor& to = grads.q;
    elements.write(grad, tile_queries, head.at(to, query, elements.size), grads.shape.size, queries, to.channel,
                   to.token);
  }

 protected:
  // Elements of A that are this class's.
  static std::int64_t own_space(const KeyGradients& grads, const Chunks& chunks) {
    const AttentionShape& shape = grads.shape;
    return chunks.tiles_per_item() * tile_keys * (row_of(shape.size) + row_of(shape.value_size)) +
           2 * tile_of_grad_q(shape) + 2 * tile_queries + Seen<P, A>::space(grads.options);
  }

  // `parts` has room for the gradients of all queries from each chunk; null if an item has all chunks of its head.
  OverKeys(const KeyGradients& grads, const Elements<A>& elements, const Groups<A>& groups, const Chunks& chunks,
           Arrays<A>& arrays, A* parts)
      : grads_(grads),
        elements_(elements),
        groups_(groups),
        chunks_(chunks),
        size_(grads.shape.size),
        row_(row_of(size_)),
        value_size_(grads.shape.value_size),
        value_row_(row_of(value_size_)),
        tiles_of_queries_(divide_up(grads.shape.queries, tile_queries)),
        seen_(grads.options, grads.shape, grads.scale, arrays),
        exponential_(seen_.scale_left(grads.scale)),
        parts_(parts) {
    const std::int64_t of_keys = chunks.tiles_per_item() * tile_keys;
    grad_k_ = arrays.take(of_keys * row_);
    grad_v_ = arrays.take(of_keys * value_row_);
    part_ = arrays.take(size_ * tile_queries);
    grad_q_ = arrays.take(size_ * tile_queries);
    for (A** values : {&base_, &lse_}) *values = arrays.take(tile_queries);
  }

  static std::int64_t row_of(std::int64_t size) { return round_up(size, Arrays<A>::unit); }

  // Those that the sample has: there may be none.
  std::int64_t keys_from(std::int64_t key) const { return std::min(tile_keys, all_keys_ - key); }
  std::int64_t queries_from(std::int64_t query) const { return std::min(tile_queries, grads_.shape.queries - query); }
  // The first query of the head among all.
  std::int64_t first_query() const { return (head_.batch * grads_.shape.heads + head_.head) * grads_.shape.queries; }

  // Channels in rows, tokens in lanes, of a tile of keys or of one of queries.
  void columns(A* tile, const HeadsTensor& tensor, const Head& head, std::int64_t token, std::int64_t tokens,
               std::int64_t size) const {
    static_assert(tile_keys == tile_queries);
    elements_.read(tile, tile_keys, head.at(tensor, token, elements_.size), size, tokens, tensor.channel, tensor.token,
                   false);
  }
  // Tokens in rows, channels in lanes.
  void rows(A* tile, const HeadsTensor& tensor, const Head& head, std::int64_t token, std::int64_t tokens,
            std::int64_t size) const {
    elements_.read(tile, row_of(size), head.at(tensor, token, elements_.size), tokens, size, tensor.token,
                   tensor.channel, false);
  }

  void read_log_sums(const LogSums<A>& sums, std::int64_t query, std::int64_t queries) {
    sums.template read<P>(base_, lse_, first_query() + query, queries, seen_.may_see_none(), seen_.gives_logits());
  }

  // Of each query of a tile the sum of the products of two tensors' channels.
  void find_delta(A* delta, const A* grad, const A* out, std::int64_t queries) const {
    for (std::int64_t lane = 0; lane < queries; lane += width) {
      F sum = P::set(0);
      for (std::int64_t c = 0; c < value_size_; ++c) {
        sum = P::fma(P::load(grad + c * tile_queries + lane), P::load(out + c * tile_queries + lane), sum);
      }
      P::store(delta + lane, sum);
    }
  }

  // Calls body(i, c) for the places of a tile of keys by `vectors` of queries, with the products of their columns.
  template <int vectors, class Body>
  void products(std::int64_t size, const A* of_keys, const A* of_queries, std::int64_t lane, std::int64_t keys,
                Body&& body) const {
    for_row_blocks(keys, [&](std::int64_t key, auto rows) {
      F c[rows][vectors];
      clear(c);
      multiply<Mode, rows, vectors, 1>(size, of_keys + key, tile_keys, of_queries + lane, tile_queries, c);
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < vectors; ++n) body((key + r) * tile_queries + lane + n * width, n, c[r][n]);
      }
    });
  }

  // The probabilities of a tile, but for what is dropped, from columns of keys and queries.
  template <int vectors>
  void find_probabilities(A* p, const A* k, const A* q, std::int64_t lane, std::int64_t keys) const {
    const Exponential<P> exponential = exponential_;
    const A* const bias = seen_.bias();
    const F factor = seen_.factor();
    F lse[vectors];
    for (int n = 0; n < vectors; ++n) lse[n] = P::load(lse_ + lane + n * width);
    products<vectors>(size_, k, q, lane, keys, [&](std::int64_t i, int n, F score) {
      if (bias == nullptr) return P::store(p + i, exponential.normalized(score, lse[n]));
      score = P::fma(score, factor, P::load(bias + i));
      P::store(p + i, exponential.normalized(score, P::load(base_ + lane + n * width), lse[n]));
    });
  }

  // What is left, after dropout, at a place of the tile.
  F left(F x, std::int64_t i) const {
    const A* const kept = seen_.kept();
    return kept == nullptr ? x : P::mul(x, P::load(kept + i));
  }

  // Adds to rows of keys: of a tile's weights, times rows of queries.
  void add_by_queries(A* to, const A* weights, const A* of_queries, std::int64_t keys, std::int64_t queries,
                      std::int64_t size) const {
    const std::int64_t row = row_of(size);
    for_panels<P>(size, [&](std::int64_t channel, auto vectors) {
      add_product<vectors, tile_queries>(to + channel, row, keys, queries, weights, 1, of_queries + channel, row);
    });
  }

  // Adds to the part of the queries' gradient: of a tile's weights, times rows of keys.
  void add_by_keys(const A* weights, const A* of_keys, std::int64_t keys, std::int64_t queries) const {
    for_panels<P>(queries, [&](std::int64_t lane, auto vectors) {
      add_product<vectors, 1>(part_ + lane, tile_queries, size_, keys, of_keys, row_, weights + lane, tile_queries);
    });
  }

  // Adds the gradients of a tile's logits to that of the mask.
  void add_to_mask(const A* grads, const Region& region) const {
    const HeadsTensor& mask = grads_.mask;
    A* const to = mask_ + head_.batch * mask.batch + head_.head * mask.head + region.query * mask.token + region.key;
    add_turned<P>(to, mask.token, grads, region.queries, region.keys);
  }

  const KeyGradients& grads_;
  const Elements<A>& elements_;
  const Groups<A>& groups_;
  const Chunks& chunks_;
  const std::int64_t size_, row_, value_size_, value_row_, tiles_of_queries_;
  Seen<P, A> seen_;
  const Exponential<P> exponential_;
  Head head_{}, key_head_{};
  std::int64_t all_keys_ = 0;
  A *grad_k_, *grad_v_, *part_, *grad_q_, *base_, *lse_, *mask_ = nullptr;

 private:
  void add_tile(Derived& derived, std::int64_t tile, std::int64_t key, std::int64_t query) {
    const Region region{key, keys_from(key), query, queries_from(query)};
    if (region.keys <= 0 || seen_.skips(query, region.queries, key)) return;
    seen_.prepare(head_, query, region.queries, key, region.keys);
    derived.add(tile, region);
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
  void finish_part(std::int64_t chunk, std::int64_t of_queries) {
    const std::int64_t size = size_ * tile_queries, head = head_.batch * grads_.shape.heads + head_.head;
    times(part_, size, grads_.scale);
    if (parts_ != nullptr) {
      std::copy_n(part_, size, parts_ + ((head * chunks_.chunks + chunk) * tiles_of_queries_ + of_queries) * size);
    } else if (chunk == 0) {
      std::swap(part_, grad_q_);
    } else {
      sum_into(grad_q_, part_, size);
    }
  }

  void finish_keys(std::int64_t tile, std::int64_t key) {
    times(grad_k_ + tile * tile_keys * row_, tile_keys * row_, grads_.scale);
    if (grads_.k.data != nullptr) write_rows(grads_.k, grad_k_ + tile * tile_keys * row_, key, size_);
    if (grads_.v.data != nullptr) write_rows(grads_.v, grad_v_ + tile * tile_keys * value_row_, key, value_size_);
  }

  void write_rows(const HeadsTensor& to, const A* rows, std::int64_t key, std::int64_t size) const {
    elements_.write(rows, row_of(size), key_head_.at(to, key, elements_.size),
                    std::min(tile_keys, grads_.shape.keys - key), size, to.token, to.channel);
  }

  A* const parts_;
};

// Adds the parts of the queries' gradient, in the order of the chunks.
template <class Worker, class A>
struct AddParts {
  const KeyGradients& grads;
  const Elements<A>& elements;
  std::int64_t chunks, tiles;
  A* parts;

  void run(std::int64_t item) const {
    const std::int64_t head = item / tiles, tile = item % tiles, size = Worker::tile_of_grad_q(grads.shape);
    const auto part = [&](std::int64_t chunk) { return parts + ((head * chunks + chunk) * tiles + tile) * size; };
    A* const sum = part(0);
    for (std::int64_t chunk = 1; chunk < chunks; ++chunk) Worker::sum_into(sum, part(chunk), size);
    Worker::spread_grad_q(grads, elements, {head / grads.shape.heads, head % grads.shape.heads}, tile, sum);
  }
};

// Has workers, which make_worker(groups, chunks, space, parts) makes, go over all keys.
template <class Worker, class A, class MakeWorker>
Status over_keys(const KeyGradients& grads, const Elements<A>& elements, int threads, MakeWorker&& make_worker) {
  const AttentionShape& shape = grads.shape;
  const std::int64_t heads = shape.batch * shape.heads, tiles = divide_up(shape.queries, tile_queries);
  const std::int64_t useful = useful_threads(shape, threads);
  const Groups<A> groups(shape, grads.mask);
  const Chunks chunks(shape, groups.count, useful, sizeof(A));
  const std::int64_t items = groups.count * chunks.items_per_head;
  const int team = static_cast<int>(std::min(useful, std::max<std::int64_t>(1, items)));
  const bool in_parts = chunks.items_per_head > 1 && grads.q.data != nullptr;
  const Workspace<A> space(team, Worker::space(grads, chunks));
  const Workspace<A> parts(1, in_parts ? heads * chunks.chunks * tiles * Worker::tile_of_grad_q(shape) : 0);
  if (!space.ok() || !parts.ok() || !groups.ok()) return Status::out_of_memory;
  A* const of_chunks = in_parts ? parts.of_thread(0) : nullptr;
  for_items(items, team, [&](int thread) { return make_worker(groups, chunks, space.of_thread(thread), of_chunks); });
  if (in_parts) {
    for_items(heads * tiles, team,
              [&](int) { return AddParts<Worker, A>{grads, elements, chunks.chunks, tiles, of_chunks}; });
  }
  groups.add_parts(team);
  return Status::ok;
}

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
