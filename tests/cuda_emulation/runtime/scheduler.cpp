// Runs the blocks of a launch one after another, and the threads of a block as fibers.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <numeric>

#include "memory.h"
#include "module.h"
#include "state.h"

// What kernels know as threadIdx and so on.
extern "C" {
uint3 gencore_emulation_thread_index, gencore_emulation_block_index, gencore_emulation_block_size,
    gencore_emulation_grid_size;
}

namespace gencore_emulation {

thread_local Thread* current __attribute__((tls_model("initial-exec"))) = nullptr;

Emulator& emulator() {
  static Emulator* const instance = new Emulator;
  return *instance;
}

void* dynamic_shared_memory() { return emulator().shared; }

std::string format(const char* text, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, text);
  std::vsnprintf(buffer, sizeof buffer, text, arguments);
  va_end(arguments);
  return buffer;
}

namespace {

bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() && a.file_name() == b.file_name();
}

std::string place(const Where& where) { return format("%s:%u", where.file_name(), unsigned(where.line())); }

std::string name(uint3 index) { return format("(%u, %u, %u)", index.x, index.y, index.z); }

void make_ready(Emulator& e, Thread& thread) {
  thread.state = ThreadState::ready;
  e.ready[(e.ready_first + e.ready_count++) % most_threads] = static_cast<std::uint16_t>(thread.number);
}

Thread& take_ready(Emulator& e) {
  std::uint16_t& first = e.ready[e.ready_first];
  if (e.schedule != 0) std::swap(first, e.ready[(e.ready_first + e.random() % e.ready_count) % most_threads]);
  e.ready_first = (e.ready_first + 1) % most_threads;
  --e.ready_count;
  return e.thread[first];
}

[[noreturn]] void leave_with(Fault&& found) {
  Emulator& e = emulator();
  Thread& me = *current;
  found.thread = me.index;
  e.fault = std::move(found);
  current = nullptr;
  switch_fiber(me.fiber, e.host, true);
  std::abort();  // nobody goes on with this fiber
}

// What the threads that have not ended wait for.
std::string waiting(const Emulator& e) {
  std::string text;
  int told = 0;
  for (unsigned i = 0; i < e.threads; ++i) {
    const Thread& thread = e.thread[i];
    if (thread.state != ThreadState::at_barrier && thread.state != ThreadState::at_collective) continue;
    if (++told > 4) return text + ", ...";
    text += (text.empty() ? "thread " : ", thread ") + name(thread.index) + " waits at ";
    if (thread.state == ThreadState::at_barrier) {
      text += e.barrier.function + (" (" + place(e.barrier.where) + ")");
      continue;
    }
    for (const Meeting& meeting : e.warp[thread.warp].meetings) {
      if (meeting.arrived >> thread.lane & 1) {
        text += format("%s (%s) with mask 0x%08x", meeting.function, place(meeting.where).c_str(), meeting.mask);
      }
    }
  }
  return text;
}

void set_current(Thread& thread) {
  current = &thread;
  gencore_emulation_thread_index = thread.index;
}

// Goes on with another thread. This one has been put to where it will be found, or `ends`.
void run_next(Thread& me, bool ends) {
  Emulator& e = emulator();
  if (e.ready_count != 0) {
    Thread& next = take_ready(e);
    if (&next == &me) return;
    set_current(next);
    switch_fiber(me.fiber, next.fiber, ends);
    return;
  }
  if (e.ended != e.threads) {
    leave_with({cudaErrorLaunchFailure, "no progress, every thread waits for another: " + waiting(e), "", nullptr, {}});
  }
  current = nullptr;
  switch_fiber(me.fiber, e.host, ends);
}

// A meeting of the warp that needs this lane, which now does something else.
const Meeting* missed_meeting(const Warp& warp, unsigned lane) {
  for (const Meeting& meeting : warp.meetings) {
    if (meeting.mask >> lane & 1) return &meeting;
  }
  return nullptr;
}

