// What the parts of the emulator's runtime share: the launch that runs, its block, the block's threads.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_runtime_api.h"
#include "emulation/interface.h"
#include "fiber.h"

namespace gencore_emulation {

constexpr unsigned warp_threads = 32, most_threads = 1024;
constexpr std::size_t stack_bytes = 256 * 1024, most_shared_bytes = 232448, usual_shared_bytes = 48 * 1024;

enum class ThreadState { ready, at_barrier, at_collective, ended };

struct AsyncCopy {
  void* shared;
  const void* global;
  bool valid;
  int group;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  unsigned number, warp, lane;
  ThreadState state;
  std::vector<AsyncCopy> copies;
  int copy_groups;
};

// Lanes of a warp that have come to the same collective function and wait for the rest of its mask.
struct Meeting {
  const char* function;
  unsigned mask, arrived;
  Where where;
  void* data[warp_threads];
};

struct Warp {
  // As bit masks.
  unsigned lanes, ended, at_barrier;
  std::vector<Meeting> meetings;
  // Which accesses of lane m lane l may rely on, because of __syncwarp: those that happened at clock[l][m] or before.
  // Accesses of m happen at clock[m][m].
  bool has_clocks;
  std::uint32_t clock[warp_threads][warp_threads];
};

struct Barrier {
  unsigned arrived;
  const char* function;
  Where where;
  int count, all, any;
  // Of the last one that was passed.
  int result_count, result_all, result_any;
};

struct Fault {
  cudaError_t error;
  std::string what, place;
  const void* code;
  uint3 thread;
};

struct Emulator {
  std::mutex mutex;  // one launch at a time
  unsigned schedule = 0;
  int multiprocessors = 4;
  // What a block may ask for.
  std::size_t shared_limit = most_shared_bytes;
  // The blocks of a launch that run: so many from `first_block` on, which counts from the end if it is negative; 0:
  // all.
  std::int64_t first_block = 0, block_count = 0;
  std::mt19937_64 random;
  std::unordered_map<const void*, std::size_t> shared_limits;
  cudaError_t last_error = cudaSuccess;

  // The launch.
  const void* kernel;
  void (*run_thread)(const void* arguments);
  const void* arguments;
  std::size_t argument_bytes;
  uint3 grid, block_size;
  unsigned threads, warps;
  std::optional<Fault> fault;

  // The block.
  uint3 block;
  Fiber host;
  char* stacks = nullptr;
  Thread thread[most_threads];
  Warp warp[most_threads / warp_threads];
  Barrier barrier;
  unsigned ended;
  // Accesses since a thread of the block last came to a barrier, a collective or its end.
  std::uint64_t steps;
  // Threads that can run, as a ring.
  std::uint16_t ready[most_threads];
  unsigned ready_first, ready_count;

  // Time for the checks of memory: the part of the block between two barriers. No two launches, blocks or parts have
  // the same number.
  std::uint32_t interval = 1, block_interval, launch_interval;
  std::vector<std::uint32_t> block_intervals;
  std::vector<std::uint64_t> block_order;

  char* shared = nullptr;
  std::size_t shared_bytes;
};

// Made at the first use and never destroyed: the module's writable data belong to the blocks.
Emulator& emulator();

// The thread that runs on this thread of the operating system; null outside of kernels.
extern thread_local Thread* current __attribute__((tls_model("initial-exec")));

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));

// Ends the launch. `code` is an address in the kernel, or `where` says the place.
[[noreturn]] void fault(cudaError_t error, std::string what, const void* code);
[[noreturn]] void fault(cudaError_t error, std::string what, const Where& where);

// Waits until all lanes of `mask` are here. The last one calls finish(mask, data of each lane) before any goes on.
// Unless they may be `anywhere`, they must come to the same place in the source.
void meet(const char* function, unsigned mask, void* data, void (*finish)(unsigned mask, void* const* data),
          const Where& where, bool anywhere = false);

// A fault if too many steps led to nothing.
void count_step(const void* code);

// Lets other threads of the block run.
void yield();

}  // namespace gencore_emulation
