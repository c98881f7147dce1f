// Changing from one stack to another: a few instructions on x86-64 and aarch64, ucontext
// elsewhere. Sanitizers are notified of every change.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#endif

#if defined(__x86_64__) && !defined(EXL_FIBER_UCONTEXT)
#define EXL_FIBER_X86_64 1
#elif defined(__aarch64__) && !defined(EXL_FIBER_UCONTEXT)
#define EXL_FIBER_AARCH64 1
#else
#include <ucontext.h>
#endif

namespace exl_emulation {

struct Fiber {
#if defined(EXL_FIBER_X86_64) || defined(EXL_FIBER_AARCH64)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    char* stack = nullptr;  // lowest address
    size_t stack_bytes = 0;
    void* shadow = nullptr;  // AddressSanitizer's fake stack while the fiber is parked
};

#if defined(EXL_FIBER_X86_64)
// Callee-saved registers of the System V ABI; mxcsr and the x87 control word are never changed.
asm(R"(
    .text
    .p2align 4
    .local exl_fiber_swap
    .type exl_fiber_swap, @function
exl_fiber_swap:
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
    .size exl_fiber_swap, .-exl_fiber_swap
)");
#elif defined(EXL_FIBER_AARCH64)
asm(R"(
    .text
    .p2align 4
    .local exl_fiber_swap
    .type exl_fiber_swap, %function
exl_fiber_swap:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size exl_fiber_swap, .-exl_fiber_swap
)");
#endif
#if defined(EXL_FIBER_X86_64) || defined(EXL_FIBER_AARCH64)
extern "C" void exl_fiber_swap(void** save, void* load) asm("exl_fiber_swap");
#endif

// Notifies sanitizers of the OS thread's own stack, before the first switch.
inline void describe_own_stack([[maybe_unused]] Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    pthread_attr_t attributes;
    void* lowest;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &lowest, &fiber.stack_bytes);
    pthread_attr_destroy(&attributes);
    fiber.stack = static_cast<char*>(lowest);
#endif
}

// Clears the sanitizers' state of frames that did not return: a fiber's first functions, which end
// by a switch, and all frames after a failure.
inline void forget_frames([[maybe_unused]] Fiber& fiber, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack + fiber.stack_bytes - bytes, bytes);
#endif
}

// Makes the next switch to `fiber` call `entry`, which must not return. `offset`, below the
// stack's top, keeps the hot lines of many stacks out of one set of the cache.
inline void prepare_fiber(Fiber& fiber, void (*entry)(), size_t offset) {
#if defined(EXL_FIBER_X86_64)
    auto** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes - offset - 64);
    // Six registers, the target of `ret`, and the null return address that ends a backtrace.
    for (int i = 0; i < 8; i++) top[i] = nullptr;
    top[6] = reinterpret_cast<void*>(entry);
    fiber.stack_pointer = top;
#elif defined(EXL_FIBER_AARCH64)
    auto** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes - offset - 160);
    for (int i = 0; i < 20; i++) top[i] = nullptr;
    top[11] = reinterpret_cast<void*>(entry);
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = fiber.stack_bytes - offset;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
#endif
}

// `entry` calls this first.
inline void entered_fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

// Parks `from` and runs `to`. Returns when another fiber switches back to `from`.
inline void switch_fiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.shadow, to.stack, to.stack_bytes);
#endif
#if defined(EXL_FIBER_X86_64) || defined(EXL_FIBER_AARCH64)
    exl_fiber_swap(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.shadow, nullptr, nullptr);
#endif
}

}  // namespace exl_emulation
