// score[n] += sum over the G query heads of the tokens i that see key n of
//   e^(l - lse) decay^(tokens after i),   l = scale q.k + weight
//
// column_kernel: grid (B K (ceil(S / kColumns) + ceil(T / kColumns))), slots first: they have the
//   most queries. A block owns kColumns keys, 16 a warp, and tiles of kQueries queries stream
//   through shared memory: k q^T by tensor cores, weights, their sum along the queries. Tokens of
//   the call begin with the queries that see them. Where no lse is given, attend_kernel of
//   chunk_attention.cu computes it first, without values.
// Memory: q once per block, 2 D bytes a query, from the second-level cache after the first; never
//   anything of T x T.
// Order:  queries ascending, tile by tile; one owner per key.
#include <cmath>

#include "cuda/kernels.h"
#include "cuda/notes.h"
#include "cuda/row_tiles.h"

namespace less::cuda {

template <typename Scheme, int kD>
struct ColumnShape {
  static constexpr int kColumns = kIsWide<Scheme> && kD > 128 ? 32 : 64;
  static constexpr int kQueries = kIsWide<Scheme> ? 32 : 64;
  static constexpr int kThreads = kColumns * 2;
  static constexpr int kStages = kIsWide<Scheme> ? 1 : 2;  // of queries
  static constexpr int kQueryTile = Scheme::kParts * kQueries * kD;
};

template <typename Scheme, int kD>
struct ColumnShared {
  using Shape = ColumnShape<Scheme, kD>;
  uint16_t* k;   // a tile
  uint16_t* q;   // [kStages] tiles
  float* shift;  // [2, kQueries]  of the queries of even and of odd tiles

