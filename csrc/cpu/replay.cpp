// Runs prepared calls. See replay.h.
#include "replay.h"

// Makes the calls in order until one fails, which is one that does not return 0.
//
// Returns -1, or the index of the call that failed.
EXL_API int64_t exl_replay(const ExlCall* calls, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        if (calls[i].function(calls[i].arguments) != 0) return i;
    }
    return -1;
}
