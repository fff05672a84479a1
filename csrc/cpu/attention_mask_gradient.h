// The gradient of a mask that is added to the logits: theirs, summed over what the mask is the same for.
//
// A worker goes through some heads in turn and adds to one place: samples where the mask is the same for all, and
// heads. How many groups of these there are is a matter of the shape, each but the first has memory of its own, and
// the parts are added in their order: so the bits depend neither on threads nor, where each sample has a mask, on what
// else is in the batch.
#pragma once

#include <cstdlib>
#include <memory>

#include "attention_tiles.h"

namespace gencore::cpu::GENCORE_SIMD {
namespace {

template <class A>
class Groups {
 public:
  Groups(const AttentionShape& shape, const HeadsTensor& mask)
      : shape_(shape), mask_(static_cast<A*>(mask.data)), of_samples_(shape.batch), of_heads_(shape.key_heads) {
    if (mask.data != nullptr) {
      const std::int64_t pairs = std::max<std::int64_t>(1, (mask.token == 0 ? 1 : shape.queries) * shape.keys);
      const std::int64_t planes = mask.head == 0 ? 1 : shape.heads;
      size_ = (mask.batch == 0 ? 1 : shape.batch) * planes * pairs;
      const auto groups = [](std::int64_t count, std::int64_t wanted, std::int64_t fitting) {
        return std::max<std::int64_t>(1, std::min({count, wanted, fitting}));
      };
      if (mask.head == 0) of_heads_ = groups(shape.key_heads, 8, most_pairs_of_sample / pairs);
      if (mask.batch == 0) {
        of_samples_ =
            groups(shape.batch, divide_up(enough, std::max<std::int64_t>(1, of_heads_)), most_pairs / (planes * pairs));
      }
      parts_of_samples_ = mask.batch == 0 ? of_samples_ : 1;
      parts_of_heads_ = mask.head == 0 ? of_heads_ : 1;
      const std::int64_t others = parts_of_samples_ * parts_of_heads_ - 1;
      if (others > 0) {
        others_.reset(static_cast<A*>(std::calloc(static_cast<std::size_t>(others * size_), sizeof(A))));
        is_ok_ = others_ != nullptr;
      }
    }
    count = of_samples_ * of_heads_;
  }

  std::int64_t count;

  bool ok() const { return is_ok_; }

  // Where a group adds to.
  A* part_of(std::int64_t group) const {
    const std::int64_t of_samples = group / of_heads_ % parts_of_samples_, of_heads = group % of_heads_;
    return part(of_samples * parts_of_heads_ + of_heads % parts_of_heads_);
  }

  // Calls body(head) for the heads of keys of a group, in their order.
  template <class Body>
  void for_heads(std::int64_t group, Body&& body) const {
    const auto begin = [](std::int64_t number, std::int64_t groups, std::int64_t all) { return number * all / groups; };
    const std::int64_t of_samples = group / of_heads_, of_heads = group % of_heads_;
    const std::int64_t last_sample = begin(of_samples + 1, of_samples_, shape_.batch);
    const std::int64_t last_head = begin(of_heads + 1, of_heads_, shape_.key_heads);
    for (std::int64_t b = begin(of_samples, of_samples_, shape_.batch); b < last_sample; ++b) {
      for (std::int64_t h = begin(of_heads, of_heads_, shape_.key_heads); h < last_head; ++h) body(Head{b, h});
    }
  }

  // Adds the other parts to the first, which is the result.
  void add_parts(int team) const {
    const std::int64_t parts = parts_of_samples_ * parts_of_heads_;
    if (parts == 1) return;
    for_items(divide_up(size_, block), team, [&](int) { return AddBlock{*this, parts}; });
  }

 private:
  // Groups that give every core something; elements that a sample's parts, and all parts, have at most.
  static constexpr std::int64_t enough = 32, most_pairs_of_sample = 1 << 20, most_pairs = 1 << 24;
  static constexpr std::int64_t block = 4096;

  struct Free {
    void operator()(A* memory) const { std::free(memory); }
  };

  struct AddBlock {
    const Groups& groups;
    std::int64_t parts;

    void run(std::int64_t item) const {
      const std::int64_t first = item * block, last = std::min(groups.size_, first + block);
      for (std::int64_t number = 1; number < parts; ++number) {
        const A* const part = groups.part(number);
        for (std::int64_t i = first; i < last; ++i) groups.mask_[i] += part[i];
      }
    }
  };

  A* part(std::int64_t number) const { return number == 0 ? mask_ : others_.get() + (number - 1) * size_; }

  const AttentionShape& shape_;
  A* const mask_;
  // Groups, and parts that they add to.
  std::int64_t of_samples_, of_heads_, parts_of_samples_ = 1, parts_of_heads_ = 1;
  std::int64_t size_ = 0;
  std::unique_ptr<A, Free> others_;
  bool is_ok_ = true;
};

// Adds rows of keys, with queries in lanes, to rows of queries that are `step` from the next; their sum, if that is 0.
template <class P, class A>
inline void add_turned(A* to, std::int64_t step, const A* from, std::int64_t queries, std::int64_t keys) {
  using F = typename P::F;
  constexpr std::int64_t width = P::width;
  for (std::int64_t k = 0; k < keys; k += width) {
    const std::int64_t count = std::min(width, keys - k);
    const auto add = [&](A* at, F x) { store_part<P>(at, P::add(load_part<P>(at, count), x), count); };
    F sum = P::set(0);
    for (std::int64_t q = 0; q < queries; q += width) {
      F x[width];
      for (std::int64_t i = 0; i < width; ++i) x[i] = P::load(from + (k + std::min(i, count - 1)) * tile_queries + q);
      P::transpose(x);
      for (std::int64_t i = 0; i < width && q + i < queries; ++i) {
        if (step == 0) {
          sum = P::add(sum, x[i]);
        } else {
          add(to + (q + i) * step + k, x[i]);
        }
      }
    }
    if (step == 0) add(to + k, sum);
  }
}

}  // namespace
}  // namespace gencore::cpu::GENCORE_SIMD
