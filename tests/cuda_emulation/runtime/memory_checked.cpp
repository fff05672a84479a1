// The checks of memory for the build whose kernels are instrumented: every load and store comes here.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#include "memory.h"
#include "module.h"
#include "state.h"

namespace gencore_emulation {
namespace {

// Who touched a byte, and when. Two accesses of a byte, one of them a write, are a race unless something orders them.
struct Event {
  std::uint32_t interval = 0;
  std::uint32_t thread : 10 = 0;
  std::uint32_t atomic : 1 = 0;
  // Of atomics: others did so in this interval, or in another block of this launch.
  std::uint32_t several : 1 = 0;
  std::uint32_t warps : 1 = 0;  // threads of several warps did
  std::uint32_t blocks : 1 = 0;
  // Of cp.async: not waited for.
  std::uint32_t pending : 1 = 0;
  std::uint32_t clock : 17 = 0;
};

// The last write of a byte and, since then, two of the reads. Two are enough: of any two threads that read in an
// interval, one is not the thread that writes later. Where __syncwarp orders the threads of a warp among themselves,
// the two reads kept are of different warps.
struct Cell {
  Event write;
  Event read[2];
  // The interval in which __ldg last read it. Kept apart: that forbids every write until the launch ends, barriers or
  // not.
  std::uint32_t cached = 0;
};

constexpr std::uintptr_t page_bytes = 4096;
constexpr std::uint32_t most_clock = (1u << 17) - 1;

struct Memory {
  std::vector<Region> buffers;
  std::size_t last_buffer = 0;
  std::unordered_map<std::uintptr_t, Cell*> pages;
  struct {
    std::uintptr_t page = 0;
    Cell* cells = nullptr;
  } recent[256];
};

Memory& memory() {
  static Memory* const instance = new Memory;
  return *instance;
}

Cell* cells_of_page(Memory& m, std::uintptr_t page) {
  auto& recent = m.recent[page % 256];
  if (recent.page == page) return recent.cells;
  Cell*& cells = m.pages[page];
  // Untouched pages of an anonymous mapping are zeros and take no memory.
  if (cells == nullptr) {
    void* const fresh =
        mmap(nullptr, page_bytes * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED) throw std::bad_alloc();
    cells = static_cast<Cell*>(fresh);
  }
  recent = {page, cells};
  return cells;
}

enum class Space { own_stack, shared, global, constant };

constexpr const char* access_names[] = {"read", "write", "atomic access", "cp.async", "__ldg"};

const Region* find(const std::vector<Region>& regions, std::uintptr_t address, std::size_t bytes) {
  auto after = std::upper_bound(regions.begin(), regions.end(), address,
                                [](std::uintptr_t a, const Region& region) { return a < region.begin; });
  if (after == regions.begin()) return nullptr;
  --after;
  return after->contains(address, bytes) ? &*after : nullptr;
}

std::uintptr_t number(const void* address) { return reinterpret_cast<std::uintptr_t>(address); }

Region dynamic_shared(const Emulator& e) {
  return {number(e.shared), number(e.shared) + e.shared_bytes, "the dynamic shared memory"};
}

// Everything that has a name, for messages.
std::vector<Region> named_regions() {
  std::vector<Region> regions = memory().buffers;
  const Emulator& e = emulator();
  if (e.shared_bytes != 0) regions.push_back(dynamic_shared(e));
  regions.push_back({number(e.arguments), number(e.arguments) + e.argument_bytes, "the kernel's parameters"});
  for (const Region& variable : module_variables()) {
    regions.push_back({variable.begin, variable.end, "the static shared memory " + demangled(variable.name)});
  }
  return regions;
}

std::string described(const Region& region) {
  return format("%s (%zu bytes at 0x%zx)", region.name.c_str(), static_cast<std::size_t>(region.end - region.begin),
                static_cast<std::size_t>(region.begin));
}

// Where an address lies in relation to the region nearest to it.
std::string nearest(std::uintptr_t address, std::size_t bytes) {
  const std::vector<Region> regions = named_regions();
  const Region* best = nullptr;
  std::uintptr_t best_distance = 0;
  for (const Region& region : regions) {
    const std::uintptr_t distance = address < region.begin  ? region.begin - address
                                    : address >= region.end ? address - region.end + 1
                                                            : 0;
    if (best == nullptr || distance < best_distance) {
      best = &region;
      best_distance = distance;
    }
  }
  if (best == nullptr) return "no buffer is registered";
  const std::size_t offset = address - best->begin;
  if (best->contains(address, bytes)) return format("%zu bytes into %s", offset, described(*best).c_str());
  if (best->contains(address, 1)) return "across the end of " + described(*best);
  if (address < best->begin) return format("%zu bytes before %s", best->begin - address, described(*best).c_str());
  return format("%zu bytes past the end of %s", address - best->end, described(*best).c_str());
}

[[noreturn]] void memory_fault(const char* what, std::uintptr_t address, std::size_t bytes, Access kind,
                               const void* code, const std::string& more = "",
                               cudaError_t error = cudaErrorIllegalAddress) {
  fault(error,
        format("%s: %s of %zu bytes at 0x%zx, %s%s", what, access_names[static_cast<int>(kind)], bytes,
               static_cast<std::size_t>(address), nearest(address, bytes).c_str(), more.c_str()),
        code);
}

Space space_of(std::uintptr_t address, std::size_t bytes, Access kind, const void* code) {
  const Emulator& e = emulator();
  const Thread& me = *current;
  const std::uintptr_t own_stack = number(me.fiber.stack);
  if (address >= own_stack && address + bytes <= own_stack + me.fiber.stack_bytes) return Space::own_stack;
  Memory& m = memory();
  if (m.last_buffer < m.buffers.size() && m.buffers[m.last_buffer].contains(address, bytes)) return Space::global;
  const std::uintptr_t shared = number(e.shared);
  if (address >= shared && address + bytes <= shared + e.shared_bytes) return Space::shared;
  if (find(module_variables(), address, bytes) != nullptr) return Space::shared;
  for (std::size_t i = 0; i < m.buffers.size(); ++i) {
    if (m.buffers[i].contains(address, bytes)) {
      m.last_buffer = i;
      return Space::global;
    }
  }
  if (kind == Access::read || kind == Access::cached_read) {
    const std::uintptr_t arguments = number(e.arguments);
    if (address >= arguments && address + bytes <= arguments + e.argument_bytes) return Space::constant;
    for (const Region& region : module_constants()) {
      if (region.contains(address, bytes)) return Space::constant;
    }
  }
  const std::uintptr_t stacks = number(e.stacks);
  if (address >= stacks && address < stacks + most_threads * stack_bytes) {
    const std::size_t other = (address - stacks) / stack_bytes;
    if (other == me.number) fault(cudaErrorIllegalAddress, "the stack of the thread is full", code);
    const Thread& thread = e.thread[other];
    fault(cudaErrorIllegalAddress,
          format("another thread's stack: %s of %zu bytes at 0x%zx, which is a local variable of thread (%u, %u, %u)",
                 access_names[static_cast<int>(kind)], bytes, static_cast<std::size_t>(address), thread.index.x,
                 thread.index.y, thread.index.z),
          code);
  }
  memory_fault("out of bounds", address, bytes, kind, code);
}

// One check of all the bytes of an access.
struct Check {
  Emulator& e;
  Thread& me;
  const Warp& warp;
  Event mine;
  bool global;
  Access kind;
  std::uintptr_t address;
  std::size_t bytes;
  const void* code;

