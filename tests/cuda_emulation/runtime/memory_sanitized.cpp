// The checks of memory for the build with AddressSanitizer, which sees the kernels' own accesses. What the runtime does
// for a kernel (atomics, copies, matrices) is checked here.
#include <sanitizer/asan_interface.h>

#include <cstdlib>

#include "memory.h"
#include "state.h"

namespace gencore_emulation {

void access(const void* address, std::size_t bytes, Access, const void* code) {
  if (bytes != 0 && __asan_region_is_poisoned(const_cast<void*>(address), bytes) != nullptr) {
    fault(cudaErrorIllegalAddress, format("out of bounds: %zu bytes at %p", bytes, address), code);
  }
}

void aligned_access(const void* address, std::size_t bytes, Access kind, const void* code) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) {
    fault(cudaErrorMisalignedAddress, format("misaligned: %zu bytes at %p", bytes, address), code);
  }
  access(address, bytes, kind, code);
}

void require_global(const void* address, std::size_t bytes, Access, const void* code) {
  const Emulator& e = emulator();
  const auto is_in = [&](const char* begin, std::size_t size) {
    const auto offset = reinterpret_cast<std::uintptr_t>(address) - reinterpret_cast<std::uintptr_t>(begin);
    return offset < size;
  };
  if (is_in(e.shared, e.shared_bytes) || is_in(e.stacks, most_threads * stack_bytes)) {
    fault(cudaErrorIllegalAddress, format("not global memory: %zu bytes at %p", bytes, address), code);
  }
}

void end_copy(void* shared, std::size_t bytes, const void* code) { access(shared, bytes, Access::write, code); }

bool is_shared(const void*, std::size_t) { return true; }

void begin_launch(std::size_t shared_bytes) {
  Emulator& e = emulator();
  e.shared = static_cast<char*>(std::aligned_alloc(16, shared_bytes));
  e.shared_bytes = shared_bytes;
}

void begin_block() {}

void end_launch() { std::free(emulator().shared); }

void register_memory(const void*, std::size_t, const char*) {}
void clear_memory() {}
bool is_registered(const void*, std::size_t) { return true; }

}  // namespace gencore_emulation
