// What the lanes of a warp do together, by the CUDA C++ Programming Guide and the PTX ISA manual.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "state.h"

namespace gencore_emulation {
namespace {

// Calls body(lane, data of the lane) for every lane of the mask.
template <class Data, class Body>
void for_lanes(unsigned mask, void* const* data, Body&& body) {
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    const unsigned lane = static_cast<unsigned>(std::countr_zero(rest));
    body(lane, *static_cast<Data*>(data[lane]));
  }
}

struct Shuffle {
  ShuffleKind kind;
  std::uint64_t bits;
  unsigned operand, width;
  std::uint64_t result;
};

// What a lane gets from one that is not in the mask: nothing defined, so something that will be noticed, a NaN.
constexpr std::uint64_t undefined = 0x7FF7DEAD7FE7DEADull;

void finish_shuffle(unsigned mask, void* const* data) {
  for_lanes<Shuffle>(mask, data, [&](unsigned lane, Shuffle& own) {
    const unsigned first = lane & ~(own.width - 1), last = lane | (own.width - 1), n = own.operand & 31;
    unsigned source = lane;
    switch (own.kind) {
      case ShuffleKind::index: source = first | (own.operand & (own.width - 1)); break;
      case ShuffleKind::up: source = lane >= first + n ? lane - n : lane; break;
      case ShuffleKind::down: source = lane + n <= last ? lane + n : lane; break;
      // Lanes of earlier segments may be read, those of later ones not.
      case ShuffleKind::butterfly: source = (lane ^ n) <= last ? lane ^ n : lane; break;
    }
    own.result = mask >> source & 1 ? static_cast<const Shuffle*>(data[source])->bits : undefined;
  });
}

struct Vote {
  int predicate;
  unsigned result;
};

void finish_vote(unsigned mask, void* const* data) {
  unsigned ballot = 0;
  for_lanes<Vote>(mask, data, [&](unsigned lane, Vote& own) { ballot |= unsigned{own.predicate != 0} << lane; });
  for_lanes<Vote>(mask, data, [&](unsigned, Vote& own) { own.result = ballot; });
}

struct Match {
  std::uint64_t bits;
  unsigned result;
};

void finish_match(unsigned mask, void* const* data) {
  for_lanes<Match>(mask, data, [&](unsigned, Match& own) {
    own.result = 0;
    for_lanes<Match>(mask, data,
                     [&](unsigned lane, Match& other) { own.result |= unsigned{own.bits == other.bits} << lane; });
  });
}

template <class T>
struct Reduction {
  ReduceKind kind;
  T value;
};

template <class T>
void finish_reduction(unsigned mask, void* const* data) {
  using U = std::make_unsigned_t<T>;
  T total{};
  bool is_first = true;
  for_lanes<Reduction<T>>(mask, data, [&](unsigned, Reduction<T>& own) {
    const T value = own.value;
    if (is_first) {
      total = value;
    } else {
      switch (own.kind) {
        case ReduceKind::add: total = static_cast<T>(static_cast<U>(total) + static_cast<U>(value)); break;
        case ReduceKind::min: total = std::min(total, value); break;
        case ReduceKind::max: total = std::max(total, value); break;
        case ReduceKind::bit_and: total &= value; break;
        case ReduceKind::bit_or: total |= value; break;
        case ReduceKind::bit_xor: total ^= value; break;
      }
    }
    is_first = false;
  });
  for_lanes<Reduction<T>>(mask, data, [&](unsigned, Reduction<T>& own) { own.value = total; });
}

void finish_synchronization(unsigned mask, void* const* data) {
  Warp& warp = **static_cast<Warp**>(data[std::countr_zero(mask)]);
  if (!warp.has_clocks) {
    for (unsigned lane = 0; lane < warp_threads; ++lane) {
      for (unsigned other = 0; other < warp_threads; ++other) warp.clock[lane][other] = lane == other;
    }
    warp.has_clocks = true;
  }
  std::uint32_t known[warp_threads] = {};
  for_lanes<Warp*>(mask, data, [&](unsigned lane, Warp*&) {
    for (unsigned i = 0; i < warp_threads; ++i) known[i] = std::max(known[i], warp.clock[lane][i]);
  });
  for_lanes<Warp*>(mask, data, [&](unsigned lane, Warp*&) {
    std::copy(std::begin(known), std::end(known), warp.clock[lane]);
    ++warp.clock[lane][lane];
  });
}

}  // namespace

std::uint64_t shuffle(ShuffleKind kind, unsigned mask, std::uint64_t bits, unsigned operand, int width, Where where) {
  constexpr const char* names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  const char* const function = names[static_cast<int>(kind)];
  if (width < 1 || width > 32 || !std::has_single_bit(static_cast<unsigned>(width))) {
    fault(cudaErrorLaunchFailure, format("%s: the width is %d, and no power of two up to 32", function, width), where);
  }
  Shuffle data{kind, bits, operand, static_cast<unsigned>(width), 0};
  meet(function, mask, &data, finish_shuffle, where);
  return data.result;
}

unsigned vote(VoteKind kind, unsigned mask, int predicate, Where where) {
  constexpr const char* names[] = {"__ballot_sync", "__all_sync", "__any_sync"};
  Vote data{predicate, 0};
  meet(names[static_cast<int>(kind)], mask, &data, finish_vote, where);
  if (kind == VoteKind::all) return data.result == mask;
  return kind == VoteKind::any ? data.result != 0 : data.result;
}

unsigned match_any(unsigned mask, std::uint64_t bits, Where where) {
  Match data{bits, 0};
  meet("__match_any_sync", mask, &data, finish_match, where);
  return data.result;
}

template <class T>
T reduce(ReduceKind kind, unsigned mask, T value, Where where) {
  constexpr const char* names[] = {"__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync",
                                   "__reduce_and_sync", "__reduce_or_sync",  "__reduce_xor_sync"};
  Reduction<T> data{kind, value};
  meet(names[static_cast<int>(kind)], mask, &data, finish_reduction<T>, where);
  return data.value;
}
template int reduce(ReduceKind, unsigned, int, Where);
template unsigned reduce(ReduceKind, unsigned, unsigned, Where);

void synchronize_warp(unsigned mask, Where where) {
  Warp* warp = &emulator().warp[current->warp];
  // CUDA asks that all lanes execute one with the same mask, not that it is the same one.
  meet("__syncwarp", mask, &warp, finish_synchronization, where, true);
}

}  // namespace gencore_emulation
