// decode_step with bfloat16 slots.
#include "cuda/decode_step/launch.h"

namespace less::cuda {

template cudaError_t launch_decode<__nv_bfloat16>(const DecodeStepParams&, const DecodePlan&,
                                                  cudaStream_t);

}  // namespace less::cuda
