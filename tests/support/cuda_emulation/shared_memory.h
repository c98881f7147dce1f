// What runner.cpp asks of shared_memory.cpp, besides what kernels do.
#pragma once

namespace exl_emulation {

constexpr int kMaxThreads = 1024;

// Allocates for a launch; false where there is no memory.
bool make_shared(int bytes);
// Before a block: nothing is known of shared memory, and no copy is under way.
void poison_shared();
// Whether nobody wrote behind the end.
bool canary_alive();
// Whether the running thread started copies that it never waited for.
bool copies_under_way();

}  // namespace exl_emulation
