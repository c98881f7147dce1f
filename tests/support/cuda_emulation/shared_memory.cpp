// The block's shared memory, and asynchronous copies into it.
//
// It is filled with poison before each block, and a canary follows it. With AddressSanitizer it has
// its exact size, so that reads beyond it are found as well. A copy is executed when it is waited
// for; until then its target is poison, too.
#include "shared_memory.h"

#include <cstdlib>
#include <vector>

#include "emulation.h"

namespace exl_emulation {
namespace {

// NaN as float32, float16 and bfloat16; as an index, far outside of every buffer.
constexpr int kPoison = 0xFF;
constexpr int kCanaryBytes = 1024;
constexpr int kCopyBytes = 16;

struct Copy {
    char* shared;
    const void* source;
    bool valid;
    int group;
};

struct Copies {
    std::vector<Copy> pending;
    int groups = 0;  // committed so far
};

char* shared = nullptr;
int shared_bytes = 0;
Copies copies_of[kMaxThreads];

Copies& mine() { return copies_of[threadIdx.x]; }

}  // namespace

bool make_shared(int bytes) {
    std::free(shared);
    shared = nullptr;
    shared_bytes = bytes;
#if defined(__SANITIZE_ADDRESS__)
    const size_t allocated = bytes > 0 ? bytes : 1;
#else
    const size_t allocated = bytes + kCanaryBytes;
#endif
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, allocated) != 0) return false;
    shared = static_cast<char*>(memory);
    std::memset(shared, kPoison, allocated);
    return true;
}

void poison_shared() {
    std::memset(shared, kPoison, shared_bytes);
    for (unsigned i = 0; i < blockDim.x; i++) {
        copies_of[i].pending.clear();
        copies_of[i].groups = 0;
    }
}

bool canary_alive() {
#if !defined(__SANITIZE_ADDRESS__)
    for (int i = 0; i < kCanaryBytes; i++)
        if (static_cast<uint8_t>(shared[shared_bytes + i]) != kPoison) return false;
#endif
    return true;
}

bool copies_under_way() { return !mine().pending.empty(); }

char* shared_memory() { return shared; }

bool is_shared(const void* address, int bytes) {
    const char* first = static_cast<const char*>(address);
    return first >= shared && first + bytes <= shared + shared_bytes;
}

void copy_async(void* to, const void* source, bool valid) {
    check_aligned(to, kCopyBytes, "copy_async16");
    check_aligned(source, kCopyBytes, "copy_async16");
    if (!is_shared(to, kCopyBytes)) fail("copy_async16 to what is not shared memory");
    std::memset(to, kPoison, kCopyBytes);
    mine().pending.push_back({static_cast<char*>(to), source, valid, mine().groups});
}

void copy_async_commit() { mine().groups++; }

void copy_async_wait(int pending) {
    Copies& copies = mine();
    size_t left = 0;
    for (const Copy& copy : copies.pending) {
        if (copy.group >= copies.groups - pending)
            copies.pending[left++] = copy;
        else if (copy.valid)
            std::memcpy(copy.shared, copy.source, kCopyBytes);
        else
            std::memset(copy.shared, 0, kCopyBytes);
    }
    copies.pending.resize(left);
}

}  // namespace exl_emulation
