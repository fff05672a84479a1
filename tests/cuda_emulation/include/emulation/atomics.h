// Atomic functions. They are the runtime's, whose accesses are told to be atomic.
#pragma once

#include "emulation/interface.h"

#define GENCORE_ATOMIC(function, kind, type)                            \
  inline type function(type* address, type value) {                     \
    using gencore_emulation::AtomicKind;                                \
    return gencore_emulation::atomic(AtomicKind::kind, address, value); \
  }
#define GENCORE_ATOMIC_INTEGERS(function, kind) \
  GENCORE_ATOMIC(function, kind, int)           \
  GENCORE_ATOMIC(function, kind, unsigned int)  \
  GENCORE_ATOMIC(function, kind, unsigned long long)

GENCORE_ATOMIC_INTEGERS(atomicAdd, add)
GENCORE_ATOMIC(atomicAdd, add, float)
GENCORE_ATOMIC(atomicAdd, add, double)
GENCORE_ATOMIC_INTEGERS(atomicMin, min)
GENCORE_ATOMIC(atomicMin, min, long long)
GENCORE_ATOMIC_INTEGERS(atomicMax, max)
GENCORE_ATOMIC(atomicMax, max, long long)
GENCORE_ATOMIC_INTEGERS(atomicAnd, bit_and)
GENCORE_ATOMIC_INTEGERS(atomicOr, bit_or)
GENCORE_ATOMIC_INTEGERS(atomicXor, bit_xor)
GENCORE_ATOMIC_INTEGERS(atomicExch, exchange)
GENCORE_ATOMIC(atomicExch, exchange, float)

#undef GENCORE_ATOMIC_INTEGERS
#undef GENCORE_ATOMIC

inline int atomicSub(int* address, int value) { return atomicAdd(address, static_cast<int>(0u - unsigned(value))); }
inline unsigned int atomicSub(unsigned int* address, unsigned int value) { return atomicAdd(address, 0u - value); }

inline int atomicCAS(int* address, int compare, int value) {
  return gencore_emulation::atomic_compare_and_swap(address, compare, value);
}
inline unsigned int atomicCAS(unsigned int* address, unsigned int compare, unsigned int value) {
  return gencore_emulation::atomic_compare_and_swap(address, compare, value);
}
inline unsigned long long atomicCAS(unsigned long long* address, unsigned long long compare, unsigned long long value) {
  return gencore_emulation::atomic_compare_and_swap(address, compare, value);
}
