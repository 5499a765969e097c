// decode_step with float32 slots.
#include "cuda/decode_step/launch.h"

namespace less::cuda {

template cudaError_t launch_decode<float>(const DecodeStepParams&, const DecodePlan&, cudaStream_t);

}  // namespace less::cuda
