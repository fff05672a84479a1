// What one thread asks of the runtime: atomics, asynchronous copies; and the matrix instructions of a warp.
#include <algorithm>
#include <bit>
#include <cstring>

#include "emulation/half_bits.h"
#include "memory.h"
#include "state.h"

#define CALLER __builtin_return_address(0)

namespace gencore_emulation {
namespace {

// Threads that wait for one another by atomics alone let each other run.
void let_others_run(const void* code) {
  count_step(code);
  if (emulator().steps % 64 == 0) yield();
}

}  // namespace

template <class T>
T atomic(AtomicKind kind, T* address, T value) {
  aligned_access(address, sizeof(T), Access::atomic, CALLER);
  const T old = *address;
  if constexpr (std::is_floating_point_v<T>) {
    *address = kind == AtomicKind::add ? old + value : value;
  } else {
    using U = std::make_unsigned_t<T>;
    switch (kind) {
      case AtomicKind::add: *address = static_cast<T>(static_cast<U>(old) + static_cast<U>(value)); break;
      case AtomicKind::min: *address = std::min(old, value); break;
      case AtomicKind::max: *address = std::max(old, value); break;
      case AtomicKind::bit_and: *address = old & value; break;
      case AtomicKind::bit_or: *address = old | value; break;
      case AtomicKind::bit_xor: *address = old ^ value; break;
      case AtomicKind::exchange: *address = value; break;
    }
  }
  let_others_run(CALLER);
  return old;
}
template int atomic(AtomicKind, int*, int);
template unsigned atomic(AtomicKind, unsigned*, unsigned);
template long long atomic(AtomicKind, long long*, long long);
template unsigned long long atomic(AtomicKind, unsigned long long*, unsigned long long);
template float atomic(AtomicKind, float*, float);
template double atomic(AtomicKind, double*, double);

template <class T>
T atomic_compare_and_swap(T* address, T compare, T value) {
  aligned_access(address, sizeof(T), Access::atomic, CALLER);
  const T old = *address;
  if (old == compare) *address = value;
  let_others_run(CALLER);
  return old;
}
template int atomic_compare_and_swap(int*, int, int);
template unsigned atomic_compare_and_swap(unsigned*, unsigned, unsigned);
template unsigned long long atomic_compare_and_swap(unsigned long long*, unsigned long long, unsigned long long);

void begin_cached_load(const void* address, std::size_t bytes) {
  require_global(address, bytes, Access::cached_read, CALLER);
  access(address, bytes, Access::cached_read, CALLER);
}

void begin_global_store(const void* address, std::size_t bytes) {
  require_global(address, bytes, Access::write, CALLER);
}

void copy_async(void* shared, const void* global, bool valid) {
  if (!is_shared(shared, 16)) {
    fault(cudaErrorIllegalAddress, format("cp.async to %p, which is not shared memory", shared), CALLER);
  }
  if (valid) {
    require_global(global, 16, Access::read, CALLER);
    aligned_access(global, 16, Access::read, CALLER);
  }
  aligned_access(shared, 16, Access::begin_copy, CALLER);
  current->copies.push_back({shared, global, valid, current->copy_groups});
}

void copy_async_commit() { ++current->copy_groups; }

void copy_async_wait(int groups) {
  Thread& me = *current;
  const auto has_arrived = [&](const AsyncCopy& copy) { return copy.group < me.copy_groups - groups; };
  for (const AsyncCopy& copy : me.copies) {
    if (!has_arrived(copy)) continue;
    if (copy.valid) {
      aligned_access(copy.global, 16, Access::read, CALLER);
      std::memcpy(copy.shared, copy.global, 16);
    } else {
      std::memset(copy.shared, 0, 16);
    }
    end_copy(copy.shared, 16, CALLER);
  }
  std::erase_if(me.copies, has_arrived);
}

namespace {

struct MatrixLoad {
  std::uint32_t* registers;
  int count;
  bool transposed;
  const void* row;
};

void finish_load(unsigned, void* const* data) {
  const auto lane = [&](int i) -> const MatrixLoad& { return *static_cast<const MatrixLoad*>(data[i]); };
  for (int matrix = 0; matrix < lane(0).count; ++matrix) {
    std::uint16_t element[8][8];
    for (int row = 0; row < 8; ++row) std::memcpy(element[row], lane(8 * matrix + row).row, 16);
    for (int i = 0; i < 32; ++i) {
      const int row = i / 4, column = 2 * (i % 4);
      const bool transposed = lane(i).transposed;
      const std::uint32_t low = transposed ? element[column][row] : element[row][column];
      const std::uint32_t high = transposed ? element[column + 1][row] : element[row][column + 1];
      lane(i).registers[matrix] = high << 16 | low;
    }
  }
}

struct MatrixProduct {
  MatrixType type;
  float* d;
  const std::uint32_t *a, *b;
};

// Products of two half-size numbers are exact in binary64, and so nearly are the sums; the device rounds these in a way
// that is not documented, to about binary32.
void finish_product(unsigned, void* const* data) {
  const auto lane = [&](int i) -> const MatrixProduct& { return *static_cast<const MatrixProduct*>(data[i]); };
  const bool is_half = lane(0).type == MatrixType::float16;
  const auto element = [&](std::uint32_t word, int i) -> double {
    const auto bits = static_cast<std::uint16_t>(word >> (16 * i));
    return is_half ? half_value(bits) : bfloat16_value(bits);
  };
  double a[16][16], b[16][8];
  for (int i = 0; i < 32; ++i) {
    const int group = i / 4, pair = 2 * (i % 4);
    for (int j = 0; j < 2; ++j) {
      for (int k = 0; k < 4; ++k) a[group + 8 * (k % 2)][pair + j + 8 * (k / 2)] = element(lane(i).a[k], j);
      for (int k = 0; k < 2; ++k) b[pair + j + 8 * k][group] = element(lane(i).b[k], j);
    }
  }
  for (int i = 0; i < 32; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int row = i / 4 + 8 * (j / 2), column = 2 * (i % 4) + j % 2;
      double sum = lane(i).d[j];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      lane(i).d[j] = static_cast<float>(sum);
    }
  }
}

}  // namespace

void load_matrices(std::uint32_t* registers, int count, bool transposed, const void* row, Where where) {
  const char* const function = count == 4 ? "ldmatrix.x4" : "ldmatrix.x2";
  // The addresses of other lanes are not used.
  if (current->lane < 8 * static_cast<unsigned>(count)) {
    if (!is_shared(row, 16)) {
      fault(cudaErrorIllegalAddress, format("out of bounds: %s from %p, which is not shared memory", function, row),
            where);
    }
    aligned_access(row, 16, Access::read, CALLER);
  }
  MatrixLoad data{registers, count, transposed, row};
  meet(function, ~0u, &data, finish_load, where);
}

void multiply_matrices(MatrixType type, float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                       Where where) {
  MatrixProduct data{type, d, a, b};
  meet("mma.m16n8k16", ~0u, &data, finish_product, where);
}

}  // namespace gencore_emulation