void check_nobody_waits(Emulator& e, Thread& me, const char* doing, const Where* where) {
  const Meeting* const meeting = missed_meeting(e.warp[me.warp], me.lane);
  if (meeting == nullptr) return;
  std::string what = format("a lane is missing: lane %u %s, and other lanes wait for it at %s (%s) with mask 0x%08x",
                            me.lane, doing, meeting->function, place(meeting->where).c_str(), meeting->mask);
  leave_with({cudaErrorLaunchFailure, what, place(where == nullptr ? meeting->where : *where), nullptr, {}});
}

void thread_main() {
  Emulator& e = emulator();
  Thread& me = *current;
  begin_fiber(me.fiber, e.host);
  e.run_thread(e.arguments);
  check_nobody_waits(e, me, "has returned", nullptr);
  if (e.barrier.arrived != 0) {
    fault(cudaErrorLaunchFailure,
          format("%s is not reached by all threads of the block: this thread has returned, and %u wait",
                 e.barrier.function, e.barrier.arrived),
          e.barrier.where);
  }
  me.state = ThreadState::ended;
  ++e.ended;
  e.steps = 0;
  e.warp[me.warp].ended |= 1u << me.lane;
  run_next(me, true);
  std::abort();
}

void run_block(Emulator& e) {
  e.barrier = {};
  e.ended = e.ready_first = e.ready_count = 0;
  e.steps = 0;
  e.warps = (e.threads + warp_threads - 1) / warp_threads;
  for (unsigned i = 0; i < e.warps; ++i) {
    Warp& warp = e.warp[i];
    const unsigned lanes = std::min(e.threads - i * warp_threads, warp_threads);
    warp.lanes = lanes == warp_threads ? ~0u : (1u << lanes) - 1;
    warp.ended = warp.at_barrier = 0;
    warp.meetings.clear();
    warp.has_clocks = false;
  }
  for (unsigned i = 0; i < e.threads; ++i) {
    Thread& thread = e.thread[i];
    thread.number = i;
    thread.warp = i / warp_threads;
    thread.lane = i % warp_threads;
    thread.index = {i % e.block_size.x, i / e.block_size.x % e.block_size.y, i / e.block_size.x / e.block_size.y};
    thread.copies.clear();
    thread.copy_groups = 0;
    // The lowest page of each stack stays without access.
    prepare(thread.fiber, e.stacks + i * stack_bytes + 4096, stack_bytes - 4096, thread_main);
    make_ready(e, thread);
  }
  gencore_emulation_block_index = e.block;
  set_current(take_ready(e));
  switch_fiber(e.host, current->fiber);
}

void make_stacks(Emulator& e) {
  if (e.stacks != nullptr) return;
  // Pages that no thread touches take no memory.
  void* const stacks = mmap(nullptr, most_threads * stack_bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) throw std::bad_alloc();
  e.stacks = static_cast<char*>(stacks);
  for (unsigned i = 0; i < most_threads; ++i) mprotect(e.stacks + i * stack_bytes, 4096, PROT_NONE);
}

