// One plain struct per op: what its kernels read and write. No torch here, and nothing that a CUDA
// kernel could not take by value. Arrays are contiguous, in the order of their shape, but for those
// of a page (common/layout.h) and HeadRows.
//
// B batch rows, Q query heads, K kv heads, G = Q / K, T tokens of a call, S slots, N tokens, R
// rank, E hidden width of a feature map, D head dim.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/layout.h"
#include "common/rule.h"
#include "common/space.h"

namespace less {

// Rows of heads in a caller's tensor [B, heads, T, D]: each row is contiguous, the other strides
// are the caller's, so that tokens may lie before heads.
struct HeadRows {
  void* data;
  DType dtype;
  int64_t b, h, t;  // strides, in elements
};

// Elements from data to a row.
LESS_HD int64_t offset(const HeadRows& rows, int64_t b, int64_t h, int64_t t) {
  return b * rows.b + h * rows.h + t * rows.t;
}

// Rows of a contiguous array [B, heads, T, D].
inline HeadRows contiguous_rows(const void* data, DType dtype, int64_t heads, int64_t T,
                                int64_t D) {
  return {.data = const_cast<void*>(data), .dtype = dtype, .b = heads * T * D, .h = T * D, .t = D};
}

// What becomes of the token that leaves. `none`: nothing joins and nothing leaves, so that a step
// is attention alone, which writes out and share and nothing else. `merge`: a slot that stays
// becomes the mean of both (less/reference/merge.py).
enum class Victim : int32_t { none = 0, forget = 1, fold = 2, merge = 3 };
inline constexpr Victim kLastVictim = Victim::merge;

// Whether slots stand for several tokens, and hence have log-weights.
constexpr bool weighs(Victim victim) { return victim == Victim::merge; }

// What is the same in every call of a layer.
struct LayerSpec {
  int64_t Q;
  int64_t K;
  int64_t D;
  float scale;     // factor of q.k
  float softcap;   // 0: none; else logits become softcap * tanh(scale * q.k / softcap) + weight
  float decay;     // what a score keeps per token
  bool scores;     // false: scores stay as they are, a new token's is 0
  bool dependent;  // a launch may begin before the kernel before it is over, on sm_90 and later
  Victim victim;
  Rule rule;
};

// H[b,k,r,:] += sum_n psi_k[b,k,n,r] v[b,k,n,:]     z[b,k,r] += sum_n psi_k[b,k,n,r]
struct FoldParams {
  float* H;            // [B, K, R, D]  running sum of psi(k) v^T; written
  float* z;            // [B, K, R]     running sum of psi(k); written
  const float* psi_k;  // [B, K, N, R]  features of the evicted keys, >= 0
  const void* v;       // [B, K, N, D]  their values, of v_dtype
  const bool* keep;    // [B, K, N]     false: this token is not folded, nor read; null: fold all
  DType v_dtype;
  int64_t heads;  // B * K
  int64_t N;
  int64_t R;
  int64_t D;
};

// eight[n,:] = round(x[n,:] / scale[n]), scale[n] = max|x[n,:]| / 127, of fp8 / 448; n: a row
struct QuantizeParams {
  HeadRows x;    // [B, heads, T, D]
  void* eight;   // [B, heads, T, D]  of dtype; written
  float* scale;  // [B, heads, T]     written
  DType dtype;   // i8 or fp8
  int64_t B;
  int64_t heads;
  int64_t T;
  int64_t D;
};

enum class MapKind : int32_t { paper = 0, exp = 1, centroid = 2 };

// The weights of phi (one set per query head) or psi (one per kv head); design.md, section 2.
// Of centroids, w1 is the one matrix: heads of a group share it, E is R, and there is no w2.
struct FeatureMaps {
  const void* w1;          // [heads / group, D, E]  of w_dtype, as w2
  const void* w2;          // [heads, E, R]
  const float* w1_scale;   // [heads / group, E]     of each column of w1; null unless of i8
  const float* w2_scale;   // [heads, R]     of each column of w2
  const float* bias;       // [heads, R]     exp; null: 0; centroid
  const float* mix;        // [heads, R, R]  A of the paper's psi; null: this is phi, or exp
  const float* scale;      // [heads, R]     s1, with mix
  const float* mix_scale;  // [heads, R]     s2, with mix
  const float* factor;     // [heads]        centroid: of x c
  const float* weight;     // [heads, D]     centroid, psi: of x in the log of its mass; null: phi
  const float* offset;     // [heads]        with weight
  MapKind kind;
  DType w_dtype;
  int64_t group = 1;  // heads that share a matrix
  int64_t D;
  int64_t E;
  int64_t R;
};

// Whether psi takes keys without the mean of their space, and the state stands in the coordinates
// of the slots' logits; else what those lack counts where they meet the state.
LESS_HD constexpr bool centred(MapKind kind) { return kind == MapKind::centroid; }

// A layer's maps, of rank 0 where it has none; and the space of its rows.
struct Maps {
  FeatureMaps phi;  // of Q heads
  FeatureMaps psi;  // of K heads
  Space space;
};

// y = x in a layer's space, or back out of it
struct RotateParams {
  Space space;
  HeadRows x;         // [B, heads, T, D]
  float* y;           // [B, heads, T, D]  written
  const bool* valid;  // [B, T]            false: y is 0; null: all valid
  Rotation rotation;
  int64_t B;
  int64_t heads;  // Q of queries and output, K of keys and values
  int64_t K;
  int64_t T;
  int64_t D;
};

// y[b,n,t,:] = map_n(x[b,n,t,:])
struct FeatureMapParams {
  FeatureMaps maps;
  HeadRows x;  // [B, heads, T, D]  queries or keys after the rotary embedding
  float* y;    // [B, heads, T, R]  features, >= 0; written
  int64_t B;
  int64_t heads;
  int64_t T;
};

// Query rows (query heads of one kv head, times tokens) that the CPU attends with at once.
constexpr int64_t kAttentionBlock = 64;
// Parts, at most, that a kv head's queries are cut into on the CPU; each sums scores by itself.
constexpr int64_t kScoreStrips = 16;

// Pages that begin become those of an empty sequence, whatever they hold.
struct ResetParams {
  Layout layout;
  Pool pool;
  int64_t B;
};

// A call's keys and values in the dtype of the slots, [B, K, T, D].
struct CallRows {
  HeadRows k;
  HeadRows v;
  const float* k_scale;  // [B, K, T]  of each row of k; null unless it is i8 or fp8
  const float* v_scale;  // [B, K, T]  of each row of v
};

// out = (phi H + sum e^l v) / (phi z + sum e^l) over slots, state and, causally, the call's tokens;
// scores: what each of them received, by the softmax over slots and call alone.
struct ChunkAttentionParams {
  LayerSpec spec;
  Layout layout;
  Pool pool;           // only read, but for pages that begin
  HeadRows q;          // [B, Q, T, D]
  CallRows call;       // [B, K, T, D]
  const bool* valid;   // [B, T]        false: padding; null: all valid
  const float* phi_q;  // [B, Q, T, R]  null: no state; of rows in a space, unless the maps are
                       //               centred, [B, Q, T, R + 1], the last of which is what the
                       //               query's logits lack
  bool shifted;        // whether phi_q has that
  HeadRows out;        // [B, Q, T, D]  of q's dtype; written, 0 for padding and without a page
  float* score;        // [B, K, S + T] after the call, of slots and tokens; written. S: layout.S,
                       //               and 0 where a head has fewer slots
  float* share;        // [B, Q, T]     mass taken by the state, of 1; written
  float* received;     // [B, K, strips, S + T]  the CPU's scratch: what a strip gave each key
  void* workspace;     // a GPU's scratch; see cuda/kernels.h
  int64_t strips;
  int64_t B;
  int64_t T;
};

// score[j] = sum over the queries that see token j, those of its group from token j on, of
// e^(l - lse) decay^(valid tokens after the query)
struct PromptScoresParams {
  const void* q;         // [B, Q, T, D]  of q_dtype
  const void* k;         // [B, K, T, D]  of k_dtype
  const float* k_scale;  // [B, K, T]     of each row of k; null unless k_dtype is i8 or fp8
  const bool* valid;     // [B, T]        false: padding; null: all valid
  float* lse;            // [B, Q, T]     log sum e^l over what each query sees; given, or written
  float* score;          // [B, K, T]     written, 0 for padding
  void* workspace;       // a GPU's scratch; see cuda/kernels.h
  DType q_dtype;
  DType k_dtype;
  bool lse_given;  // false: lse is computed first
  float scale;
  float softcap;  // 0: none; else logits become softcap * tanh(scale * q.k / softcap)
  float decay;    // what a score keeps per token
  int64_t B;
  int64_t Q;
  int64_t K;
  int64_t T;
  int64_t D;
};

// The call's tokens join the slots; what no longer fits is folded into H, z, or forgotten.
struct CompactParams {
  LayerSpec spec;
  Layout layout;
  Pool pool;           // written
  Maps maps;           // psi is used
  CallRows call;       // [B, K, T, D]
  const bool* valid;   // [B, T]         false: padding; null: all valid
  const float* score;  // [B, K, S + T]  after the call, of slots and tokens
  const float* rank;   // [B, K, S + T]  the policy's own ranks; null: by the spec's rule
  void* workspace;     // a GPU's scratch; see cuda/kernels.h
  int64_t B;
  int64_t T;
};

// One token of every row: attend, score, choose the victim, fold it, take its slot.
struct DecodeStepParams {
  LayerSpec spec;
  Layout layout;
  Pool pool;          // written
  Maps maps;          // with a state
  HeadRows q;         // [B, Q, 1, D]
  HeadRows k;         // [B, K, 1, D]  taken into the space and rounded on entry
  HeadRows v;         // [B, K, 1, D]  of k's dtype
  HeadRows out;       // [B, Q, 1, D]  of q's dtype; written, 0 for a row without a token or a page
  const bool* valid;  // [B]           false: this row has no token; null: all have
  void* workspace;    // a GPU's scratch; see cuda/kernels.h
  int64_t B;
};

}  // namespace less
