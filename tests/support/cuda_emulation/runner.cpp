// Runs kernels that were compiled with emulation.h: one launch at a time, in one OS thread.
//
// The lanes of a warp run one after the other until each is parked at a collective. Then the
// collective is executed, and they continue. While a warp waits for the block, the next
// warp runs. Blocks run one after the other.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "emulation.h"
#include "fiber.h"
#include "shared_memory.h"

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace exl_emulation {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 << 10;  // red zones make frames several times larger
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr size_t kGuardBytes = 4096;
constexpr size_t kEntryBytes = 12 << 10;  // of a stack: room for staggering, and for run_thread

enum Order { kForward = 0, kReverse = 1, kShuffled = 2 };
enum class Waits : uint8_t { kWarp, kBlock, kExit };

struct Kernel {
    Invoke invoke;
    std::string signature;
};

// Created when the first kernel registers, before the static objects of this file.
std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

struct Thread {
    Fiber fiber;
    Waits waits;
    Site site;
    void* operand;
    Finish finish;
};

enum class WarpState : uint8_t { kRunnable, kAtBlock, kDone };

struct Launch {
    Invoke invoke;
    void** arguments;
    int num_warps;
    int warp;                // that runs
    int position;            // in `lanes`, of the thread that runs
    uint8_t lanes[kLanes];   // the order of this turn
    WarpState states[kMaxThreads / kLanes];
    int runnable;
    bool failed;
    char message[1024];
};

Fiber main_fiber;
Thread threads[kMaxThreads];
Launch launch;
Order order = kForward;
uint64_t random_state = 1;
uint64_t switches = 0;

// xorshift64*; the same seed gives the same order everywhere.
uint32_t random_below(uint32_t limit) {
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return static_cast<uint32_t>((random_state * 0x2545F4914F6CDD1DULL >> 32) * limit >> 32);
}

template <typename T>
void arrange(T* items, int count) {
    std::iota(items, items + count, T(0));
    if (order == kReverse)
        for (int i = 0; i < count; i++) items[i] = static_cast<T>(count - 1 - i);
    if (order == kShuffled)
        for (int i = count - 1; i > 0; i--) std::swap(items[i], items[random_below(i + 1)]);
}

Thread& running() { return threads[launch.warp * kLanes + launch.lanes[launch.position]]; }

void describe_place(char* text, size_t bytes, const Thread& thread) {
    const char* slash = thread.waits == Waits::kExit ? nullptr : std::strrchr(thread.site.file, '/');
    if (thread.waits == Waits::kExit)
        std::snprintf(text, bytes, "has left the kernel");
    else
        std::snprintf(text, bytes, "waits at %s (%s:%d)", thread.site.operation,
                      slash ? slash + 1 : thread.site.file, thread.site.line);
}

[[noreturn]] void fail_divergent(int one, int other) {
    char first[300], second[300];
    describe_place(first, sizeof first, threads[one]);
    describe_place(second, sizeof second, threads[other]);
    fail("threads diverge: %d %s, %d %s", one, first, other, second);
}

// Within a source equal names are nearly always one string, so that few are compared by letters.
bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool same_place(const Thread& a, const Thread& b) {
    if (a.waits != b.waits) return false;
    if (a.waits == Waits::kExit) return true;
    return a.site.line == b.site.line && same_text(a.site.operation, b.site.operation) &&
           same_text(a.site.file, b.site.file);
}

// All lanes of the warp are parked. They must be at the same source location.
void settle_warp() {
    Thread* lanes = threads + launch.warp * kLanes;
    for (int lane = 1; lane < kLanes; lane++)
        if (!same_place(lanes[0], lanes[lane]))
            fail_divergent(launch.warp * kLanes, launch.warp * kLanes + lane);
    if (lanes[0].waits == Waits::kWarp) {
        void* operands[kLanes];
        for (int lane = 0; lane < kLanes; lane++) operands[lane] = lanes[lane].operand;
        lanes[0].finish(operands);
        return;
    }
    launch.states[launch.warp] =
        lanes[0].waits == Waits::kBlock ? WarpState::kAtBlock : WarpState::kDone;
    launch.runnable--;
}

void release_warps() {
    std::fill_n(launch.states, launch.num_warps, WarpState::kRunnable);
    launch.runnable = launch.num_warps;
    launch.warp = order == kReverse ? launch.num_warps - 1 : 0;
}

// No warp can run: all wait at one barrier, or all have ended. Returns false if they have ended.
bool settle_block() {
    for (int warp = 1; warp < launch.num_warps; warp++)
        if (!same_place(threads[0], threads[warp * kLanes])) fail_divergent(0, warp * kLanes);
    if (launch.states[0] == WarpState::kDone) return false;
    release_warps();
    return true;
}

// Returns the next warp that can run: the current one if it can, except in a shuffled order.
void choose_warp() {
    if (order == kShuffled) {
        launch.warp = static_cast<int>(random_below(launch.num_warps));
        arrange(launch.lanes, kLanes);
    }
    const int step = order == kReverse ? launch.num_warps - 1 : 1;
    while (launch.states[launch.warp] != WarpState::kRunnable)
        launch.warp = (launch.warp + step) % launch.num_warps;
    launch.position = 0;
}

// Lets the next thread of the block run; returns when it is this thread's turn again.
void park(Thread& thread) {
    if (++launch.position == kLanes) {
        launch.position = kLanes - 1;  // still this thread, for messages
        settle_warp();
        if (launch.runnable == 0 && !settle_block()) {
            switch_fiber(thread.fiber, main_fiber);
            __builtin_unreachable();
        }
        choose_warp();
    }
    Thread& next = running();
    threadIdx.x = static_cast<unsigned>(&next - threads);
    if (&next == &thread) return;
    switches++;
    switch_fiber(thread.fiber, next.fiber);
}

void run_thread() {
    entered_fiber();
    launch.invoke(launch.arguments);
    Thread& thread = running();
    if (copies_under_way()) fail("thread %u left with copy_async16 under way", threadIdx.x);
    thread.waits = Waits::kExit;
    park(thread);
    __builtin_unreachable();
}

void make_stacks(int count) {
    for (int i = 0; i < count; i++) {
        Fiber& fiber = threads[i].fiber;
        if (fiber.stack != nullptr) continue;
        void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) std::abort();
        mprotect(memory, kGuardBytes, PROT_NONE);
        fiber.stack = static_cast<char*>(memory) + kGuardBytes;
        fiber.stack_bytes = kStackBytes;
    }
}

