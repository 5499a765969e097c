// The call's tokens join the slots. Of slots and call the S highest ranks stay, of equals the older
// leaves first; what leaves is folded, H += psi(k)^T v, z += psi(k), or merged, or forgotten.
//
// Of packed slots, the call's tokens come into hot ones, and compete for the others, encoded, once
// they are not among the last any more.
//
// Grid:   five kernels, one after another: select (a block per head) writes down who leaves and who
//         takes which slot; feature_map.cu evaluates psi of the list, fold and add put it into
//         the state, and insert (blocks of 32 slots) alone writes the slots; of packed ones it
//         writes the hot, and encode (a warp per row) before it the cold. Those who merge are
//         compact/merge.h's.
// Memory: what leaves is read once, what joins is read and written once; see the parts.
// Order:  those who leave fold in ascending slot, then token; kept tokens of the call take the free
//         slots in ascending order. A head's bits depend on nothing but the head.
#include "cuda/codec.h"
#include "cuda/compact/fold.h"
#include "cuda/compact/merge.h"
#include "cuda/compact/select.h"
#include "cuda/feature_map/rows.h"
#include "cuda/kernels.h"
#include "cuda/types.h"

namespace less::cuda {

constexpr int kInsertThreads = 256;
constexpr int kInsertSlots = 32;
constexpr int kInsertEach = kInsertSlots / (kInsertThreads / 32);  // slots of a warp

// The slots that take rows as the call has them: all, or, of packed slots, the hot ones.
struct Inserted {
  const float* score;  // of slots and call
  int64_t S;
  void* k;
  void* v;
  float* k_scale;
  float* v_scale;

