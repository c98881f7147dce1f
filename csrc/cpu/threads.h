// A pool of worker threads for short parallel loops.
//
// Purpose: a decode step makes some hundreds of calls of a few microseconds to a few hundred
// each, so forking and joining has to cost about a microsecond. Workers spin for a short
// while after a job and only then sleep.
//
// A loop of `items` is cut into chunks of `grain`; threads claim chunks one by one, so a core
// that is busy elsewhere (or slow) takes fewer. Which thread runs a chunk never changes a
// result: chunks write disjoint memory.
//
// Calls from several threads are safe and run one after the other. Tasks must not throw and
// must not call parallel() themselves.
#pragma once

#include <cstdint>

namespace exl {

// Runs items [first, end). `thread` is 0 for the caller and below num_threads() for all.
using Task = void (*)(void* context, int64_t first, int64_t end, int thread);

void parallel(int64_t items, int64_t grain, Task task, void* context);

// Threads that a loop may use, the caller included; the size of per-thread scratch.
int num_threads();

// Grain that gives every thread a few chunks, so that a slow core delays the end by one
// chunk and no more; never below `least`, the items that are worth a claim.
int64_t balanced_grain(int64_t items, int64_t least);

// The same for any callable f(first, end, thread).
template <class Function>
inline void parallel_for(int64_t items, int64_t grain, const Function& function) {
    parallel(
        items, grain,
        [](void* context, int64_t first, int64_t end, int thread) {
            (*static_cast<const Function*>(context))(first, end, thread);
        },
        const_cast<Function*>(&function));
}

}  // namespace exl
