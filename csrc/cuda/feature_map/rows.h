// Rows that go through a feature map, and the launcher that takes them through it.
#pragma once

#include "cuda/convert.h"
#include "cuda/device.h"
#include "params.h"

namespace less::cuda {

// y[row] = map_n(row) for all tokens of a call, or for those that a list names.
struct FeatureRows {
  const void* x;            // [B, heads, T, D]  the call's rows, of dtype
  const void* slots;        // [B, heads, S, D]  of dtype; with list
  const float* x_scale;     // [B, heads, T]     of each row, of i8 and fp8 alone
  const float* slot_scale;  // [B, heads, S]
  const int32_t* list;      // [B, heads, T]     a slot, or S + token; null: every token of the call
  const int32_t* count;     // [B, heads]        how many are listed
  float* y;                 // [B, heads, T, R]  in the order of the list; written up to count
  DType dtype;
  int64_t B;
  int64_t heads;
  int64_t T;
  int64_t S;
};

// Enqueues the kernel for the map's and the rows' dtypes; feature_map.cu.
cudaError_t features(const FeatureMaps& map, const FeatureRows& rows, cudaStream_t stream);

constexpr int size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : dtype == DType::bf16 || dtype == DType::fp16 ? 2 : 1;
}

// The rows of a map's head that a block takes: all batch rows' tokens in one sequence, or, of a
// list, those of one batch row.
struct RowBlock {
  int64_t head;
  int64_t batch;  // of a list
  int64_t first;
  int count;  // <= the block's; 0 or less: nothing to do
};

LESS_DEVICE RowBlock row_block(const FeatureRows& in, int size) {
  RowBlock block{blockIdx.y, blockIdx.z, int64_t{blockIdx.x} * size, 0};
  const int64_t n =
      in.list == nullptr ? in.B * in.T : in.count[block.batch * in.heads + block.head];
  const int64_t left = n - block.first;
  block.count = left < size ? int(left) : size;
  return block;
}

struct Row {
  uint64_t address;  // in global memory
  float scale;
  int64_t output;  // row of y
};

LESS_DEVICE Row locate(const FeatureRows& in, const RowBlock& block, int i, int64_t row_bytes) {
  const int64_t n = block.first + i;
  if (in.list == nullptr) {
    const int64_t b = n / in.T, row = (b * in.heads + block.head) * in.T + (n - b * in.T);
    const float scale = in.x_scale == nullptr ? 1.0f : in.x_scale[row];
    return {reinterpret_cast<uint64_t>(in.x) + uint64_t(row * row_bytes), scale, row};
  }
  const int64_t head = block.batch * in.heads + block.head;
  const int64_t source = in.list[head * in.T + n];
  const bool kept = source < in.S;
  const int64_t row = kept ? head * in.S + source : head * in.T + (source - in.S);
  const float* scales = kept ? in.slot_scale : in.x_scale;
  const void* rows = kept ? in.slots : in.x;
  return {reinterpret_cast<uint64_t>(rows) + uint64_t(row * row_bytes),
          scales == nullptr ? 1.0f : scales[row], head * in.T + n};
}

}  // namespace less::cuda
