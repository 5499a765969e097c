// decode_step with e4m3 slots.
#include "cuda/decode_step/launch.h"

namespace less::cuda {

template cudaError_t launch_decode<__nv_fp8_e4m3>(const DecodeStepParams&, const DecodePlan&,
                                                  cudaStream_t);

}  // namespace less::cuda
