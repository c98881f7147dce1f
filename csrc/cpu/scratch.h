// Division of a call's scratch memory into arrays.
#pragma once

#include <cstdint>

#include "common.h"

namespace exl {

// Takes arrays from consecutive memory, each a multiple of 64 bytes (a cache line and an AVX-512
// register) from the first one. Starting at address 0, it measures the number of bytes.
struct ScratchCutter {
    static constexpr int64_t kAlignment = 64;

    uintptr_t next;

    template <class T>
    T* take(int64_t count) {
        T* taken = reinterpret_cast<T*>(next);
        const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
        next += static_cast<uintptr_t>(round_up(bytes, kAlignment));
        return taken;
    }
};

}  // namespace exl
