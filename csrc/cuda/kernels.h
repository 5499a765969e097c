// Every CUDA kernel's launcher.
//
// A launcher enqueues on the stream and returns at once; it neither throws nor prints nor allocates
// nor synchronises, so a CUDA graph can capture it. What it cannot run (a head dim, a dtype) is
// cudaErrorInvalidValue, rows or a workspace that do not begin at a multiple of 16 bytes are
// cudaErrorMisalignedAddress; an empty problem is cudaSuccess. All output is written.
//
// Workspaces: device memory of as many bytes as <op>_workspace says, zero when it is allocated; a
// kernel leaves zero what it counted in, so that the next launch on the same stream can use it as
// it is. Two launches that may overlap need two, and so do two ops and calls of another B or K:
// what else is left is anything, and the counters lie where B and K say. The size follows from the
// sizes, dtypes and the spec of the params alone; of the pointers, only whether valid is null
// counts.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace less::cuda {

cudaError_t chunk_attention(const ChunkAttentionParams& params, cudaStream_t stream);
cudaError_t compact(const CompactParams& params, cudaStream_t stream);
cudaError_t decode_step(const DecodeStepParams& params, cudaStream_t stream);
cudaError_t feature_map(const FeatureMapParams& params, cudaStream_t stream);
cudaError_t fold(const FoldParams& params, cudaStream_t stream);
cudaError_t prompt_scores(const PromptScoresParams& params, cudaStream_t stream);
cudaError_t quantize(const QuantizeParams& params, cudaStream_t stream);
cudaError_t reset_pages(const ResetParams& params, cudaStream_t stream);
cudaError_t rotate(const RotateParams& params, cudaStream_t stream);

int64_t chunk_attention_workspace(const ChunkAttentionParams& params);
int64_t compact_workspace(const CompactParams& params);
int64_t decode_step_workspace(const DecodeStepParams& params);
int64_t prompt_scores_workspace(const PromptScoresParams& params);

}  // namespace less::cuda
