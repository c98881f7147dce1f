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
#include <limits>

namespace exl {

constexpr int64_t kAnyThreads = std::numeric_limits<int64_t>::max();

// Runs items [first, end). `thread` is 0 for the caller and below `most_threads` for all.
using Task = void (*)(void* context, int64_t first, int64_t end, int thread);

// Loops with per-thread scratch pass the threads that it has room for: another model that is
// loaded meanwhile may have asked for more.
void parallel(int64_t items, int64_t grain, Task task, void* context,
              int64_t most_threads = kAnyThreads);

// Threads that a loop may use now, the caller included.
int num_threads();

// Grain that gives every thread a few chunks, so that a slow core delays the end by one
// chunk and no more; never below `least`, the items that are worth a claim.
int64_t balanced_grain(int64_t items, int64_t least);

// The same for any callable f(first, end, thread).
template <class Function>
inline void parallel_for(int64_t items, int64_t grain, const Function& function,
                         int64_t most_threads = kAnyThreads) {
    parallel(
        items, grain,
        [](void* context, int64_t first, int64_t end, int thread) {
            (*static_cast<const Function*>(context))(first, end, thread);
        },
        const_cast<Function*>(&function), most_threads);
}

}  // namespace exl
