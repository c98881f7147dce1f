// A pool of worker threads for short parallel loops.
//
// Purpose: a decode step makes hundreds of calls that take from a few to a few hundred
// microseconds each, so a fork and join must cost about a microsecond. Workers spin for a short
// while after a job before they sleep.
//
// Work: a loop of `items` is cut into chunks of `grain`. Each thread has a range of consecutive
// chunks, takes them one by one, and then helps the others, so a slow or busy core takes fewer. The
// choice of thread for a chunk never changes a result because chunks write disjoint memory.
//
// Preconditions: tasks must not throw and must not call parallel(). Calls from several threads
// are safe and run one after the other.
#pragma once

#include <cstdint>
#include <limits>

namespace exl {

constexpr int64_t kAnyThreads = std::numeric_limits<int64_t>::max();

// Runs items [first, end). `thread` is 0 for the caller and below `max_threads` for all threads.
using Task = void (*)(void* context, int64_t first, int64_t end, int thread);

// A loop with scratch per thread passes the number of threads that the scratch has room for,
// because another model that was loaded meanwhile may have requested more threads.
void parallel(int64_t items, int64_t grain, Task task, void* context,
              int64_t max_threads = kAnyThreads);

// Number of threads that a loop may use, including the caller.
int num_threads();

// Grain that gives every thread some chunks, so that a slow core delays the end by at most one
// chunk. Never below `min_grain`, the number of items that is worth the cost of a claim.
int64_t balanced_grain(int64_t items, int64_t min_grain);

// parallel() for any callable f(first, end, thread).
template <class Function>
inline void parallel_for(int64_t items, int64_t grain, const Function& function,
                         int64_t max_threads = kAnyThreads) {
    parallel(
        items, grain,
        [](void* context, int64_t first, int64_t end, int thread) {
            (*static_cast<const Function*>(context))(first, end, thread);
        },
        const_cast<Function*>(&function), max_threads);
}

}  // namespace exl
