// attention_decode.cu for other head sizes: multiples of 16 up to 256, padded with elements that
// do not exist. A separate file so that both are compiled at the same time.
#include "cuda/decode_loop.cuh"

namespace exl {

EXL_DECODE_KERNEL(up_to_128, 128, 32, false, 1);
EXL_DECODE_KERNEL(up_to_256, 256, 16, false, 1);

}  // namespace exl
