// attention_decode.cu for the heads that no kernel there is made for: other multiples of 16 up
// to 256, filled up with elements that are not there. A file of its own, so that both compile
// at the same time.
#include "cuda/decode_split.cuh"

namespace exl {

EXL_DECODE_KERNEL(up_to_128, 128, 32, false, 1);
EXL_DECODE_KERNEL(up_to_256, 256, 16, false, 1);

}  // namespace exl