  // Whether nothing orders the event before this access.
  bool unordered(const Event& event) const {
    if (event.interval < e.launch_interval) return false;
    if (event.interval < e.block_interval || event.blocks) return global;
    if (event.interval != e.interval) return false;
    // The event is the last of them; whichever warp this is, another one's is among those before.
    if (event.warps) return true;
    if (event.thread == me.number) return event.several && event.clock == mine.clock;
    if (event.thread / warp_threads != me.warp) return true;
    return !warp.has_clocks || event.clock > warp.clock[me.lane][event.thread % warp_threads];
  }

  [[noreturn]] void race(const Event& event, const char* other) const {
    std::string who;
    if (event.blocks) {
      who = std::string("other blocks of this launch ") + other;
    } else if (event.interval >= e.block_interval) {
      const unsigned x = e.block_size.x, y = e.block_size.y, n = event.thread;
      who = format("thread (%u, %u, %u)", n % x, n / x % y, n / x / y) + " of this block " + other;
      if (event.several) who += ", as did others,";
      who += " with no barrier between";
    } else {
      const auto after = std::upper_bound(e.block_intervals.begin(), e.block_intervals.end(), event.interval);
      std::uint64_t block = static_cast<std::uint64_t>(after - e.block_intervals.begin()) - 1;
      if (!e.block_order.empty()) block = e.block_order[block];
      who = format("block (%u, %u, %u) of this launch ", static_cast<unsigned>(block % e.grid.x),
                   static_cast<unsigned>(block / e.grid.x % e.grid.y),
                   static_cast<unsigned>(block / e.grid.x / e.grid.y)) +
            other;
    }
    memory_fault("race", address, bytes, kind, code, "; " + who);
  }