  LESS_DEVICE Inserted(const CompactParams& p, const HeadRow& head, const Slots& slots)
      : score(p.score + head.row * (p.layout.S + p.T)) {
    const bool hot = packed(p.layout.v_dtype);
    S = hot ? slots.W : slots.S;
    k = hot ? slots.hot_k : slots.k;
    v = hot ? slots.hot_v : slots.v;
    k_scale = hot ? slots.hot_k_scale : slots.k_scale;
    v_scale = hot ? slots.hot_v_scale : slots.v_scale;
  }
};

__global__ void __launch_bounds__(kInsertThreads)
    compact_insert_kernel(const __grid_constant__ CompactParams p,
                          const __grid_constant__ CompactWorkspace w, int row_bytes) {
  const HeadRow head(p, blockIdx.x);
  if (head.page == nullptr) return;
  const Slots slots = less::head(p.layout, head.page, head.h).slots;
  const Inserted in(p, head, slots);
  const bool few = packed(p.layout.v_dtype);
  const int64_t S = in.S, row0 = head.row * p.layout.S;  // of the workspace's rows of slots
  const int64_t first = int64_t{blockIdx.y} * kInsertSlots;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (head.h == 0 && first == 0 && threadIdx.x == 0) *seen(head.page) += w.tokens[head.row];
  const int64_t slot = first + threadIdx.x;
  if (threadIdx.x < kInsertSlots && slot < S) {
    const int32_t token = w.take[row0 + slot];
    if (token == kStays) {
      put_score(few, slots, slot, in.score[slot]);
    } else {
      const bool empty = token == kEmpty;
      store(slots.position + slot, empty ? -1 : w.position[row0 + slot]);
      put_score(few, slots, slot, empty ? 0.0f : in.score[p.layout.S + token]);
      if (p.layout.weights) put_weight(few, slots, slot, empty ? 0.0f : weight_of_one(few));
      if (!empty && p.call.k_scale != nullptr) {
        store(in.k_scale + slot, p.call.k_scale[head.row * p.T + token]);
        store(in.v_scale + slot, p.call.v_scale[head.row * p.T + token]);
      }
    }
  }
  // Rows in pieces of 16 bytes, k's and then v's.
  const int64_t element = bytes_of(p.layout.call_dtype);
  const auto call_rows = [&](const HeadRows& rows) {
    return static_cast<const unsigned char*>(rows.data) + offset(rows, head.b, head.h, 0) * element;
  };
  const unsigned char *const k = call_rows(p.call.k), *const v = call_rows(p.call.v);
  auto* const slot_k = static_cast<unsigned char*>(in.k);
  auto* const slot_v = static_cast<unsigned char*>(in.v);
  const int64_t mine = first + warp * kInsertEach;
  int32_t token[kInsertEach];
#pragma unroll
  for (int i = 0; i < kInsertEach; ++i) {
    token[i] = mine + i < S ? w.take[row0 + mine + i] : kEmpty;
  }
  for (int c = lane * 16; c < 2 * row_bytes; c += 32 * 16) {
    const bool of_v = c >= row_bytes;
    const int at = of_v ? c - row_bytes : c;
    const int64_t step = (of_v ? p.call.v.t : p.call.k.t) * element;
    uint4 piece[kInsertEach];
#pragma unroll
    for (int i = 0; i < kInsertEach; ++i) {
      if (token[i] >= 0) piece[i] = load16((of_v ? v : k) + token[i] * step + at);
    }
#pragma unroll
    for (int i = 0; i < kInsertEach; ++i) {
      if (token[i] >= 0) store16((of_v ? slot_v : slot_k) + (mine + i) * row_bytes + at, piece[i]);
    }
  }
}

// Cold slots take rows of hot slots and of the call, encoded; before the hot slots take others.
__global__ void __launch_bounds__(kInsertThreads)
    compact_encode_kernel(const __grid_constant__ CompactParams p,
                          const __grid_constant__ CompactWorkspace w) {
  SMEM_ARRAY(uint8_t, codes, kInsertThreads / 32 * 256);
  const HeadRow head(p, blockIdx.x);
  if (head.page == nullptr) return;
  const Layout& layout = p.layout;
  const Slots slots = less::head(layout, head.page, head.h).slots;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = int(p.spec.D);
  const int64_t element = bytes_of(layout.call_dtype);
  const float* const score = p.score + head.row * (layout.S + p.T);
  const int64_t first = slots.W + int64_t{blockIdx.y} * kInsertSlots + warp * kInsertEach;
#pragma unroll 1
  for (int64_t slot = first; slot < min(first + kInsertEach, slots.S); ++slot) {
    // narrow: a number of a slot, whose lanes write it
    const int32_t token = w.take[head.row * layout.S + slot];
    const bool stays = token == kStays, empty = token == kEmpty;
    const int64_t hot = kFromHot - token;  // < 0: it is none of theirs
    if (lane == 0) {
      const int64_t from = stays ? slot : hot >= 0 ? hot : layout.S + token;
      // narrow: one number of each slot
      put_score(true, slots, slot, empty ? 0.0f : score[from]);
      if (!stays) {
        // narrow: one number of each slot
        store(slots.position + slot, empty ? -1 : w.position[head.row * layout.S + slot]);
        if (layout.weights) put_weight(true, slots, slot, empty ? 0.0f : 1.0f);
      }
    }
    if (stays || empty) continue;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const bool v = i == 1;
      const HeadRows& call = v ? p.call.v : p.call.k;
      const float* const call_scale = v ? p.call.v_scale : p.call.k_scale;
      const float* const hot_scale = v ? slots.hot_v_scale : slots.hot_k_scale;
      const auto* const row =
          hot >= 0
              ? static_cast<const unsigned char*>(v ? slots.hot_v : slots.hot_k) + hot * D * element
              : static_cast<const unsigned char*>(call.data) +
                    offset(call, head.b, head.h, token) * element;
      float scale = 1.0f;
      if (has_scale(layout.call_dtype)) {
        // narrow: a number of a row, whose lanes read it
        scale = hot >= 0 ? hot_scale[hot] : call_scale[head.row * p.T + token];
      }
      encode_row(cold_rows(layout, slots, v), slot - slots.W,
                 decoded_row(layout.call_dtype, row, scale, D), D, codes + warp * 256);
    }
  }
}