void run_block(int block) {
    poison_shared();
    for (int i = 0; i < block; i++) {
        forget_frames(threads[i].fiber, kEntryBytes);
        prepare_fiber(threads[i].fiber, run_thread, i * 320 % 8192 / 64 * 64);
    }
    launch.num_warps = block / kLanes;
    release_warps();
    arrange(launch.lanes, kLanes);
    choose_warp();
    threadIdx.x = static_cast<unsigned>(&running() - threads);
    switch_fiber(main_fiber, running().fiber);
}

}  // namespace

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(launch.message, sizeof launch.message, format, arguments);
    va_end(arguments);
    launch.failed = true;
    switch_fiber(running().fiber, main_fiber);
    __builtin_unreachable();
}

void wait_warp(const Site& site, Finish finish, void* operand) {
    Thread& thread = running();
    thread.waits = Waits::kWarp;
    thread.site = site;
    thread.finish = finish;
    thread.operand = operand;
    park(thread);
}

void wait_block(const Site& site) {
    Thread& thread = running();
    thread.waits = Waits::kBlock;
    thread.site = site;
    park(thread);
}

void add_kernel(const char* name, Invoke invoke, const Argument* arguments, int count) {
    std::string signature;
    for (int i = 0; i < count; i++)
        signature += (i ? " " : "") + std::string(1, arguments[i].kind) +
                     std::to_string(arguments[i].bytes);
    kernels()[name] = {invoke, signature};
}

}  // namespace exl_emulation

extern "C" {

// Runs a kernel to its end. Returns 0, or 1 with the reason in `message`.
int exl_emulated_launch(const char* name, const uint32_t* grid, int block, int bytes,
                        void** arguments, char* message, int message_bytes) {
    using namespace exl_emulation;
    const auto found = kernels().find(name);
    if (found == kernels().end() || !make_shared(bytes)) {
        std::snprintf(message, message_bytes, "no kernel %s, or no memory", name);
        return 1;
    }
    launch.invoke = found->second.invoke;
    launch.arguments = arguments;
    describe_own_stack(main_fiber);
    make_stacks(block);
    if (launch.failed)
        for (Thread& thread : threads)
            if (thread.fiber.stack != nullptr) forget_frames(thread.fiber, kStackBytes);
    launch.failed = false;
    blockDim = {static_cast<unsigned>(block), 1, 1};
    gridDim = {grid[0], grid[1], grid[2]};
    threadIdx = {0, 0, 0};
    std::vector<uint32_t> blocks(static_cast<size_t>(grid[0]) * grid[1] * grid[2]);
    arrange(blocks.data(), static_cast<int>(blocks.size()));
    for (const uint32_t index : blocks) {
        blockIdx = {index % grid[0], index / grid[0] % grid[1], index / grid[0] / grid[1]};
        run_block(block);
        if (!launch.failed && !canary_alive()) {
            launch.failed = true;
            std::snprintf(launch.message, sizeof launch.message,
                          "wrote behind the %d bytes of shared memory", bytes);
        }
        if (launch.failed) {
            std::snprintf(message, message_bytes, "%s, block (%u, %u, %u): %s", name, blockIdx.x,
                          blockIdx.y, blockIdx.z, launch.message);
            return 1;
        }
    }
    return 0;
}

// 0 forward, 1 reverse, 2 shuffled by the seed: blocks, warps and lanes.
void exl_emulated_order(int order, uint64_t seed) {
    exl_emulation::order = static_cast<exl_emulation::Order>(order);
    exl_emulation::random_state = seed * 2 + 1;
}

// Returns the types and sizes of a kernel's arguments, such as "p8 i4 f4 s64"; null if there is no
// such kernel.
const char* exl_emulated_signature(const char* name) {
    const auto found = exl_emulation::kernels().find(name);
    return found == exl_emulation::kernels().end() ? nullptr : found->second.signature.c_str();
}

// Returns the number of switches between threads since the library was opened.
uint64_t exl_emulated_switches() { return exl_emulation::switches; }
}
