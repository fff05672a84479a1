// Memory for large results.
#pragma once

#include <cstdint>

namespace gencore::cpu {

// Asks the system to back memory that is not yet in use with huge pages, where it grants them on request. A result of
// many megabytes is otherwise handed out in pages of 4 KB, which takes several times as long as computing it. It is a
// request: nothing fails, and memory that is in use stays as it is.
void request_huge_pages(void* memory, std::int64_t bytes);

}  // namespace gencore::cpu
