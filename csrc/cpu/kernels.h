// Every CPU kernel, by name; dispatch.h tells how a line here becomes less::cpu::<op>.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/simd_test.h"
#include "params.h"

LESS_CPU_KERNEL(chunk_attention, ChunkAttentionParams)
LESS_CPU_KERNEL(chunk_scores, ChunkAttentionParams)
LESS_CPU_KERNEL(compact, CompactParams)
LESS_CPU_KERNEL(decode_step, DecodeStepParams)
LESS_CPU_KERNEL(feature_map, FeatureMapParams)
LESS_CPU_KERNEL(fold, FoldParams)
LESS_CPU_KERNEL(prompt_masses, PromptScoresParams)
LESS_CPU_KERNEL(prompt_scores, PromptScoresParams)
LESS_CPU_KERNEL(quantize, QuantizeParams)
LESS_CPU_KERNEL(rotate, RotateParams)
LESS_CPU_KERNEL(simd_test, SimdTestParams)
