// The thread pool of threads.h.
//
// One job at a time: the mutex `call` serialises callers. A job's chunks are divided into one range
// for each thread. A thread claims the chunks of its own range from the front, so that it reads
// memory in one stream, and then chunks from the back of the others' ranges. A thread that has a
// claim may read the job's fields because the job cannot be replaced before that chunk is counted in
// `finished`. A worker that wakes late finds no chunk to claim and reads nothing, so the caller
// never waits for a worker that has not started.
//
// The pool is never destroyed because workers may still spin while the process exits.
#include "api.h"
#include "common.h"
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace exl {
namespace {

// How long a worker spins after its last job before it sleeps. Between two operations of a decode
// step there are a few microseconds of Python; to wake a sleeping worker costs about 50 us.
constexpr auto kSpin = std::chrono::microseconds(100);
// Pauses between two reads of the clock: a pause takes 10 to 140 cycles, a read about 80.
constexpr int kPausesPerClockRead = 16;
// Pauses after which a caller that waits for a worker yields its core, because the worker has
// been preempted, possibly by the caller itself.
constexpr int kPausesBeforeYield = 2000;
// Chunks of a job; their numbers have 32 bits.
constexpr int64_t kMostChunks = int64_t{1} << 31;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Chunks [first, end) that nobody has claimed.
struct Range {
    uint32_t first;
    uint32_t end;
};

// A cache line of its own, because its thread claims from it continually.
struct alignas(64) Share {
    std::atomic<Range> unclaimed{Range{0, 0}};
};

struct Pool {
    std::mutex call;
    std::vector<std::thread> workers;
    std::unique_ptr<Share[]> shares{new Share[1]};  // one for each thread

    Task task = nullptr;
    void* context = nullptr;
    int64_t items = 0;
    int64_t grain = 1;

    alignas(64) std::atomic<int64_t> jobs{0};
    alignas(64) std::atomic<int64_t> finished{0};
    alignas(64) std::atomic<int> sleeping{0};
    std::atomic<bool> stopping{false};
    std::mutex sleep;
    std::condition_variable wake;

    int threads() const { return static_cast<int>(workers.size()) + 1; }
};

std::atomic<Pool*> pool{new Pool};
std::atomic<int> requested_threads{1};

#if defined(__unix__) || defined(__APPLE__)
// A forked child has no workers and possibly a locked mutex, so it starts with a new pool.
void forget_pool() { pool.store(new Pool); }
const int fork_handler = pthread_atfork(nullptr, nullptr, forget_pool);
#endif

// Takes a chunk from the front or the back of a share. Returns its number, or -1.
int64_t claim(Share& share, bool front) {
    Range range = share.unclaimed.load(std::memory_order_relaxed);
    while (range.first < range.end) {
        const Range rest = front ? Range{range.first + 1, range.end}
                                 : Range{range.first, range.end - 1};
        if (share.unclaimed.compare_exchange_weak(range, rest, std::memory_order_acquire,
                                                  std::memory_order_relaxed)) {
            return front ? range.first : rest.end;
        }
    }
    return -1;
}

void drain(Pool& p, int thread, int threads) {
    int64_t done = 0;
    for (int i = 0; i < threads; ++i) {
        Share& share = p.shares[(thread + i) % threads];
        for (int64_t chunk; (chunk = claim(share, i == 0)) >= 0; ++done) {
            const int64_t first = chunk * p.grain;
            const int64_t end = first + p.grain < p.items ? first + p.grain : p.items;
            p.task(p.context, first, end, thread);
        }
    }
    if (done > 0) p.finished.fetch_add(done, std::memory_order_release);
}

bool has_work(const Pool& p, int64_t seen) {
    return p.jobs.load(std::memory_order_seq_cst) != seen || p.stopping.load();
}

void wait_for_work(Pool& p, int64_t seen) {
    const auto start = std::chrono::steady_clock::now();
    do {
        for (int i = 0; i < kPausesPerClockRead; ++i) {
            if (has_work(p, seen)) return;
            pause();
        }
    } while (std::chrono::steady_clock::now() - start < kSpin);
    std::unique_lock<std::mutex> lock(p.sleep);
    // The worker counts itself before its last check; the caller publishes a job before it reads
    // this counter. Both are sequentially consistent, so at least one of them sees the other.
    p.sleeping.fetch_add(1);
    p.wake.wait(lock, [&] { return has_work(p, seen); });
    p.sleeping.fetch_sub(1);
}

// jobs: how many there were when the worker was made; threads: how many there are with it.
void work(Pool* p, int thread, int threads, int64_t jobs) {
    while (!p->stopping.load(std::memory_order_relaxed)) {
        wait_for_work(*p, jobs);
        jobs = p->jobs.load();
        drain(*p, thread, threads);
    }
}

void wake_sleepers(Pool& p) {
    if (p.sleeping.load() == 0) return;
    { std::lock_guard<std::mutex> lock(p.sleep); }
    p.wake.notify_all();
}

// Adjusts the number of workers to the number requested by exl_set_threads, or to the job's own
// bound if that is lower, so that no worker has a higher number. Precondition: `call` is held.
void resize(Pool& p, int64_t max_threads) {
    const int64_t threads = std::min<int64_t>(requested_threads.load(), max_threads);
    const size_t workers = static_cast<size_t>(threads - 1);
    if (p.workers.size() == workers) return;
    p.stopping.store(true);
    wake_sleepers(p);
    for (auto& worker : p.workers) worker.join();
    p.workers.clear();
    p.stopping.store(false);
    p.shares.reset(new Share[threads]);
    try {
        while (p.workers.size() < workers) {
            const int thread = p.threads();
            p.workers.emplace_back(work, &p, thread, static_cast<int>(threads), p.jobs.load());
        }
    } catch (const std::system_error&) {
        // The system provides no more threads: continue with the existing ones.
        requested_threads.store(p.threads());
    }
}

}  // namespace

void parallel(int64_t items, int64_t grain, Task task, void* context, int64_t max_threads) {
    if (items <= 0) return;
    const int64_t chunks = ceil_div(items, grain);
    if (chunks == 1 || max_threads <= 1 ||
        requested_threads.load(std::memory_order_relaxed) == 1) {
        task(context, 0, items, 0);
        return;
    }
    if (chunks > kMostChunks) return parallel(items, grain * 2, task, context, max_threads);
    Pool& p = *pool.load();
    std::lock_guard<std::mutex> lock(p.call);
    resize(p, max_threads);
    p.task = task;
    p.context = context;
    p.items = items;
    p.grain = grain;
    p.finished.store(0, std::memory_order_relaxed);
    const int threads = p.threads();
    for (int t = 0; t < threads; ++t) {
        const Range range = {static_cast<uint32_t>(chunks * t / threads),
                             static_cast<uint32_t>(chunks * (t + 1) / threads)};
        p.shares[t].unclaimed.store(range, std::memory_order_release);
    }
    p.jobs.fetch_add(1, std::memory_order_seq_cst);
    wake_sleepers(p);
    drain(p, 0, threads);
    for (int i = 0; p.finished.load(std::memory_order_acquire) < chunks; ++i) {
        if (i < kPausesBeforeYield) {
            pause();
        } else {
            std::this_thread::yield();
        }
    }
}

int num_threads() { return requested_threads.load(std::memory_order_relaxed); }

int64_t balanced_grain(int64_t items, int64_t min_grain) {
    // The end of a job is then delayed by at most 1/32 of a thread's part. Measured with two
    // threads: 8 chunks instead make the products of a decode step 2 % slower.
    constexpr int64_t kChunksPerThread = 32;
    const int64_t chunks = kChunksPerThread * num_threads();
    const int64_t grain = ceil_div(items, chunks);
    return grain > min_grain ? grain : min_grain;
}

}  // namespace exl

// Sets the number of threads of later calls, at least 1 (the caller). Returns the number in force.
EXL_API int exl_set_threads(int threads) {
    exl::requested_threads.store(threads < 1 ? 1 : threads);
    return exl::num_threads();
}
