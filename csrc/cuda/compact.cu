// The call's tokens join the slots. Of slots and call the S highest ranks stay, of equals the older
// leaves first; what leaves is folded, H += psi(k)^T v, z += psi(k), and forgotten.
//
// Grid:   five kernels, one after another: select (a block per head) writes down who leaves and who
//         takes which slot; feature_map.cu evaluates psi of the list, fold and add put it into
//         the state, and insert (blocks of 32 slots) alone writes the slots.
// Memory: what leaves is read once, what joins is read and written once; see the parts.
// Order:  those who leave fold in ascending slot, then token; kept tokens of the call take the free
//         slots in ascending order. A head's bits depend on nothing but the head.
#include "cuda/compact/fold.h"
#include "cuda/compact/select.h"
#include "cuda/feature_map/rows.h"
#include "cuda/kernels.h"

namespace less::cuda {

constexpr int kInsertThreads = 256;
constexpr int kInsertSlots = 32;
constexpr int kInsertEach = kInsertSlots / (kInsertThreads / 32);  // slots of a warp

__global__ void __launch_bounds__(kInsertThreads)
    compact_insert_kernel(CompactParams p, CompactWorkspace w, int row_bytes) {
  const int64_t head = blockIdx.x, b = head / p.K, S = p.slots.S;
  const int64_t first = int64_t{blockIdx.y} * kInsertSlots;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (head % p.K == 0 && first == 0 && threadIdx.x == 0) p.seen[b] += w.tokens[head];
  const int64_t slot = first + threadIdx.x;
  if (threadIdx.x < kInsertSlots && slot < S) {
    const int64_t at = head * S + slot;
    const int32_t token = w.take[at];
    if (token == kStays) {
      store(p.slots.score + at, p.slot_score[at]);
    } else {
      const bool empty = token == kEmpty;
      const int64_t row = head * p.T + token;
      store(p.slots.position + at, empty ? -1 : w.position[at]);
      store(p.slots.score + at, empty ? 0.0f : p.chunk_score[row]);
      store(p.slots.weight + at, 0.0f);
      if (!empty && p.k_scale != nullptr) {
        store(p.slots.k_scale + at, p.k_scale[row]);
        store(p.slots.v_scale + at, p.v_scale[row]);
      }
    }
  }
  // Rows in pieces of 16 bytes, k's and then v's.
  const auto* k = static_cast<const unsigned char*>(p.k) + head * p.T * row_bytes;
  const auto* v = static_cast<const unsigned char*>(p.v) + head * p.T * row_bytes;
  auto* slot_k = static_cast<unsigned char*>(p.slots.k) + head * S * row_bytes;
  auto* slot_v = static_cast<unsigned char*>(p.slots.v) + head * S * row_bytes;
  const int64_t mine = first + warp * kInsertEach;
  int32_t token[kInsertEach];
#pragma unroll
  for (int i = 0; i < kInsertEach; ++i) {
    token[i] = mine + i < S ? w.take[head * S + mine + i] : kEmpty;
  }
  for (int c = lane * 16; c < 2 * row_bytes; c += 32 * 16) {
    const bool of_v = c >= row_bytes;
    const int at = of_v ? c - row_bytes : c;
    uint4 piece[kInsertEach];
#pragma unroll
    for (int i = 0; i < kInsertEach; ++i) {
      if (token[i] >= 0) piece[i] = load16((of_v ? v : k) + int64_t{token[i]} * row_bytes + at);
    }
#pragma unroll
    for (int i = 0; i < kInsertEach; ++i) {
      if (token[i] >= 0) store16((of_v ? slot_v : slot_k) + (mine + i) * row_bytes + at, piece[i]);
    }
  }
}

namespace {

template <typename V>
cudaError_t launch_fold(const CompactParams& p, const CompactWorkspace& w, cudaStream_t stream) {
  const FoldShared shared(nullptr, p, sizeof(V));
  const int64_t cells = shared.rows / kCellR * (p.D / kCellD);
  const dim3 grid(unsigned(p.B * p.K), unsigned(w.strips),
                  unsigned((cells + kFoldThreads - 1) / kFoldThreads));
  return launch(compact_fold_kernel<V>, Launch{grid, dim3(kFoldThreads), shared.bytes, stream}, p,
                w);
}

cudaError_t fold_list(const CompactParams& p, const CompactWorkspace& w, cudaStream_t stream) {
  FeatureRows rows{};
  rows.x = p.k;
  rows.slots = p.slots.k;
  rows.x_scale = p.k_scale;
  rows.slot_scale = p.slots.k_scale;
  rows.list = w.list;
  rows.count = w.leaving;
  rows.y = w.psi;
  rows.dtype = p.slots.dtype;
  rows.B = p.B;
  rows.heads = p.K;
  rows.T = p.T;
  rows.S = p.slots.S;
  cudaError_t error = features(p.psi, rows, stream);
  if (error != cudaSuccess) return error;
  switch (p.slots.dtype) {
    case DType::f32:
      error = launch_fold<float>(p, w, stream);
      break;
    case DType::bf16:
      error = launch_fold<__nv_bfloat16>(p, w, stream);
      break;
    case DType::fp16:
      error = launch_fold<__half>(p, w, stream);
      break;
    case DType::i8:
      error = launch_fold<int8_t>(p, w, stream);
      break;
    case DType::fp8:
      error = launch_fold<__nv_fp8_e4m3>(p, w, stream);
      break;
  }
  if (error != cudaSuccess) return error;
  constexpr int64_t kEach = kFoldThreads * 4;
  const dim3 grid(unsigned(p.B * p.K), unsigned((p.R * p.D + kEach - 1) / kEach));
  return launch(compact_add_kernel, Launch{grid, dim3(kFoldThreads), 0, stream}, p, w);
}

}  // namespace

int64_t compact_workspace(const CompactParams& p) { return CompactWorkspace(p).bytes; }

cudaError_t compact(const CompactParams& p, cudaStream_t stream) {
  const int64_t heads = p.B * p.K, S = p.slots.S;
  if (heads == 0 || S == 0) return cudaSuccess;
  const int64_t row_bytes = p.D * size_of(p.slots.dtype);
  if (row_bytes % 16 != 0) return cudaErrorInvalidValue;
  if (!aligned16({p.k, p.v, p.slots.k, p.slots.v, p.H, p.workspace})) {
    return cudaErrorMisalignedAddress;
  }
  const CompactWorkspace w(p);
  const dim3 per_head{unsigned(heads)};
  cudaError_t error =
      launch(compact_select_kernel, Launch{per_head, dim3(kSelectThreads), 0, stream}, p, w);
  if (error != cudaSuccess) return error;
  if (p.H != nullptr && p.T > 0) error = fold_list(p, w, stream);
  if (error != cudaSuccess) return error;
  const dim3 grid(unsigned(heads), unsigned((S + kInsertSlots - 1) / kInsertSlots));
  return launch(compact_insert_kernel, Launch{grid, dim3(kInsertThreads), 0, stream}, p, w,
                int(row_bytes));
}

}  // namespace less::cuda
