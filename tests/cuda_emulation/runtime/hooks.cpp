// What the compiler calls before every load and store of code compiled with -fsanitize=thread, in place of
// ThreadSanitizer's runtime. Code of the host is compiled so too; its accesses are nobody's business.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "memory.h"
#include "state.h"

using gencore_emulation::Access;

// The address of the instrumented code, from within a hook.
#define CALLER __builtin_return_address(0)

extern "C" {

#define GENCORE_HOOKS(n)                                                                                  \
  void __tsan_read##n(void* address) {                                                                    \
    if (gencore_emulation::current) gencore_emulation::aligned_access(address, n, Access::read, CALLER);  \
  }                                                                                                       \
  void __tsan_write##n(void* address) {                                                                   \
    if (gencore_emulation::current) gencore_emulation::aligned_access(address, n, Access::write, CALLER); \
  }                                                                                                       \
  void __tsan_unaligned_read##n(void* address) {                                                          \
    if (gencore_emulation::current) gencore_emulation::access(address, n, Access::read, CALLER);          \
  }                                                                                                       \
  void __tsan_unaligned_write##n(void* address) {                                                         \
    if (gencore_emulation::current) gencore_emulation::access(address, n, Access::write, CALLER);         \
  }
GENCORE_HOOKS(1)
GENCORE_HOOKS(2)
GENCORE_HOOKS(4)
GENCORE_HOOKS(8)
GENCORE_HOOKS(16)

void __tsan_read_range(void* address, std::size_t bytes) {
  if (gencore_emulation::current) gencore_emulation::access(address, bytes, Access::read, CALLER);
}
void __tsan_write_range(void* address, std::size_t bytes) {
  if (gencore_emulation::current) gencore_emulation::access(address, bytes, Access::write, CALLER);
}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

// From -fsanitize=alignment: it looks at the type of what is accessed, even if the compiler takes the access apart.
void __ubsan_handle_type_mismatch_v1(void* data, void* address) {
  if (!gencore_emulation::current) return;
  // The source's file, line and column; the type; the logarithm of the alignment.
  const std::size_t alignment = std::size_t{1} << static_cast<unsigned char*>(data)[sizeof(void*) * 3];
  gencore_emulation::fault(
      cudaErrorMisalignedAddress,
      gencore_emulation::format("misaligned: an access at %p, which is no multiple of %zu", address, alignment),
      CALLER);
}

// The names that the build's prelude gives to the functions of <cstring> in kernels.
void* gencore_emulation_memcpy(void* to, const void* from, std::size_t bytes) {
  if (gencore_emulation::current) {
    gencore_emulation::access(from, bytes, Access::read, CALLER);
    gencore_emulation::access(to, bytes, Access::write, CALLER);
  }
  return std::memcpy(to, from, bytes);
}
void* gencore_emulation_memmove(void* to, const void* from, std::size_t bytes) {
  if (gencore_emulation::current) {
    gencore_emulation::access(from, bytes, Access::read, CALLER);
    gencore_emulation::access(to, bytes, Access::write, CALLER);
  }
  return std::memmove(to, from, bytes);
}
void* gencore_emulation_memset(void* to, int value, std::size_t bytes) {
  if (gencore_emulation::current) gencore_emulation::access(to, bytes, Access::write, CALLER);
  return std::memset(to, value, bytes);
}

// Launchers may have static variables, whose guards are read so. Kernels use CUDA's atomic functions instead.
std::uint8_t __tsan_atomic8_load(const volatile std::uint8_t* address, int) {
  return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}
std::uint32_t __tsan_atomic32_load(const volatile std::uint32_t* address, int) {
  return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}
std::uint64_t __tsan_atomic64_load(const volatile std::uint64_t* address, int) {
  return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}
void __tsan_atomic8_store(volatile std::uint8_t* address, std::uint8_t value, int) {
  __atomic_store_n(address, value, __ATOMIC_SEQ_CST);
}
void __tsan_atomic32_store(volatile std::uint32_t* address, std::uint32_t value, int) {
  __atomic_store_n(address, value, __ATOMIC_SEQ_CST);
}
void __tsan_atomic64_store(volatile std::uint64_t* address, std::uint64_t value, int) {
  __atomic_store_n(address, value, __ATOMIC_SEQ_CST);
}
std::uint32_t __tsan_atomic32_fetch_add(volatile std::uint32_t* address, std::uint32_t value, int) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

}  // extern "C"
