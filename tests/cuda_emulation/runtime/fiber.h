// Contexts of execution that hand control to one another. A thread of a block is one.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace gencore_emulation {

struct Fiber {
  // The stack, for one that has its own; for the context it all began in, what AddressSanitizer says it is.
  const char* stack = nullptr;
  std::size_t stack_bytes = 0;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
};

// The fiber will begin in `entry`, which must never return.
void prepare(Fiber& fiber, char* stack, std::size_t bytes, void (*entry)());

// Goes on with `to`; returns when something switches back to `from`. One that `ends` is never gone on with.
void switch_fiber(Fiber& from, Fiber& to, bool ends = false);

// The first thing a new fiber does.
void begin_fiber(Fiber& fiber, Fiber& began_in);

// Forgets what AddressSanitizer knows of stacks whose fibers were given up halfway.
void forget_stacks(const char* begin, std::size_t bytes);

}  // namespace gencore_emulation
