// Interface of shared_memory.cpp for runner.cpp.
#pragma once

namespace exl_emulation {

constexpr int kMaxThreads = 1024;

// Allocates for a launch; returns false if there is no memory.
bool make_shared(int bytes);
// Prepares a block: poisons shared memory and drops pending copies.
void poison_shared();
// True if nothing was written beyond the end.
bool canary_alive();
// True if the running thread started copies and did not wait for them.
bool copies_under_way();

}  // namespace exl_emulation
