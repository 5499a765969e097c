// Rows that go through a feature map, and the launcher that takes them through it.
#pragma once

#include "cuda/convert.h"
#include "cuda/device.h"
#include "params.h"

namespace less::cuda {

// y[row] = map_n(row) for all tokens of a call, or for those that a list names.
struct FeatureRows {
  HeadRows x;            // [B, heads, T, D]  the call's rows
  const float* x_scale;  // [B, heads, T]     of each row, of i8 and fp8 alone
  Layout layout;         // with list, as pool: of the slots, of x's dtype
  Pool pool;
  const int32_t* list;   // [B, heads, T]     a slot, or S + token; null: every token of the call
  const int32_t* count;  // [B, heads]        how many are listed; 0 for a row without a page
  float* y;              // [B, heads, T, R]  in the order of the list; written up to count
  int64_t B;
  int64_t heads;
  int64_t T;
};

// Enqueues the kernel for the map's and the rows' dtypes; feature_map.cu.
cudaError_t features(const FeatureMaps& map, const FeatureRows& rows, cudaStream_t stream);

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

LESS_DEVICE Row locate(const FeatureRows& in, const RowBlock& block, int i) {
  const int64_t n = block.first + i;
  const bool listed = in.list != nullptr;
  const int64_t b = listed ? block.batch : n / in.T;
  const int64_t first = (b * in.heads + block.head) * in.T;
  const int64_t output = first + (listed ? n : n - b * in.T);
  int64_t token = output - first;
  if (listed) {
    const int64_t source = in.list[output], S = in.layout.slots[block.head];
    if (source < S) {
      const Slots kept = less::head(in.layout, page(in.pool, b), block.head).slots;
      const float scale = kept.k_scale == nullptr ? 1.0f : kept.k_scale[source];
      const int64_t bytes = source * row_bytes(in.layout.k_dtype, in.layout.D);
      return {reinterpret_cast<uint64_t>(kept.k) + uint64_t(bytes), scale, output};
    }
    token = source - S;
  }
  const float scale = in.x_scale == nullptr ? 1.0f : in.x_scale[first + token];
  const int64_t bytes = offset(in.x, b, block.head, token) * bytes_of(in.x.dtype);
  return {reinterpret_cast<uint64_t>(in.x.data) + uint64_t(bytes), scale, output};
}

}  // namespace less::cuda