  __host__ __device__ ColumnShared(SharedCarver& c)
      : k(c.take<uint16_t>(Scheme::kParts * Shape::kColumns * kD)),
        q(c.take<uint16_t>(Shape::kStages * Shape::kQueryTile)),
        shift(c.take<float>(2 * Shape::kQueries)) {}
};

// The same number, of which the compiler knows nothing: what follows from it is computed where it
// is wanted, and takes no registers before.
LESS_DEVICE int forgotten(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// x log2(decay), in float, for decay^x = 2^fade; decay^0 is 1 for any decay.
LESS_DEVICE float fade_of(float log_decay, int x) { return x == 0 ? 0.0f : float(x) * log_decay; }

// What the exponent of a query's weights is less by, in units of log 2: the logarithm of its mass,
// and what its score will have decayed by. Infinity where there is no query, or no mass.
LESS_DEVICE float shift_of(const ChunkAttentionParams& p, const KeyLists& lists, const KvHead& head,
                           const float* lse, float log_decay, int m) {
  if (m >= head.tokens * head.G) return kInfinity;
  const float mass = lse[head.query_at(p, lists, m)];  // narrow: a lane a query, side by side
  if (mass == -kInfinity) return kInfinity;
  return mass * kLog2E - fade_of(log_decay, head.tokens - 1 - m / head.G);
}

// Adds up, for a thread's two keys, what the queries of a tile give them. begin: the first query
// of the call, counted from the tile's first, that sees the key.
template <typename Scheme, int kQueries>
LESS_DEVICE void add_weights(const Logit& logit, const float (&scale)[2], const float (&weight)[2],
                             const float* shift, bool masked, const int (&begin)[2],
                             float (&s)[kQueries / 8][4], float (&sum)[2]) {
  const int lane = int(threadIdx.x) % 32;
  const bool capped = logit.cap(s, [&](int, int j) { return scale[j / 2]; });
  float part[2] = {0.0f, 0.0f};
#pragma unroll
  for (int n = 0; n < kQueries / 8; ++n) {
    const int query = 8 * n + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = j / 2;
      const float more = weight[i] - shift[query + j % 2];
      const float e = exp2_approx(fmaf(s[n][j], capped ? 1.0f : scale[i], more));
      part[i] += masked && query + j % 2 < begin[i] ? 0.0f : e;
    }
  }
  sum[0] += part[0];
  sum[1] += part[1];
}

template <typename Scheme, int kD>
__global__ void __launch_bounds__(ColumnShape<Scheme, kD>::kThreads, kD > 128 ? 2 : 4)
    column_kernel(const __grid_constant__ ChunkAttentionParams p, const KeyLists lists,
                  const float* lse, float log_decay, int slot_blocks, int blocks) {
  using Shape = ColumnShape<Scheme, kD>;
  constexpr int kQueries = Shape::kQueries;
  DYN_SMEM(memory);
  SharedCarver carver{memory};
  const ColumnShared<Scheme, kD> shared(carver);
  const KvHead head(p, lists, int(blockIdx.x) / blocks);
  const int block = int(blockIdx.x) % blocks;
  // Hot slots, then the others, then the call.
  const int hot_blocks = (hot_slots(p.layout) + Shape::kColumns - 1) / Shape::kColumns;
  const bool slots = block < slot_blocks, hot = block < hot_blocks;
  const int first = (block - (hot ? 0 : slots ? hot_blocks : slot_blocks)) * Shape::kColumns;
  const Source from = source_of<kIsWide<Scheme>>(p, lists, head,
                                                 hot     ? Keys::hot
                                                 : slots ? Keys::slots
                                                         : Keys::call,
                                                 head.tokens);
  const int thread = int(threadIdx.x), lane = thread % 32, row = thread / 32 * 16;

  // Tiles of queries: those of the call that see none of the block's keys are left out.
  const int queries = p.spec.scores && first < from.count ? head.tokens * head.G : 0;
  const int begin_tile = slots ? 0 : first * head.G / kQueries;
  const int end_tile = (queries + kQueries - 1) / kQueries;

  const auto key = [&](int r) -> int64_t {
    const int n = first + r;
    // narrow: a number of a row, whose lanes read it
    return n >= from.count ? -1 : from.index == nullptr ? n : from.index[n];
  };
  const auto key_row = [&](int r) -> int64_t {
    const int64_t n = key(r);
    return n < 0 ? -1 : (kIsWide<Scheme> ? n - from.base : n) * from.k_step;
  };
  const auto fetch = [&](int tile, uint16_t* q) {
    const auto query = [&](int r) -> int64_t {
      const int m = tile * kQueries + r;
      return m < queries ? head.query_row(p.q, p, lists, m) : -1;
    };
    if constexpr (kIsWide<Scheme>) {
      split_rows<typename Scheme::KeyTag, Scheme::kParts, kD, kQueries, Shape::kThreads>(
          p.q.data, p.q.dtype, p.spec.D, query, q);
    } else {
      copy_rows<kD, kQueries, Shape::kThreads>(p.q.data, p.spec.D, query, q);
    }
  };
  float sum[2] = {0.0f, 0.0f};
  if (begin_tile < end_tile) {
    if constexpr (kIsPlain<Scheme>) {
      copy_rows<kD, Shape::kColumns, Shape::kThreads>(from.k, p.spec.D, key_row, shared.k);
    } else if constexpr (kIsWide<Scheme>) {
      split_rows<typename Scheme::KeyTag, Scheme::kParts, kD, Shape::kColumns, Shape::kThreads>(
          from.k, from.k_dtype, p.spec.D, key_row, shared.k);
    } else {
      Bytes<kD, Shape::kColumns, Shape::kThreads> bytes;
      bytes.fetch(from.k, p.spec.D, key_row);
      bytes.template place<typename Scheme::KeyTag>(p.layout.k_dtype, shared.k);
    }
    const Logit logit(p);
    float scale[2], weight[2];
    int sees[2];  // the first query that sees the key
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = row + lane / 4 + 8 * i;
      const int64_t at = key(n);
      scale[i] = logit.scale;
      if (Scheme::kScaled && at >= 0 && from.k_scale != nullptr) {
        scale[i] *= kIsWide<Scheme> ? scale_at(from.k_scale, from.k_dtype, at - from.base)
                                    : scale_at(from.k_scale, DType::i8, at);
      }
      weight[i] = at >= 0 ? log_weight_of<kIsWide<Scheme>>(from, at) : 0.0f;
      sees[i] = slots ? 0 : (first + n) * head.G;
    }
    const int sees_last = slots ? 0 : (first + row + 15) * head.G;  // of the warp's keys

    float shift = kInfinity;
    const auto fetch_shift = [&](int tile) {
      if (thread < kQueries)
        shift = shift_of(p, lists, head, lse, log_decay, tile * kQueries + thread);
    };
    const auto place_shift = [&](int tile) {
      const int half = tile % 2;
      if (thread < kQueries) shared.shift[half * kQueries + thread] = shift;
    };
    if constexpr (!kIsWide<Scheme>)
      fetch(begin_tile, shared.q + begin_tile % 2 * Shape::kQueryTile);
    copy_async_commit();
    fetch_shift(begin_tile);
    place_shift(begin_tile);
    for (int tile = begin_tile; tile < end_tile; ++tile) {
      const uint16_t* q = shared.q + tile % Shape::kStages * Shape::kQueryTile;
      const bool more = tile + 1 < end_tile;
      if constexpr (Shape::kStages == 1) fetch(tile, shared.q);
      copy_async_wait<0>();
      __syncthreads();
      if constexpr (Shape::kStages == 2) {
        if (more) fetch(tile + 1, shared.q + (tile + 1) % 2 * Shape::kQueryTile);
        copy_async_commit();
      }
      if (more) fetch_shift(tile + 1);
      float s[kQueries / 8][4];
      dot_products<typename Scheme::KeyTag, Scheme::kParts, kD, Shape::kColumns, kQueries>(
          shared.k, row, q, s);
      const int begin[2] = {sees[0] - tile * kQueries, sees[1] - tile * kQueries};
      add_weights<Scheme, kQueries>(logit, scale, weight, shared.shift + tile % 2 * kQueries,
                                    tile * kQueries < sees_last, begin, s, sum);
      if (more) place_shift(tile + 1);
      if constexpr (Shape::kStages == 1) {
        __syncthreads();  // the next takes this one's place
      }
    }
  }

