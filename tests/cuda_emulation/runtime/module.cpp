#include "module.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>

namespace gencore_emulation {
namespace {

struct Module {
  std::string path;
  std::uintptr_t base = 0;
  std::vector<Region> variables, constants, functions;
};

bool is_in(const std::vector<Region>& regions, std::uintptr_t address) {
  return std::any_of(regions.begin(), regions.end(), [&](const Region& region) { return region.contains(address, 1); });
}

// The symbol table is in no segment, so it is read from the file. Names stay as the compiler made them: to demangle
// thousands, of which one is shown, takes long.
void read_symbols(Module& module) {
  std::ifstream file(module.path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  if (bytes.size() < sizeof(ElfW(Ehdr))) return;
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(bytes.data());
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(bytes.data() + header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const char* const names = bytes.data() + sections[sections[i].sh_link].sh_offset;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(bytes.data() + sections[i].sh_offset);
    for (std::size_t j = 0; j < sections[i].sh_size / sizeof(ElfW(Sym)); ++j) {
      const ElfW(Sym) & symbol = symbols[j];
      const std::uintptr_t begin = module.base + symbol.st_value;
      const char* const name = names + symbol.st_name;
      const int type = ELF64_ST_TYPE(symbol.st_info);
      if (symbol.st_shndx == SHN_UNDEF || symbol.st_size == 0) continue;
      if (type == STT_FUNC) module.functions.push_back({begin, begin + symbol.st_size, name});
      if (type == STT_OBJECT && !is_in(module.constants, begin) && !std::strstr(name, "gencore_emulation")) {
        module.variables.push_back({begin, begin + symbol.st_size, name});
      }
    }
  }
  const auto by_address = [](const Region& a, const Region& b) { return a.begin < b.begin; };
  std::sort(module.variables.begin(), module.variables.end(), by_address);
}

int read_segments(dl_phdr_info* info, std::size_t, void* data) {
  Module& module = *static_cast<Module*>(data);
  const auto own = reinterpret_cast<std::uintptr_t>(&read_segments);
  const auto begin_of = [&](const ElfW(Phdr) & segment) { return info->dlpi_addr + segment.p_vaddr; };
  const auto is_own = [&](const ElfW(Phdr) & segment) {
    return segment.p_type == PT_LOAD && own >= begin_of(segment) && own < begin_of(segment) + segment.p_memsz;
  };
  if (std::none_of(info->dlpi_phdr, info->dlpi_phdr + info->dlpi_phnum, is_own)) return 0;
  module.base = info->dlpi_addr;
  module.path = info->dlpi_name;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & segment = info->dlpi_phdr[i];
    // The loader writes relocated constants, then takes the right to write away.
    if ((segment.p_type == PT_LOAD && !(segment.p_flags & PF_W)) || segment.p_type == PT_GNU_RELRO) {
      module.constants.push_back({begin_of(segment), begin_of(segment) + segment.p_memsz, "constants"});
    }
  }
  return 1;
}

const Module& own_module() {
  static const Module* const gencore_emulation_module = [] {
    auto* module = new Module;
    dl_iterate_phdr(read_segments, module);
    read_symbols(*module);
    return module;
  }();
  return *gencore_emulation_module;
}

// What a program writes to its standard output; nothing if it cannot be run. Without a shell, to which a path could
// mean something else.
std::string output_of(std::vector<std::string> words) {
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return "";
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
  pid_t process;
  const bool runs = posix_spawnp(&process, arguments[0], &actions, nullptr, arguments.data(), environ) == 0;
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  std::string output;
  char part[4096];
  for (ssize_t n; runs && ((n = read(ends[0], part, sizeof part)) > 0 || (n < 0 && errno == EINTR));) {
    if (n > 0) output.append(part, static_cast<std::size_t>(n));
  }
  close(ends[0]);
  if (runs) {
    while (waitpid(process, nullptr, 0) < 0 && errno == EINTR) {
    }
  }
  return output;
}

}  // namespace

std::string demangled(const std::string& symbol) {
  int status = 0;
  char* const text = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 ? text : symbol;
  std::free(text);
  return result;
}

const std::vector<Region>& module_variables() { return own_module().variables; }
const std::vector<Region>& module_constants() { return own_module().constants; }

std::string function_name(const void* function) {
  for (const Region& region : own_module().functions) {
    if (region.begin != reinterpret_cast<std::uintptr_t>(function)) continue;
    // Templates are shown as "void name<...>(types)"; the name is enough.
    std::string name = demangled(region.name);
    if (name.compare(0, 5, "void ") == 0) name.erase(0, 5);
    int depth = 0;
    for (std::size_t i = name.size(); i-- > 0;) {
      if (name[i] == ')') ++depth;
      if (name[i] == '(' && --depth == 0) return name.substr(0, i);
    }
    return name;
  }
  return "?";
}

std::string source_line(const void* code) {
  const Module& module = own_module();
  // The address is where a call returns to; the call itself is just before. Without debug information, or without
  // addr2line, there is no answer.
  char address[32];
  std::snprintf(address, sizeof address, "0x%zx", reinterpret_cast<std::uintptr_t>(code) - 1 - module.base);
  std::istringstream lines(output_of({"addr2line", "-i", "-e", module.path, address}));
  std::string first;
  for (std::string line; std::getline(lines, line);) {
    std::string text = line.substr(0, line.find_first_of(" ("));
    if (text.compare(0, 2, "??") == 0 || text.find("/emulation/") != std::string::npos) continue;
    if (text.find("/include/c++/") != std::string::npos) continue;
    // What the build put in place of the repository's path.
    if (text.compare(0, 2, "./") == 0) text.erase(0, 2);
    if (first.empty()) first = text;
  }
  return first;
}

}  // namespace gencore_emulation
