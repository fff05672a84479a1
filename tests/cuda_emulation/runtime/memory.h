// Which memory a kernel may touch, who wrote it, and who reads it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gencore_emulation {

enum class Access {
  read,
  write,
  atomic,
  // A cp.async begins to write; the bytes may not be touched before it is waited for.
  begin_copy,
  // By __ldg: nobody may write there in the whole launch.
  cached_read,
};

// Checks and records an access of the current thread. A fault ends the launch. `code` is where the access is.
void access(const void* address, std::size_t bytes, Access kind, const void* code);

// As access, but the address must be a multiple of `bytes`, as a vector access of the device wants.
void aligned_access(const void* address, std::size_t bytes, Access kind, const void* code);

// For instructions that know global memory only; a fault if the bytes are anywhere else.
void require_global(const void* address, std::size_t bytes, Access kind, const void* code);

// The bytes of a cp.async have arrived.
void end_copy(void* shared, std::size_t bytes, const void* code);

bool is_shared(const void* address, std::size_t bytes);

void begin_launch(std::size_t shared_bytes);
void begin_block();
void end_launch();

void register_memory(const void* address, std::size_t bytes, const char* name);
void clear_memory();
// Whether the host may touch what it calls device memory; everything, if nothing is registered.
bool is_registered(const void* address, std::size_t bytes);

}  // namespace gencore_emulation