namespace {

template <typename V>
cudaError_t launch_fold(const CompactParams& p, const CompactWorkspace& w, cudaStream_t stream) {
  const FoldShared shared(nullptr, p, sizeof(V));
  const int64_t cells = shared.rows / kCellR * (p.spec.D / kCellD);
  const dim3 grid(unsigned(p.B * p.spec.K), unsigned(w.strips),
                  unsigned((cells + kFoldThreads - 1) / kFoldThreads));
  return launch(compact_fold_kernel<V>, Launch{grid, dim3(kFoldThreads), shared.bytes, stream}, p,
                w);
}

cudaError_t fold_list(const CompactParams& p, const CompactWorkspace& w, cudaStream_t stream) {
  FeatureRows rows{};
  rows.x = p.call.k;
  rows.x_scale = p.call.k_scale;
  rows.layout = p.layout;
  rows.pool = p.pool;
  rows.list = w.list;
  rows.count = w.leaving;
  rows.y = w.psi;
  rows.B = p.B;
  rows.heads = p.spec.K;
  rows.T = p.T;
  cudaError_t error = features(p.maps.psi, rows, stream);
  if (error != cudaSuccess) return error;
  error = with_dtype<RowTypes>(p.layout.k_dtype, cudaErrorInvalidValue, [&](auto type) {
    return launch_fold<typename decltype(type)::type>(p, w, stream);
  });
  if (error != cudaSuccess) return error;
  constexpr int64_t kEach = kFoldThreads * 4;
  const int64_t cells = p.layout.R * p.spec.D;
  const dim3 grid(unsigned(p.B * p.spec.K), unsigned((cells + kEach - 1) / kEach));
  return launch(compact_add_kernel, Launch{grid, dim3(kFoldThreads), 0, stream}, p, w);
}

}  // namespace

int64_t compact_workspace(const CompactParams& p) { return CompactWorkspace(p).bytes; }

cudaError_t compact(const CompactParams& p, cudaStream_t stream) {
  const int64_t heads = p.B * p.spec.K, S = p.layout.S;
  if (heads == 0 || S == 0) return cudaSuccess;
  const bool few = packed(p.layout.v_dtype);
  const int64_t bytes = row_bytes(p.layout.call_dtype, p.spec.D);
  if (few && (folds(p) || p.spec.D > 256)) return cudaErrorInvalidValue;
  if (bytes % 16 != 0) return cudaErrorInvalidValue;
  if (!aligned16({p.call.k.data, p.call.v.data, p.pool.data, p.workspace})) {
    return cudaErrorMisalignedAddress;
  }
  const CompactWorkspace w(p);
  const dim3 per_head{unsigned(heads)};
  cudaError_t error =
      launch(compact_select_kernel, Launch{per_head, dim3(kSelectThreads), 0, stream}, p, w);
  if (error != cudaSuccess) return error;
  const auto blocks = [&](int64_t n, int64_t each) {
    return dim3(unsigned(heads), unsigned((n + each - 1) / each));
  };
  const auto merge = [&](auto kernel, const dim3& grid) {
    return launch(kernel, Launch{grid, dim3(kMergeThreads), 0, stream}, p, w);
  };
  const bool merging = merges(p) && p.T > 0;
  if (folds(p) && p.T > 0) error = fold_list(p, w, stream);
  if (merging) error = merge(compact_leave_kernel, blocks(p.T, kMergeRows));
  if (error != cudaSuccess) return error;
  const int64_t W = hot_slots(p.layout), inserted = few ? W : S;
  if (few) {
    const dim3 grid = blocks(S - W, kInsertSlots);
    error = launch(compact_encode_kernel, Launch{grid, dim3(kInsertThreads), 0, stream}, p, w);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid = blocks(inserted, kInsertSlots);
  error = launch(compact_insert_kernel, Launch{grid, dim3(kInsertThreads), 0, stream}, p, w,
                 int(bytes));
  if (!merging || error != cudaSuccess) return error;
  error = merge(compact_nearest_kernel, blocks(p.T, kNearestTile));
  if (error != cudaSuccess) return error;
  return merge(compact_mean_kernel, blocks(S - W, kMergeRows));
}

}  // namespace less::cuda
