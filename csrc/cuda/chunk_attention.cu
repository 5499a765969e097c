// out = (phi H + sum e^l v) / (phi z + sum e^l),  l = scale q.k + weight, over the kept slots, the
// low-rank state and, causally, the call's tokens; the state is one more part of the softmax, with
// log-mass log(phi z) and value phi H / phi z, so that every exponent is <= 0.
//
// list_keys_kernel: grid (B K + B): kept slots of a kv head, valid tokens of a row, in order.
// attend_kernel: grid (B K ceil(G T / kRows)), the blocks with the most keys first. A block owns
//   kRows queries, 16 a warp, whose G heads share every tile of keys and values. Tiles of kKeys
//   keys stream through shared memory while the one before is computed with: q k^T by tensor
//   cores, running maximum and sum, weights as operands, their product with v. Where a row's
//   queries are one block's, their keys are cut into splits, each a block, which meet in the
//   workspace; the last to come adds them up.
// Scores are sums over columns: prompt_scores.cu, from the logarithms of the queries' masses.
// Memory: k and v once per block, 2 D bytes a key, from the second-level cache after the first;
//   shared memory at most 99 kB, which every architecture has.
// Order:  keys ascending, tile by tile; a tile's sum of values is by itself before it is added;
//   splits ascending. One owner per output; what a head has depends on nothing but the head:
//   whether its keys are cut follows from its own tokens, into what from its own capacity.
#include <algorithm>

#include "cuda/chunk_attention/finish.h"
#include "cuda/kernels.h"

namespace less::cuda {

constexpr int kListThreads = 128;

// Indices of [0, n) that keep() holds for, ascending, from the front of the list; the others from
// its end. count_before: how many there are of those below `mark`; with 0 it is left alone.
template <typename Keep>
LESS_DEVICE void partition(int n, const Keep& keep, int32_t* list, int32_t* count, int mark = 0,
                           int32_t* count_before = nullptr) {
  constexpr int kWarps = kListThreads / 32;
  SMEM_ARRAY(int, kept_of, 2 * kWarps);
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int kept = 0;
  for (int first = 0; first < n; first += kListThreads) {
    const int i = first + thread;
    const bool mine = i < n && keep(i);
    const unsigned ballot = __ballot_sync(0xffffffffu, mine);
    int* of_pass = kept_of + first / kListThreads % 2 * kWarps;
    if (lane == 0) of_pass[warp] = __popc(ballot);
    __syncthreads();
    int before = kept + __popc(ballot & ((1u << lane) - 1u));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += of_pass[w];
      kept += of_pass[w];
    }
    // narrow: a lane a key, side by side
    if (i < n) store(list + (mine ? before : n - 1 - (i - before)), int32_t(i));
    // narrow: one number, by one lane
    if (i + 1 == mark) store(count_before, int32_t(before + mine));
  }
  if (thread == 0) store(count, int32_t(kept));
}

__global__ void __launch_bounds__(kListThreads)
    list_keys_kernel(const __grid_constant__ ChunkAttentionParams p, const KeyLists lists) {
  const int64_t S = p.layout.S, rows = S == 0 ? 0 : p.B * p.spec.K, x = blockIdx.x;
  if (x < rows) {
    const int64_t b = x / p.spec.K, h = x - b * p.spec.K;
    unsigned char* const memory = page(p.pool, b);
    const int32_t* const position =
        memory == nullptr ? nullptr : head(p.layout, memory, h).slots.position;
    const int own = memory == nullptr ? 0 : p.layout.slots[h];
    partition(
        // narrow: a lane a slot, side by side
        int(S), [=](int s) { return s < own && position[s] >= 0; }, lists.slot + x * S,
        lists.slots + x, hot_slots(p.layout), lists.hot + x);
  } else {
    const int64_t b = x - rows;
    const bool* valid = p.valid + b * p.T;
    partition(
        // narrow: a lane a token, side by side
        int(p.T), [valid](int t) { return valid[t]; }, lists.token + b * p.T, lists.tokens + b);
  }
}

cudaError_t list_keys(const ChunkAttentionParams& p, const KeyLists& lists, cudaStream_t stream) {
  const int64_t rows = p.layout.S == 0 ? 0 : p.B * p.spec.K;
  const int64_t blocks = rows + (lists.token == nullptr ? 0 : p.B);
  if (blocks == 0) return cudaSuccess;
  return launch(list_keys_kernel, {dim3(unsigned(blocks)), dim3(kListThreads), 0, stream}, p,
                lists);
}

