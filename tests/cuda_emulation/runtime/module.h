// What the shared object says about itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace gencore_emulation {

struct Region {
  std::uintptr_t begin, end;
  std::string name;
  bool contains(std::uintptr_t address, std::size_t bytes) const {
    return address >= begin && address + bytes <= end && address + bytes >= address;
  }
};

// Its variables, which are the static shared memory, by address; and its segments that nobody may write.
const std::vector<Region>& module_variables();
const std::vector<Region>& module_constants();

std::string demangled(const std::string& symbol);
std::string function_name(const void* function);

// "file:line" of code in the module, or of the kernel's code that it was inlined into; empty if nobody knows.
std::string source_line(const void* code);

// What cudaGetErrorString says from now on of this error.
void remember_error(int error, std::string message);

}  // namespace gencore_emulation
