// What the emulator's headers ask of its runtime. The headers are compiled with the kernels, and so instrumented as
// they are; the runtime is not, so nothing it does counts as an access of the kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

#include "emulation/vector_types.h"

// The runtime changes them whenever another thread goes on. For each thread they are constants, and the compiler does
// not instrument reads of constants (of a dim3 it would: that has a constructor).
extern const uint3 threadIdx __asm__("gencore_emulation_thread_index");
extern const uint3 blockIdx __asm__("gencore_emulation_block_index");
extern const uint3 blockDim __asm__("gencore_emulation_block_size");
extern const uint3 gridDim __asm__("gencore_emulation_grid_size");

namespace gencore_emulation {

// Where in the source a barrier or collective stands. The compiler may copy code, so that one place has several
// addresses; the line stays the same.
using Where = std::source_location;

enum class BarrierKind { plain, count, all, any };
int barrier(BarrierKind kind, int predicate, Where where);

enum class ShuffleKind { index, up, down, butterfly };
std::uint64_t shuffle(ShuffleKind kind, unsigned mask, std::uint64_t bits, unsigned operand, int width, Where where);

enum class VoteKind { ballot, all, any };
unsigned vote(VoteKind kind, unsigned mask, int predicate, Where where);

enum class ReduceKind { add, min, max, bit_and, bit_or, bit_xor };
// `T` is int or unsigned.
template <class T>
T reduce(ReduceKind kind, unsigned mask, T value, Where where);

unsigned match_any(unsigned mask, std::uint64_t bits, Where where);
void synchronize_warp(unsigned mask, Where where);
unsigned active_mask(Where where);

enum class AtomicKind { add, min, max, bit_and, bit_or, bit_xor, exchange };
template <class T>
T atomic(AtomicKind kind, T* address, T value);
template <class T>
T atomic_compare_and_swap(T* address, T compare, T value);

// What is to be known, before the access itself, of loads that the device serves from a cache of constant memory, and
// of stores that know global memory only.
void begin_cached_load(const void* address, std::size_t bytes);
void begin_global_store(const void* address, std::size_t bytes);

void* dynamic_shared_memory();
void copy_async(void* shared, const void* global, bool valid);
void copy_async_commit();
void copy_async_wait(int groups);
void load_matrices(std::uint32_t* registers, int count, bool transposed, const void* row, Where where);
enum class MatrixType { float16, bfloat16 };
void multiply_matrices(MatrixType type, float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                       Where where);

}  // namespace gencore_emulation
