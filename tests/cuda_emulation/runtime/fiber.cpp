#include "fiber.h"

#include <cstdint>

#ifdef GENCORE_EMULATION_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace gencore_emulation {

#if defined(__x86_64__)

// swapcontext saves the signal mask with a system call, which costs more than all the rest of the emulator. A function
// call may change all registers but these six and the stack pointer.
extern "C" void gencore_emulation_switch(void** save, void* load);
asm(R"(
  .text
  .hidden gencore_emulation_switch
  .globl gencore_emulation_switch
  .type gencore_emulation_switch, @function
gencore_emulation_switch:
  .cfi_startproc
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .cfi_endproc
  .size gencore_emulation_switch, . - gencore_emulation_switch
)");

namespace {
void change_stack(Fiber& from, Fiber& to) { gencore_emulation_switch(&from.stack_pointer, to.stack_pointer); }
}  // namespace

void prepare(Fiber& fiber, char* stack, std::size_t bytes, void (*entry)()) {
  fiber = {};
  fiber.stack = stack;
  fiber.stack_bytes = bytes;
  // What the switch takes off the stack: six registers and where to return to; then the place of `entry`'s own return
  // address, which puts the stack pointer where the calling convention wants it.
  auto top = reinterpret_cast<void**>((reinterpret_cast<std::uintptr_t>(stack) + bytes) & ~std::uintptr_t{15});
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  fiber.stack_pointer = top - 8;
}

#else

namespace {
void change_stack(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
}  // namespace

void prepare(Fiber& fiber, char* stack, std::size_t bytes, void (*entry)()) {
  fiber.stack = stack;
  fiber.stack_bytes = bytes;
  fiber.fake_stack = nullptr;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

#endif

#ifdef GENCORE_EMULATION_ADDRESS_SANITIZER

void switch_fiber(Fiber& from, Fiber& to, bool ends) {
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
  change_stack(from, to);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

void begin_fiber(Fiber& fiber, Fiber& began_in) {
  const void* stack = nullptr;
  std::size_t bytes = 0;
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &stack, &bytes);
  // The first fiber of all comes from the context it began in, and so learns where that one's stack is.
  if (began_in.stack == nullptr) {
    began_in.stack = static_cast<const char*>(stack);
    began_in.stack_bytes = bytes;
  }
}

void forget_stacks(const char* begin, std::size_t bytes) { __asan_unpoison_memory_region(begin, bytes); }

#else

void switch_fiber(Fiber& from, Fiber& to, bool) { change_stack(from, to); }
void begin_fiber(Fiber&, Fiber&) {}
void forget_stacks(const char*, std::size_t) {}

#endif

}  // namespace gencore_emulation
