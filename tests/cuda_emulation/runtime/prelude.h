// Included before everything else in files with kernels: what they copy by <cstring> goes through the hooks. Without
// this, the compiler's instrumentation would not see it.
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
void* memcpy(void*, const void*, size_t) noexcept __asm__("gencore_emulation_memcpy");
void* memmove(void*, const void*, size_t) noexcept __asm__("gencore_emulation_memmove");
void* memset(void*, int, size_t) noexcept __asm__("gencore_emulation_memset");
}
#endif
