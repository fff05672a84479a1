// What attention's forward and backward pass share: the size of tiles, exponentials, who works on what.
#pragma once

#include <limits>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "gencore/attention.h"
#include "panels.h"
#include "tiles.h"
#include "workspace.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

// Queries of a tile, which lie in the lanes of vectors, so that the softmax of a query never leaves its lane: what
// becomes of it depends neither on the tile it is in nor on the vector's width. Keys come in tiles of `tile_keys`.
constexpr std::int64_t tile_queries = 64;
constexpr std::int64_t tile_keys = 64;

inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return divide_up(a, b) * b; }

// Powers of e from logits that lack the scale; of 2, but for float64.
template <class P>
struct Exponential {
  using F = typename P::F;
  static constexpr bool is_double = std::is_same_v<P, Double>;
  // From the logarithm to base e to that in use.
  static constexpr double unit = is_double ? 1.0 : 1.4426950408889634;

  F scale, minus_scale;

  explicit Exponential(double of_logits)
      : scale(P::set(static_cast<std::conditional_t<is_double, double, float>>(of_logits * unit))),
        minus_scale(P::sub(P::set(0), scale)) {}

  // e^(scale (s - most)), for s up to `most`: the difference is taken first, so that the greatest weighs 1 exactly.
  F below(F s, F most) const { return minus(P::mul(P::sub(most, s), scale)); }
  // e^(scale s - lse), of lse times `unit`.
  F normalized(F s, F lse) const { return minus(P::fma(s, minus_scale, lse)); }
  // e^(scale (s - base) - lse): that difference is taken first.
  F normalized(F s, F base, F lse) const { return minus(P::fma(P::sub(base, s), scale, lse)); }

 private:
  static F minus(F x) {
    if constexpr (is_double) {
      return exponential_minus<P>(x);
    } else {
      return exp2_minus<P>(x);
    }
  }
};

// The logarithms of all queries' denominators, as the forward pass has kept them.
template <class A>
struct LogSums {
  const A *base, *rest;

  LogSums(const void* base_, const void* lse) : base(static_cast<const A*>(base_)), rest(static_cast<const A*>(lse)) {}

  // Those of a tile from query `first` on: of a query the base, if it is kept `apart`, and the rest in the unit of
  // exponentials. 0 where there is no query. Of a query that may and does see no key the rest is large: its
  // probabilities are 0.
  template <class P>
  void read(A* bases, A* rests, std::int64_t first, std::int64_t queries, bool may_see_none, bool apart) const {
    constexpr double nothing = -std::numeric_limits<double>::infinity(), large = std::numeric_limits<A>::max() / 4;
    for (std::int64_t i = 0; i < tile_queries; ++i) {
      const double value = i < queries ? static_cast<double>(rest[first + i]) : 0;
      const double of_base = i < queries && base != nullptr ? static_cast<double>(base[first + i]) : 0;
      const bool sees_none = may_see_none && value == nothing;
      bases[i] = static_cast<A>(apart ? of_base : 0);
      rests[i] = static_cast<A>(sees_none ? large : (apart ? value : of_base + value) * Exponential<P>::unit);
    }
  }
};

// Takes arrays from a thread's slice of the workspace, each at the beginning of a cache line.
template <class A>
class Arrays {
 public:
  static constexpr std::int64_t unit = 16;
  // Elements that are lost to the first alignment.
  static constexpr std::int64_t lost = unit;

  explicit Arrays(A* space)
      : next_(reinterpret_cast<A*>(round_up(reinterpret_cast<std::intptr_t>(space), unit * sizeof(A)))) {}
  A* take(std::int64_t count) { return std::exchange(next_, next_ + round_up(count, unit)); }

 private:
  A* next_;
};

// A sample's head, and where its tokens lie.
struct Head {
  std::int64_t batch, head;

  // The token's first element; `size` is that of an element in bytes.
  void* at(const HeadsTensor& tensor, std::int64_t token, std::int64_t size) const {
    return static_cast<char*>(tensor.data) + size * (batch * tensor.batch + head * tensor.head + token * tensor.token);
  }
};

// The head of k and v that a head of q goes to.
inline Head head_of_keys(const AttentionShape& shape, const Head& head) {
  return {head.batch, head.head / (shape.heads / shape.key_heads)};
}

// Threads that are worth waking.
inline std::int64_t useful_threads(const AttentionShape& shape, int threads) {
  // Operations below which waking another costs more than it saves.
  constexpr double grain = 1 << 20;
  const double tokens = static_cast<double>(shape.batch * shape.heads * shape.queries);
  const double work = 2 * tokens * static_cast<double>(shape.keys) * static_cast<double>(shape.size + shape.value_size);
  return std::min<std::int64_t>(threads,
                                std::max<std::int64_t>(1, static_cast<std::int64_t>(std::min(work / grain, 1e6))));
}

// Who computes what: an item is some neighbouring tiles of queries of one head, which share each tile of keys.
struct Plan {
  std::int64_t queries_per_tile, tiles, tiles_per_item, items_per_head, items;
  int team;

  Plan(const AttentionShape& shape, int threads, std::int64_t bytes) {
    const std::int64_t heads = shape.batch * shape.heads, bytes_per_query = (shape.size + shape.value_size) * bytes;
    const std::int64_t wanted = useful_threads(shape, threads);
    // Narrow tiles where there would not be one for everybody.
    queries_per_tile = tile_queries;
    while (queries_per_tile > 16 && heads * divide_up(shape.queries, queries_per_tile) < wanted) queries_per_tile -= 16;
    tiles = divide_up(shape.queries, queries_per_tile);
    // Many tiles of queries make gathering keys and values cheap; they stay in the second-level cache.
    constexpr std::int64_t most_bytes = 256 << 10, most_tiles = 8;
    const std::int64_t fitting = std::max<std::int64_t>(1, most_bytes / (bytes_per_query * queries_per_tile));
    const std::int64_t fair = wanted == 1 ? most_tiles : std::max<std::int64_t>(1, heads * tiles / (4 * wanted));
    tiles_per_item = std::max<std::int64_t>(1, std::min({fitting, fair, most_tiles, tiles}));
    items_per_head = divide_up(tiles, tiles_per_item);
    tiles_per_item = items_per_head == 0 ? 1 : divide_up(tiles, items_per_head);
    items = heads * items_per_head;
    team = static_cast<int>(std::min(wanted, std::max<std::int64_t>(1, items)));
  }
};

// Gives the items to the threads of a team, each with a worker of its own, as they become free.
template <class MakeWorker>
void for_items(std::int64_t items, [[maybe_unused]] int team, MakeWorker&& make_worker) {
#pragma omp parallel num_threads(team) if (team > 1)
  {
#ifdef _OPENMP
    const int thread = omp_get_thread_num();
#else
    const int thread = 0;
#endif
    auto worker = make_worker(thread);
#pragma omp for schedule(dynamic)
    for (std::int64_t item = 0; item < items; ++item) worker.run(item);
  }
}

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
