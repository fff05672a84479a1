// Barriers and the functions that a warp executes together.
#pragma once

#include <bit>
#include <type_traits>

#include "emulation/interface.h"

inline void __syncthreads(gencore_emulation::Where where = gencore_emulation::Where::current()) {
  gencore_emulation::barrier(gencore_emulation::BarrierKind::plain, 0, where);
}
inline int __syncthreads_count(int predicate, gencore_emulation::Where where = gencore_emulation::Where::current()) {
  return gencore_emulation::barrier(gencore_emulation::BarrierKind::count, predicate, where);
}
inline int __syncthreads_and(int predicate, gencore_emulation::Where where = gencore_emulation::Where::current()) {
  return gencore_emulation::barrier(gencore_emulation::BarrierKind::all, predicate, where);
}
inline int __syncthreads_or(int predicate, gencore_emulation::Where where = gencore_emulation::Where::current()) {
  return gencore_emulation::barrier(gencore_emulation::BarrierKind::any, predicate, where);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu,
                       gencore_emulation::Where where = gencore_emulation::Where::current()) {
  gencore_emulation::synchronize_warp(mask, where);
}
inline unsigned __activemask(gencore_emulation::Where where = gencore_emulation::Where::current()) {
  return gencore_emulation::active_mask(where);
}

// Fences order a thread's accesses for others to see; here every access is seen at once.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}

namespace gencore_emulation {

// Values travel as their bits.
template <class T>
inline std::uint64_t bits_of(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  if constexpr (sizeof(T) == 8) return std::bit_cast<std::uint64_t>(value);
  if constexpr (sizeof(T) == 4) return std::bit_cast<std::uint32_t>(value);
  if constexpr (sizeof(T) == 2) return std::bit_cast<std::uint16_t>(value);
}

template <class T>
inline T value_of(std::uint64_t bits) {
  if constexpr (sizeof(T) == 8) return std::bit_cast<T>(bits);
  if constexpr (sizeof(T) == 4) return std::bit_cast<T>(static_cast<std::uint32_t>(bits));
  if constexpr (sizeof(T) == 2) return std::bit_cast<T>(static_cast<std::uint16_t>(bits));
}

}  // namespace gencore_emulation

#define GENCORE_SHUFFLE(function, kind, operand_type)                                                            \
  template <class T>                                                                                             \
  inline T function(unsigned mask, T value, operand_type operand, int width = 32,                                \
                    gencore_emulation::Where where = gencore_emulation::Where::current()) {                      \
    return gencore_emulation::value_of<T>(gencore_emulation::shuffle(gencore_emulation::ShuffleKind::kind, mask, \
                                                                     gencore_emulation::bits_of(value),          \
                                                                     unsigned(operand), width, where));          \
  }
GENCORE_SHUFFLE(__shfl_sync, index, int)
GENCORE_SHUFFLE(__shfl_up_sync, up, unsigned)
GENCORE_SHUFFLE(__shfl_down_sync, down, unsigned)
GENCORE_SHUFFLE(__shfl_xor_sync, butterfly, int)
#undef GENCORE_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              gencore_emulation::Where where = gencore_emulation::Where::current()) {
  return gencore_emulation::vote(gencore_emulation::VoteKind::ballot, mask, predicate, where);
}
inline int __all_sync(unsigned mask, int predicate,
                      gencore_emulation::Where where = gencore_emulation::Where::current()) {
  return int(gencore_emulation::vote(gencore_emulation::VoteKind::all, mask, predicate, where));
}
inline int __any_sync(unsigned mask, int predicate,
                      gencore_emulation::Where where = gencore_emulation::Where::current()) {
  return int(gencore_emulation::vote(gencore_emulation::VoteKind::any, mask, predicate, where));
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value,
                                 gencore_emulation::Where where = gencore_emulation::Where::current()) {
  return gencore_emulation::match_any(mask, gencore_emulation::bits_of(value), where);
}

#define GENCORE_REDUCE(function, kind, type)                                                   \
  inline type function(unsigned mask, type value,                                              \
                       gencore_emulation::Where where = gencore_emulation::Where::current()) { \
    return gencore_emulation::reduce(gencore_emulation::ReduceKind::kind, mask, value, where); \
  }
GENCORE_REDUCE(__reduce_add_sync, add, int)
GENCORE_REDUCE(__reduce_add_sync, add, unsigned)
GENCORE_REDUCE(__reduce_min_sync, min, int)
GENCORE_REDUCE(__reduce_min_sync, min, unsigned)
GENCORE_REDUCE(__reduce_max_sync, max, int)
GENCORE_REDUCE(__reduce_max_sync, max, unsigned)
GENCORE_REDUCE(__reduce_and_sync, bit_and, unsigned)
GENCORE_REDUCE(__reduce_or_sync, bit_or, unsigned)
GENCORE_REDUCE(__reduce_xor_sync, bit_xor, unsigned)
#undef GENCORE_REDUCE