template <typename Scheme, int kD>
__global__ void __launch_bounds__(AttendShape<Scheme, kD>::kThreads,
                                  AttendShape<Scheme, kD>::kBlocks)
    attend_kernel(const __grid_constant__ ChunkAttentionParams p, const KeyLists lists,
                  const Splits splits, float* lse, int blocks) {
  using Shape = AttendShape<Scheme, kD>;
  constexpr int kKeys = Shape::kKeys;
  DYN_SMEM(memory);
  SharedCarver carver{memory};
  const AttendShared<Scheme, kD> shared(carver);
  // A split of the keys of few queries, or a block of more queries.
  const int each = splits.count + blocks, split = int(blockIdx.x) % each;
  const KvHead head(p, lists, int(blockIdx.x) / each);
  const int per =
      splits.count == 0 ? 0 : tiles_of_split(tiles_of_slots(p.layout, head.h, kKeys), splits.most);
  const bool few = per > 0 && head.tokens * head.G <= Shape::kRows;
  const bool cut = split < splits.count;
  const int first = cut ? 0 : (each - 1 - split) * Shape::kRows;
  if (cut ? !few : few && first == 0) return;
  const int row = Shape::row(), lane = int(threadIdx.x) % 32;

  // Tokens that the block's last query sees; the tiles of slots come before those of tokens.
  const int last = min(first + Shape::kRows, head.tokens * head.G) - 1;
  const int tokens = last < first ? 0 : last / head.G + 1;
  const int hot_tiles = last < first ? 0 : (head.hot + kKeys - 1) / kKeys;
  const int slot_tiles = last < first ? 0 : hot_tiles + (head.slots - head.hot + kKeys - 1) / kKeys;
  const int tiles = slot_tiles + (tokens + kKeys - 1) / kKeys;
  const int begin_tile = cut ? min(split * per, slot_tiles) : 0;
  const int end_tile = cut && split < splits.count - 1 ? min(begin_tile + per, slot_tiles) : tiles;

  const auto query = [&](int r) -> int64_t {
    const int m = first + r;
    return m < head.tokens * head.G ? head.query_row(p.q, p, lists, m) : -1;
  };
  if constexpr (kIsWide<Scheme>) {
    split_rows<typename Scheme::KeyTag, Scheme::kParts, kD, Shape::kRows, Shape::kThreads>(
        p.q.data, p.q.dtype, p.spec.D, query, shared.q);
  } else {
    copy_rows<kD, Shape::kRows, Shape::kThreads>(p.q.data, p.spec.D, query, shared.q);
  }

  Stream<Scheme, kD> stream;
  // The head is read again: kept through the tiles, it takes registers that there are not.
  const auto enter = [&](Keys keys, int count, int tile) {
    const KvHead own(p, lists, head.row);
    stream.enter(source_of<kIsWide<Scheme>>(p, lists, own, keys, count), tile);
  };
  const auto fetch = [&](int tile) {
    const int stage = tile % Shape::kStages;
    if (tile == slot_tiles) {
      enter(Keys::call, tokens, 0);
    } else if (kIsWide<Scheme> && tile == hot_tiles) {
      enter(Keys::slots, 0, 0);
    }
    stream.fetch(p.spec.D, shared.k + stage * Shape::kKeyTile,
                 shared.v + stage * Shape::kValueTile);
  };
  if (begin_tile < end_tile) {
    if (kIsWide<Scheme> && begin_tile < hot_tiles) {
      enter(Keys::hot, 0, begin_tile);
    } else if (begin_tile < slot_tiles) {
      enter(Keys::slots, 0, begin_tile - hot_tiles);
    }
    fetch(begin_tile);
    stream.place_factors(shared, begin_tile);
  }
  copy_async_commit();

  const Logit logit(p);
  Running<Shape::kColumns> sums;
  for (int tile = begin_tile; tile < end_tile; ++tile) {
    const int stage = tile % Shape::kStages;
    const uint16_t* k = shared.k + stage * Shape::kKeyTile;
    const uint16_t* v = shared.v + stage * Shape::kValueTile;
    if constexpr (Shape::kStages == 1) stream.place(p.layout.k_dtype, p.spec.D, shared.k, shared.v);
    copy_async_wait<0>();
    __syncthreads();
    if (tile + 1 < end_tile) fetch(tile + 1);
    copy_async_commit();
    float s[kKeys / 8][4];
    dot_products<typename Scheme::KeyTag, Scheme::kParts, kD, Shape::kRows, kKeys>(shared.q, row, k,
                                                                                   s);
    const int begin = (tile - slot_tiles) * kKeys;  // of the call's keys
    const bool masked = tile >= slot_tiles && (begin + kKeys - 1) * head.G > first + row;
    // In queries, without a division: query m sees key j of the call where j G <= m.
    const int seen[2] = {first + row + lane / 4 - begin * head.G,
                         first + row + lane / 4 + 8 - begin * head.G};
    const int factors = tile % 2 * kKeys;
    const float2 shrink = weigh_keys<Scheme, kKeys>(
        logit, shared.weight + factors, shared.k_scale + factors, masked, head.G, seen, s, sums);
    if (p.call.v.data != nullptr) {
      add_values<Scheme, kKeys, kD, Shape::kColumns>(s, shared.v_scale + factors, v,
                                                     Shape::column(), shrink, sums.out);
    }
    if (tile + 1 < end_tile) stream.place_factors(shared, tile + 1);
    if constexpr (Shape::kStages == 1) {
      __syncthreads();  // the next takes this one's place
    }
  }
  // Where there was no tile, queries may be on their way.
  copy_async_wait<0>();
  int* const was_last = reinterpret_cast<int*>(shared.weight);
  if (cut && !Meeting<Scheme, kD>(splits, head, was_last).join(split, sums)) return;
  // The head is read again: kept through the tiles, it takes registers that sm_80 has not got.
  const KvHead again(p, lists, head.row);
  Finish<Scheme, kD>(p, lists, again, first).run(sums, lse, shared);
}