  void record_read(Cell& cell) const {
    Event* const read = cell.read;
    for (int i = 0; i < 2; ++i) {
      if (read[i].interval == mine.interval && read[i].thread == mine.thread) {
        read[i] = mine;
        return;
      }
    }
    for (int i = 0; i < 2; ++i) {
      if (!unordered(read[i])) {
        read[i] = mine;
        return;
      }
    }
    // Both count still. A read of another block conflicts with whoever writes in this one.
    const bool keep_first = read[0].interval < e.block_interval ||
                            (read[1].interval >= e.block_interval && read[0].thread / warp_threads != me.warp);
    read[keep_first ? 1 : 0] = mine;
  }

  void check(Cell& cell) const {
    const Event& write = cell.write;
    if (!global) {
      const bool written = write.interval >= e.block_interval;
      if (written && write.pending) {
        memory_fault("a copy that is still on its way", address, bytes, kind, code,
                     "; a cp.async to there was not waited for");
      }
      if (!written && (kind == Access::read || kind == Access::atomic)) {
        memory_fault("uninitialised shared memory", address, bytes, kind, code,
                     "; nobody has written it in this block so far");
      }
    }
    if (kind == Access::cached_read) {
      if (write.interval >= e.launch_interval) {
        memory_fault("stale", address, bytes, kind, code,
                     "; written in this launch, and the cache that __ldg reads from may not know");
      }
      cell.cached = mine.interval;
    } else if (kind != Access::read && cell.cached >= e.launch_interval) {
      memory_fault("stale", address, bytes, kind, code,
                   "; read by __ldg in this launch, which is for memory that the kernel does not write");
    }
    const bool both_atomic = kind == Access::atomic && write.atomic;
    if (!both_atomic && unordered(write)) race(write, write.atomic ? "accessed it atomically" : "wrote it");
    if (kind == Access::read || kind == Access::cached_read) {
      record_read(cell);
      return;
    }
    for (const Event& read : cell.read) {
      if (unordered(read)) race(read, "read it");
    }
    Event event = mine;
    if (both_atomic && write.interval >= e.launch_interval) {
      event.blocks = write.blocks || write.interval < e.block_interval;
      event.several = write.interval == e.interval && (write.several || write.thread != event.thread);
      event.warps = write.interval == e.interval && (write.warps || write.thread / warp_threads != me.warp);
    }
    cell = {event, {}, cell.cached};
  }
};

}  // namespace

void access(const void* pointer, std::size_t bytes, Access kind, const void* code) {
  Thread& me = *current;
  const std::uintptr_t address = number(pointer);
  Emulator& e = emulator();
  count_step(code);
  if (bytes == 0) return;
  const Space space = space_of(address, bytes, kind, code);
  if (space == Space::own_stack || space == Space::constant) return;
  const Warp& warp = e.warp[me.warp];
  Event mine;
  mine.interval = e.interval;
  mine.thread = me.number & 1023;
  mine.atomic = kind == Access::atomic;
  mine.pending = kind == Access::begin_copy;
  const std::uint32_t clock = warp.has_clocks ? warp.clock[me.lane][me.lane] : 1;
  if (clock > most_clock) {
    fault(cudaErrorLaunchFailure,
          format("the emulator counts no more than %u __syncwarp between barriers", most_clock - 1), code);
  }
  mine.clock = clock & most_clock;
  const Check check{e, me, warp, mine, space == Space::global, kind, address, bytes, code};
  Memory& m = memory();
  for (std::size_t i = 0; i < bytes;) {
    const std::uintptr_t at = address + i, offset = at % page_bytes;
    Cell* const cells = cells_of_page(m, at / page_bytes) + offset;
    const std::size_t n = std::min<std::size_t>(bytes - i, page_bytes - offset);
    for (std::size_t j = 0; j < n; ++j) check.check(cells[j]);
    i += n;
  }
}

void aligned_access(const void* address, std::size_t bytes, Access kind, const void* code) {
  if (number(address) % bytes != 0) {
    memory_fault("misaligned", number(address), bytes, kind, code, "", cudaErrorMisalignedAddress);
  }
  access(address, bytes, kind, code);
}

void require_global(const void* address, std::size_t bytes, Access kind, const void* code) {
  if (space_of(number(address), bytes, kind, code) == Space::global) return;
  fault(cudaErrorIllegalAddress,
        format("not global memory: %s of %zu bytes at %p", access_names[static_cast<int>(kind)], bytes, address), code);
}

void end_copy(void* shared, std::size_t bytes, const void* code) {
  // Nobody touched the bytes since, or there would be a fault; so the write happens now.
  Memory& m = memory();
  for (std::size_t i = 0; i < bytes; ++i) {
    const std::uintptr_t at = number(shared) + i;
    cells_of_page(m, at / page_bytes)[at % page_bytes].write.pending = 0;
  }
  access(shared, bytes, Access::write, code);
}

bool is_shared(const void* pointer, std::size_t bytes) {
  const Emulator& e = emulator();
  const std::uintptr_t address = number(pointer);
  return dynamic_shared(e).contains(address, bytes) || find(module_variables(), address, bytes) != nullptr;
}

void begin_launch(std::size_t shared_bytes) {
  Emulator& e = emulator();
  if (e.shared == nullptr) {
    // At a multiple of 16 and of nothing more: a kernel may not rely on more.
    e.shared = static_cast<char*>(std::aligned_alloc(1024, most_shared_bytes + 1024)) + 16;
  }
  e.shared_bytes = shared_bytes;
  e.launch_interval = ++e.interval;
  e.block_intervals.clear();
}

void begin_block() {
  Emulator& e = emulator();
  e.block_interval = ++e.interval;
  e.block_intervals.push_back(e.interval);
}

void end_launch() {}

void register_memory(const void* address, std::size_t bytes, const char* name) {
  Memory& m = memory();
  const std::string text =
      name == nullptr || *name == 0 ? format("buffer %zu", m.buffers.size()) : format("buffer '%s'", name);
  m.buffers.push_back({number(address), number(address) + bytes, text});
}

void clear_memory() {
  Memory& m = memory();
  m.buffers.clear();
  // What is recorded of earlier launches counts no more, so pages may stay for the next.
  constexpr std::size_t most_pages = 2048;
  if (m.pages.size() < most_pages) return;
  for (const auto& [page, cells] : m.pages) munmap(cells, page_bytes * sizeof(Cell));
  m.pages.clear();
  for (auto& recent : m.recent) recent = {};
}

bool is_registered(const void* address, std::size_t bytes) {
  const std::vector<Region>& buffers = memory().buffers;
  return buffers.empty() || std::any_of(buffers.begin(), buffers.end(),
                                        [&](const Region& buffer) { return buffer.contains(number(address), bytes); });
}

}  // namespace gencore_emulation
