// decode_step with packed slots, of any format.
#include "cuda/decode_step/launch.h"

namespace less::cuda {

template cudaError_t launch_decode<FewBits>(const DecodeStepParams&, const DecodePlan&,
                                            cudaStream_t);

}  // namespace less::cuda