namespace {

struct Attend {
  const ChunkAttentionParams& p;
  const KeyLists& lists;
  const Splits& splits;
  float* lse;
  cudaStream_t stream;

  template <typename Scheme, int kD>
  cudaError_t launch() const {
    using Shape = AttendShape<Scheme, kD>;
    SharedCarver carver{nullptr};
    const AttendShared<Scheme, kD> shared(carver);
    const int64_t queries = p.spec.Q / p.spec.K * p.T;
    const bool all_few = splits.all && queries <= Shape::kRows;
    const int64_t blocks = all_few ? 0 : (queries + Shape::kRows - 1) / Shape::kRows;
    const Launch how{dim3(unsigned((splits.count + blocks) * p.B * p.spec.K)),
                     dim3(Shape::kThreads), carver.used, stream};
    return cuda::launch(attend_kernel<Scheme, kD>, how, p, lists, splits, lse, int(blocks));
  }
};

// Cuts the keys of rows of few tokens, if a call has any. Into what does not depend on the call: a
// row has the same bits in any batch. `floats`: of all parts.
struct CutKeys {
  const ChunkAttentionParams& p;
  Splits& splits;
  int64_t& floats;

  template <typename Scheme, int kD>
  cudaError_t launch() const {
    using Shape = AttendShape<Scheme, kD>;
    constexpr int64_t kBlocks = 128, kMost = 16;  // of a batch row, and of a head's slots
    const int64_t queries = p.spec.Q / p.spec.K * p.T;
    const int64_t most = std::min(kMost, kBlocks / p.spec.K);
    if (most < 2 || (p.valid == nullptr && queries > Shape::kRows)) return cudaSuccess;
    int count = 0;
    bool all = true;
    for (int64_t h = 0; h < p.spec.K; ++h) {
      const int tiles = tiles_of_slots(p.layout, h, Shape::kKeys);
      const int per = tiles_of_split(tiles, int(most));
      if (per > 0) count = std::max(count, (tiles + per - 1) / per + 1);
      all = all && per > 0;
    }
    if (count == 0) return cudaSuccess;
    const int64_t rows = std::min<int64_t>(queries, Shape::kRows);
    splits.count = count;
    splits.most = int(most);
    splits.all = all;
    splits.warps = int((rows + 15) / 16) * Shape::kSharers;
    floats = p.B * p.spec.K * splits.count * splits.warps * Meeting<Scheme, kD>::kPart;
    return cudaSuccess;
  }
};

// The workspace, cut. A call without padding has no use for token.
struct Workspace {
  Splits splits{};
  KeyLists lists;
  float* lse;  // [B, Q, T]
  int64_t bytes;

  explicit Workspace(const ChunkAttentionParams& p) {
    int64_t floats = 0;
    dispatch(p.q.dtype, p.layout, p.spec.D, CutKeys{p, splits, floats});
    Carver carver{p.workspace};
    splits.arrived = carver.take<int32_t>(p.B * p.spec.K);  // first: where it is, whatever T
    splits.parts = carver.take<float>(floats);
    lists.slot = carver.take<int32_t>(p.B * p.spec.K * p.layout.S);
    lists.slots = carver.take<int32_t>(p.B * p.spec.K);
    lists.hot = hot_slots(p.layout) == 0 ? nullptr : carver.take<int32_t>(p.B * p.spec.K);
    lists.token = carver.take<int32_t>(p.B * p.T);
    lists.tokens = carver.take<int32_t>(p.B);
    lse = carver.take<float>(p.B * p.spec.Q * p.T);
    bytes = carver.used;
    if (p.valid == nullptr) lists.token = lists.tokens = nullptr;
  }
};

}  // namespace

cudaError_t attend(const ChunkAttentionParams& p, const KeyLists& lists, const Splits& splits,
                   float* lse, cudaStream_t stream) {
  return dispatch(p.q.dtype, p.layout, p.spec.D, Attend{p, lists, splits, lse, stream});
}

int64_t chunk_attention_workspace(const ChunkAttentionParams& p) { return Workspace(p).bytes; }

cudaError_t chunk_attention(const ChunkAttentionParams& p, cudaStream_t stream) {
  if (p.B * p.spec.K * (p.T + p.layout.S) == 0) return cudaSuccess;
  if (!aligned16({p.q.data, p.call.k.data, p.call.v.data, p.pool.data, p.out.data, p.workspace})) {
    return cudaErrorMisalignedAddress;
  }
  const Workspace workspace(p);
  cudaError_t error = list_keys(p, workspace.lists, stream);
  if (error == cudaSuccess && p.T > 0) {
    error = attend(p, workspace.lists, workspace.splits, p.spec.scores ? workspace.lse : nullptr,
                   stream);
  }
  if (error == cudaSuccess) error = sum_columns(p, workspace.lists, workspace.lse, stream);
  return error;
}

}  // namespace less::cuda