  // Every key that there is, or might be, is written: the empty slots and padding come last.
  const int64_t all = hot ? head.hot : slots ? p.layout.S - head.hot : p.T;
  float* to = p.score + head.row * (p.layout.S + p.T) + (slots ? 0 : p.layout.S);
  const float kept = p.spec.scores ? exp2_approx(fade_of(log_decay, head.tokens)) : 1.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float score = sum_of_quad(sum[i]);
    const int n = first + row + lane / 4 + 8 * i;
    if (lane % 4 != 0 || n >= all) continue;
    const int at = from.index == nullptr ? n : from.index[n];  // narrow: a lane a key, side by side
    if (n >= from.count) score = 0.0f;
    if (slots && n < from.count) {
      unsigned char* const memory = page(p.pool, forgotten(int(head.b)));
      const Slots of = less::head(p.layout, memory, forgotten(int(head.h))).slots;
      score = fmaf(score_at(packed(p.layout.v_dtype), of, at), kept, score);
    }
    store(to + at, score);
  }
}

namespace {

struct SumColumns {
  const ChunkAttentionParams& p;
  const KeyLists& lists;
  const float* lse;
  cudaStream_t stream;

  template <typename Scheme, int kD>
  cudaError_t launch() const {
    using Shape = ColumnShape<Scheme, kD>;
    SharedCarver carver{nullptr};
    const ColumnShared<Scheme, kD> shared(carver);
    const auto blocks_of = [](int64_t n) { return (n + Shape::kColumns - 1) / Shape::kColumns; };
    const int64_t slot_blocks = blocks_of(hot_slots(p.layout)) + blocks_of(p.layout.S);
    const int64_t blocks = slot_blocks + (p.T + Shape::kColumns - 1) / Shape::kColumns;
    const Launch how{dim3(unsigned(blocks * p.B * p.spec.K)), dim3(Shape::kThreads), carver.used,
                     stream};
    const float log_decay = float(std::log2(double(p.spec.decay)));
    return cuda::launch(column_kernel<Scheme, kD>, how, p, lists, lse, log_decay, int(slot_blocks),
                        int(blocks));
  }
};

// The workspace, cut.
struct Workspace {
  KeyLists lists{};
  int64_t bytes;

  explicit Workspace(const PromptScoresParams& p) {
    Carver carver{p.workspace};
    lists.token = carver.take<int32_t>(p.B * p.T);
    lists.tokens = carver.take<int32_t>(p.B);
    bytes = carver.used;
    if (p.valid == nullptr) lists.token = lists.tokens = nullptr;
  }
};

// The call whose score this is: a chunk of a layer without slots, and without values.
ChunkAttentionParams as_chunk(const PromptScoresParams& p) {
  ChunkAttentionParams chunk{};
  chunk.spec.Q = p.Q;
  chunk.spec.K = p.K;
  chunk.spec.D = p.D;
  chunk.spec.scale = p.scale;
  chunk.spec.softcap = p.softcap;
  chunk.spec.decay = p.decay;
  chunk.spec.scores = true;
  chunk.layout.k_dtype = chunk.layout.v_dtype = chunk.layout.call_dtype = p.k_dtype;
  chunk.q = contiguous_rows(p.q, p.q_dtype, p.Q, p.T, p.D);
  chunk.call.k = contiguous_rows(p.k, p.k_dtype, p.K, p.T, p.D);
  chunk.call.k_scale = p.k_scale;
  chunk.valid = p.valid;
  chunk.score = p.score;
  chunk.B = p.B;
  chunk.T = p.T;
  return chunk;
}

}  // namespace

int64_t prompt_scores_workspace(const PromptScoresParams& p) { return Workspace(p).bytes; }

cudaError_t prompt_scores(const PromptScoresParams& p, cudaStream_t stream) {
  if (p.B * p.Q * p.T == 0) return cudaSuccess;
  if (!aligned16({p.q, p.k, p.workspace})) return cudaErrorMisalignedAddress;
  const Workspace workspace(p);
  const ChunkAttentionParams chunk = as_chunk(p);
  cudaError_t error = list_keys(chunk, workspace.lists, stream);
  if (error == cudaSuccess && !p.lse_given) {
    error = attend(chunk, workspace.lists, Splits{}, p.lse, stream);
  }
  if (error == cudaSuccess) error = sum_columns(chunk, workspace.lists, p.lse, stream);
  return error;
}

cudaError_t sum_columns(const ChunkAttentionParams& p, const KeyLists& lists, const float* lse,
                        cudaStream_t stream) {
  return dispatch(p.q.dtype, p.layout, p.spec.D, SumColumns{p, lists, lse, stream});
}

}  // namespace less::cuda