cudaError_t check_configuration(const Emulator& e, const cudaLaunchConfig_t& config) {
  const uint3 grid = config.gridDim, block = config.blockDim;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  if (block.x > 1024 || block.y > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  if (block.x * block.y * block.z > most_threads) return cudaErrorInvalidConfiguration;
  if (config.numAttrs != 0) return cudaErrorNotSupported;
  const auto limit = e.shared_limits.find(e.kernel);
  const std::size_t most_bytes = limit == e.shared_limits.end() ? usual_shared_bytes : limit->second;
  return config.dynamicSmemBytes > most_bytes ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

void fault(cudaError_t error, std::string what, const void* code) {
  leave_with({error, std::move(what), "", code, {}});
}

void fault(cudaError_t error, std::string what, const Where& where) {
  leave_with({error, std::move(what), place(where), nullptr, {}});
}

void count_step(const void* code) {
  if (++emulator().steps < 10'000'000) return;
  fault(cudaErrorLaunchFailure, "no progress: 10 million accesses, and no thread came to a barrier or its end", code);
}

void yield() {
  make_ready(emulator(), *current);
  run_next(*current, false);
}

int barrier(BarrierKind kind, int predicate, Where where) {
  Emulator& e = emulator();
  Thread& me = *current;
  Barrier& barrier = e.barrier;
  constexpr const char* names[] = {"__syncthreads", "__syncthreads_count", "__syncthreads_and", "__syncthreads_or"};
  const char* const function = names[static_cast<int>(kind)];
  e.steps = 0;
  if (e.ended != 0) {
    fault(cudaErrorLaunchFailure,
          format("%s is not reached by all threads of the block: %u have returned", function, e.ended), where);
  }
  check_nobody_waits(e, me, format("waits at %s", function).c_str(), &where);
  if (barrier.arrived == 0) {
    barrier.function = function;
    barrier.where = where;
    barrier.count = barrier.any = 0;
    barrier.all = 1;
  } else if (barrier.function != function || !same(barrier.where, where)) {
    fault(cudaErrorLaunchFailure,
          format("a barrier in divergent code: this thread waits at %s (%s), but %u threads wait at %s (%s)", function,
                 place(where).c_str(), barrier.arrived, barrier.function, place(barrier.where).c_str()),
          where);
  }
  barrier.count += predicate != 0;
  barrier.all &= predicate != 0;
  barrier.any |= predicate != 0;
  if (++barrier.arrived == e.threads) {
    barrier.result_count = barrier.count;
    barrier.result_all = barrier.all;
    barrier.result_any = barrier.any;
    barrier.arrived = 0;
    ++e.interval;
    for (unsigned i = 0; i < e.warps; ++i) {
      e.warp[i].at_barrier = 0;
      e.warp[i].has_clocks = false;
    }
    for (unsigned i = 0; i < e.threads; ++i) {
      if (i != me.number) make_ready(e, e.thread[i]);
    }
  } else {
    me.state = ThreadState::at_barrier;
    e.warp[me.warp].at_barrier |= 1u << me.lane;
    run_next(me, false);
  }
  // No barrier can be passed after this one before every thread has come here.
  if (kind == BarrierKind::count) return barrier.result_count;
  if (kind == BarrierKind::all) return barrier.result_all;
  return kind == BarrierKind::any ? barrier.result_any : 0;
}

void meet(const char* function, unsigned mask, void* data, void (*finish)(unsigned mask, void* const* data),
          const Where& where, bool anywhere) {
  Emulator& e = emulator();
  Thread& me = *current;
  Warp& warp = e.warp[me.warp];
  e.steps = 0;
  if ((mask >> me.lane & 1) == 0) {
    fault(cudaErrorLaunchFailure, format("%s: mask 0x%08x lacks the caller, lane %u", function, mask, me.lane), where);
  }
  for (unsigned i = 0; i < warp.meetings.size(); ++i) {
    Meeting& meeting = warp.meetings[i];
    if (meeting.function == function && meeting.mask == mask && (anywhere || same(meeting.where, where))) {
      meeting.data[me.lane] = data;
      meeting.arrived |= 1u << me.lane;
      if (meeting.arrived != mask) {
        me.state = ThreadState::at_collective;
        run_next(me, false);
        return;
      }
      finish(mask, meeting.data);
      warp.meetings.erase(warp.meetings.begin() + i);
      for (unsigned lane = 0; lane < warp_threads; ++lane) {
        if (lane != me.lane && (mask >> lane & 1)) make_ready(e, e.thread[me.warp * warp_threads + lane]);
      }
      return;
    }
    if ((meeting.mask >> me.lane & 1) && (meeting.arrived & mask)) {
      fault(cudaErrorLaunchFailure,
            format("lanes of a warp are at different collectives: lane %u at %s (%s) with mask 0x%08x, others at %s "
                   "(%s) with mask 0x%08x",
                   me.lane, function, place(where).c_str(), mask, meeting.function, place(meeting.where).c_str(),
                   meeting.mask),
            where);
    }
  }
  if (const unsigned missing = mask & (~warp.lanes | warp.ended | warp.at_barrier)) {
    const bool waits = missing & warp.at_barrier;
    const unsigned lane = static_cast<unsigned>(__builtin_ctz(waits ? missing & warp.at_barrier : missing));
    fault(cudaErrorLaunchFailure,
          format("a lane is missing: %s with mask 0x%08x, but lane %u %s", function, mask, lane,
                 waits                    ? "waits at __syncthreads"
                 : warp.lanes >> lane & 1 ? "has returned"
                                          : "does not exist"),
          where);
  }
  Meeting meeting{function, mask, 1u << me.lane, where, {}};
  meeting.data[me.lane] = data;
  if (meeting.arrived == mask) {
    finish(mask, meeting.data);
    return;
  }
  warp.meetings.push_back(meeting);
  me.state = ThreadState::at_collective;
  run_next(me, false);
}

unsigned active_mask(Where where) {
  fault(cudaErrorLaunchFailure, "__activemask: the lanes that are active are not defined by the program; pass a mask",
        where);
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*thread)(const void* arguments),
                   const void* arguments, std::size_t argument_bytes) {
  Emulator& e = emulator();
  const std::lock_guard lock(e.mutex);
  e.kernel = kernel;
  if (const cudaError_t error = check_configuration(e, config); error != cudaSuccess) return e.last_error = error;
  make_stacks(e);
  e.run_thread = thread;
  e.arguments = arguments;
  e.argument_bytes = argument_bytes;
  e.grid = config.gridDim;
  e.block_size = config.blockDim;
  e.threads = e.block_size.x * e.block_size.y * e.block_size.z;
  gencore_emulation_grid_size = e.grid;
  gencore_emulation_block_size = e.block_size;
  e.fault.reset();
  e.random.seed(e.schedule);
  e.host = {};
  begin_launch(config.dynamicSmemBytes);

  const auto blocks = static_cast<std::int64_t>(std::uint64_t{e.grid.x} * e.grid.y * e.grid.z);
  std::int64_t first = 0, end = blocks;
  if (e.block_count != 0) {
    first = std::clamp<std::int64_t>(e.first_block < 0 ? blocks + e.first_block : e.first_block, 0, blocks);
    end = std::min(first + e.block_count, blocks);
  }
  e.block_order.clear();
  if (e.schedule != 0) {
    e.block_order.resize(static_cast<std::size_t>(end - first));
    std::iota(e.block_order.begin(), e.block_order.end(), static_cast<std::uint64_t>(first));
    std::shuffle(e.block_order.begin(), e.block_order.end(), e.random);
  }
  for (std::int64_t i = first; i < end && !e.fault; ++i) {
    const auto block =
        e.block_order.empty() ? static_cast<std::uint64_t>(i) : e.block_order[static_cast<std::size_t>(i - first)];
    e.block = {static_cast<unsigned>(block % e.grid.x), static_cast<unsigned>(block / e.grid.x % e.grid.y),
               static_cast<unsigned>(block / e.grid.x / e.grid.y)};
    begin_block();
    run_block(e);
  }
  end_launch();
  if (!e.fault) return cudaSuccess;
  forget_stacks(e.stacks, e.threads * stack_bytes);
  const Fault& found = *e.fault;
  const std::string source = found.code != nullptr ? source_line(found.code) : found.place;
  remember_error(found.error, "kernel " + function_name(kernel) + ", block " + name(e.block) + ", thread " +
                                  name(found.thread) + ": " + found.what + (source.empty() ? "" : " [" + source + "]"));
  return e.last_error = found.error;
}

}  // namespace gencore_emulation
