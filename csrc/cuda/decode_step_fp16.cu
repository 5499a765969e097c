// decode_step with float16 slots.
#include "cuda/decode_step/launch.h"

namespace less::cuda {

template cudaError_t launch_decode<__half>(const DecodeStepParams&, const DecodePlan&,
                                           cudaStream_t);

}  // namespace less::cuda
