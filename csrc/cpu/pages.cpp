#include "gencore/pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace gencore::cpu {

void request_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t page = std::uintptr_t{1} << 21;
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t first = (address + page - 1) & ~(page - 1);
  const std::uintptr_t last = (address + static_cast<std::uintptr_t>(bytes)) & ~(page - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace gencore::cpu
