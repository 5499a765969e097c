// One plain struct per op: what its kernels read and write. No torch here, and nothing that a CUDA
// kernel could not take by value. Arrays are contiguous, in the order of their shape.
//
// B batch rows, Q query heads, K kv heads, G = Q / K, T tokens of a call, S slots, N tokens, R
// rank, E hidden width of a feature map, D head dim.
#pragma once

#include <cstdint>

namespace less {

// A row of i8 or fp8 has a float scale of its own: x = scale * row; see Slots. fp8 is e4m3, of 4
// bits of exponent and 3 of mantissa, without infinity; no CPU kernel has it.
enum class DType : int32_t { f32 = 0, bf16 = 1, fp16 = 2, i8 = 3, fp8 = 4 };

// What a layer keeps of the tokens that stay.
struct Slots {
  void* k;            // [B, K, S, D]  keys after the rotary embedding, of dtype
  void* v;            // [B, K, S, D]  values, of dtype
  float* k_scale;     // [B, K, S]     of each row of k: max|x| / 127, of fp8 / 448; else null
  float* v_scale;     // [B, K, S]     of each row of v
  int32_t* position;  // [B, K, S]     -1: empty
  float* score;       // [B, K, S]
  float* weight;      // [B, K, S]     log-weights, added to the logits
  DType dtype;
  int64_t S;
};

// Who stays: positions >= seen - recent and < sinks; of the others the highest scores, or scores
// per token of age, or, not by_score, the youngest.
struct Rule {
  int64_t recent;
  int64_t sinks;
  bool by_score;
  bool per_age;
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

// eight[n,:] = round(x[n,:] / scale[n]), scale[n] = max|x[n,:]| / 127, of fp8 / 448
struct QuantizeParams {
  const void* x;  // [rows, D]  of x_dtype
  void* eight;    // [rows, D]  of dtype; written
  float* scale;   // [rows]     written
  DType x_dtype;
  DType dtype;  // i8 or fp8
  int64_t rows;
  int64_t D;
};

enum class MapKind : int32_t { paper = 0, exp = 1 };

// The weights of phi (one set per query head) or psi (one per kv head); design.md, section 2.
struct FeatureMaps {
  const void* w1;          // [heads, D, E]  of w_dtype, as w2
  const void* w2;          // [heads, E, R]
  const float* w1_scale;   // [heads, E]     of each column of w1; null unless w_dtype is i8
  const float* w2_scale;   // [heads, R]     of each column of w2
  const float* bias;       // [heads, R]     exp; null: 0
  const float* mix;        // [heads, R, R]  A of the paper's psi; null: this is phi, or exp
  const float* scale;      // [heads, R]     s1, with mix
  const float* mix_scale;  // [heads, R]     s2, with mix
  MapKind kind;
  DType w_dtype;
  int64_t D;
  int64_t E;
  int64_t R;
};

// y[b,n,t,:] = map_n(x[b,n,t,:])
struct FeatureMapParams {
  FeatureMaps maps;
  const void* x;  // [B, heads, T, D]  queries or keys after the rotary embedding, of x_dtype
  float* y;       // [B, heads, T, R]  features, >= 0; written
  DType x_dtype;
  int64_t B;
  int64_t heads;
  int64_t T;
};

// Query rows (query heads of one kv head, times tokens) that the CPU attends with at once.
constexpr int64_t kAttentionBlock = 64;
// Parts, at most, that a kv head's queries are cut into on the CPU; each sums scores by itself.
constexpr int64_t kScoreStrips = 16;

// out = (phi H + sum e^l v) / (phi z + sum e^l) over slots, state and, causally, the call's tokens;
// scores: what each of them received, by the softmax over slots and call alone.
struct ChunkAttentionParams {
  const void* q;         // [B, Q, T, D]  of q_dtype
  const void* k;         // [B, K, T, D]  of the slots' dtype, as v
  const void* v;         // [B, K, T, D]
  const float* k_scale;  // [B, K, T]   of each row of k; null unless the slots are i8 or fp8
  const float* v_scale;  // [B, K, T]   of each row of v
  const bool* valid;     // [B, T]        false: padding; null: all valid
  Slots slots;           // only read
  const float* phi_q;    // [B, Q, T, R]  null: no state
  const float* H;        // [B, K, R, D]  with phi_q
  const float* z;        // [B, K, R]     with phi_q
  void* out;             // [B, Q, T, D]  of q_dtype; written, 0 for padding
  float* slot_score;     // [B, K, S]     after the call; written
  float* chunk_score;    // [B, K, T]     of the call's tokens; written
  float* share;          // [B, Q, T]     mass taken by the state, of 1; written
  float* received;       // [B, K, strips, S + T]  the CPU's scratch: what a strip gave each key
  void* workspace;       // a GPU's scratch; see cuda/kernels.h
  DType q_dtype;
  bool scores;  // false: slot_score is the slots' score, chunk_score is 0
  float scale;
  float softcap;  // 0: none; else logits become softcap * tanh(scale * q.k / softcap) + weight
  float decay;    // what a score keeps per token
  int64_t strips;
  int64_t B;
  int64_t Q;
  int64_t K;
  int64_t T;
  int64_t D;
  int64_t R;
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

// The call's tokens join the slots; what no longer fits is folded into H, z and forgotten.
struct CompactParams {
  const void* k;             // [B, K, T, D]  of the slots' dtype, as v
  const void* v;             // [B, K, T, D]
  const float* k_scale;      // [B, K, T]    of each row of k; null unless the slots are i8 or fp8
  const float* v_scale;      // [B, K, T]    of each row of v
  const float* chunk_score;  // [B, K, T]
  const float* slot_score;   // [B, K, S]    the slots' scores after the call
  const bool* valid;         // [B, T]        false: padding; null: all valid
  const float* rank;         // [B, K, S + T] the policy's own ranks; null: by the rule below
  Slots slots;               // written
  int64_t* seen;             // [B]           tokens seen before the call; a launcher adds its own
  float* H;                  // [B, K, R, D]  written; null: eviction alone
  float* z;                  // [B, K, R]     written
  void* workspace;           // a GPU's scratch; see cuda/kernels.h
  FeatureMaps psi;
  Rule rule;
  int64_t B;
  int64_t K;
  int64_t T;
  int64_t D;
  int64_t R;
};

// What becomes of the token that leaves. `none`: nothing joins and nothing leaves, so that a step
// is attention alone, which writes out and share and nothing else.
enum class Victim : int32_t { none = 0, forget = 1, fold = 2 };

// One token of every row: attend, score, choose the victim, fold it, take its slot.
struct DecodeStepParams {
  const void* q;      // [B, Q, D]  of q_dtype
  const void* k;      // [B, K, D]  of kv_dtype, as v; rounded to the slots' dtype on entry
  const void* v;      // [B, K, D]
  const bool* valid;  // [B]        false: this row has no token; null: all have
  int64_t* seen;      // [B]        tokens seen before the step; a launcher adds its own
  Slots slots;        // written
  float* H;           // [B, K, R, D]  null: no state; written by Victim::fold
  float* z;           // [B, K, R]
  double* share;      // [B, K]     plus the state's share of each query's mass; with H
  void* workspace;    // a GPU's scratch; see cuda/kernels.h
  FeatureMaps phi;    // with H
  FeatureMaps psi;    // with H

  void* out;  // [B, Q, D]  of q_dtype; written, 0 for a row without a token
  Rule rule;
  Victim victim;
  DType q_dtype;
  DType kv_dtype;
  bool scores;     // false: scores stay as they are, the new token's is 0
  bool dependent;  // the launch may begin before the kernel before it is over, on sm_90 and later
  float scale;
  float softcap;  // 0: none; else logits become softcap * tanh(scale * q.k / softcap) + weight
  float decay;    // what a score keeps per token
  int64_t B;
  int64_t Q;
  int64_t K;
  int64_t D;
  int64_t R;
};

}  // namespace less
