// decode_step with int8 slots.
#include "cuda/decode_step/launch.h"

namespace less::cuda {

template cudaError_t launch_decode<int8_t>(const DecodeStepParams&, const DecodePlan&,
                                           cudaStream_t);

}  // namespace less::cuda
