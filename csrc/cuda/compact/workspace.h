// What compact's kernels tell each other, in the caller's workspace.
#pragma once

#include "cuda/codec.h"
#include "cuda/device.h"
#include "params.h"

namespace less::cuda {

// What a slot does with the call: it stays as it is, is empty, or takes that token; or, less than
// all of these, the one of hot slot kFromHot - take.
constexpr int32_t kStays = -1;
constexpr int32_t kEmpty = -2;
constexpr int32_t kFromHot = -3;

// Tokens that one block folds: as many as make 64 blocks of a head, and 256 at least.
constexpr int64_t kStrip = 256;
constexpr int64_t kMostStrips = 64;

__host__ __device__ inline int64_t strip_tokens(int64_t n) {
  const int64_t even = (n + kMostStrips - 1) / kMostStrips;
  return even < kStrip ? kStrip : (even + 31) / 32 * 32;
}

__host__ __device__ inline int64_t strip_count(int64_t n) {
  return (n + strip_tokens(n) - 1) / strip_tokens(n);
}

// Whether what leaves goes into the state.
inline bool folds(const CompactParams& p) { return p.spec.victim == Victim::fold; }

// Whether it becomes part of who stays.
inline bool merges(const CompactParams& p) { return p.spec.victim == Victim::merge; }

// A kv head of a row that has a page.
struct HeadRow {
  int64_t row;  // b * K + h
  int b;
  int h;
  unsigned char* page;

  LESS_DEVICE HeadRow(const CompactParams& p, int64_t row)
      : row(row), b(int(row / p.spec.K)), h(int(row - b * p.spec.K)), page(less::page(p.pool, b)) {}
};

// S: slots of the head that has most.
struct CompactWorkspace {
  uint32_t* key;      // [B*K, candidates]  ranks as integers in their order; 0: no token
  int32_t* free;      // [B*K, S]           slots that may be taken, ascending
  int32_t* take;      // [B*K, S]           kStays, kEmpty, a token, or a hot slot's
  int32_t* position;  // [B*K, S]           of the token that the slot takes
  int32_t* list;      // [B*K, T]           those who leave: a slot, or S + token
  int32_t* leaving;   // [B*K]              how many
  int32_t* tokens;    // [B*K]              valid tokens of the call
  float* psi;         // [B*K, T, R]        features of the list
  float* part;        // [B*K, strips, part]  a strip's sums: [R, D] of H, then [R] of z
  // Where those who leave are merged: what slots that are not hot would hold of them, oldest first.
  int32_t* when;  // [B*K, T]  positions, in the order of the list; null: they are not merged
  int32_t* left_position;  // [B*K, T]
  float* left_score;       // [B*K, T]
  float* left_weight;      // [B*K, T]
  int32_t* into;           // [B*K, T]  the slots that they become part of; -1: none
  StoredRows left_k;       // [B*K, T, D]
  StoredRows left_v;
  int64_t candidates;  // S + T, and up to a multiple of 4
  int64_t strips;      // at most
  int64_t part_size;   // floats, a multiple of 4
  int64_t bytes;

  explicit CompactWorkspace(const CompactParams& p) {
    const int64_t heads = p.B * p.spec.K, S = p.layout.S, D = p.spec.D, R = p.layout.R;
    bytes = 0;
    candidates = (S + p.T + 3) / 4 * 4;
    take_array(p.workspace, heads * candidates, &key);
    take_array(p.workspace, heads * S, &free);
    take_array(p.workspace, heads * S, &take);
    take_array(p.workspace, heads * S, &position);
    take_array(p.workspace, heads * p.T, &list);
    take_array(p.workspace, heads, &leaving);
    take_array(p.workspace, heads, &tokens);
    psi = part = nullptr;
    strips = p.T < kStrip * kMostStrips ? (p.T + kStrip - 1) / kStrip : kMostStrips;
    part_size = R * D + (R + 3) / 4 * 4;
    if (folds(p)) {
      take_array(p.workspace, heads * p.T * R, &psi);
      take_array(p.workspace, heads * strips * part_size, &part);
    }
    when = left_position = into = nullptr;
    left_score = left_weight = nullptr;
    left_k = left_v = {};
    if (!merges(p)) return;
    take_array(p.workspace, heads * p.T, &when);
    take_array(p.workspace, heads * p.T, &left_position);
    take_array(p.workspace, heads * p.T, &left_score);
    take_array(p.workspace, heads * p.T, &left_weight);
    take_array(p.workspace, heads * p.T, &into);
    left_k = take_rows(p.workspace, p.layout.k_dtype, heads * p.T, D);
    left_v = take_rows(p.workspace, p.layout.v_dtype, heads * p.T, D);
  }

  // The rows of those who leave a head.
  LESS_DEVICE StoredRows left(const CompactParams& p, int64_t row, bool values) const {
    StoredRows of = values ? left_v : left_k;
    of.rows = of.at(row * p.T, int(p.spec.D));
    if (packed(of.dtype)) {
      of.halves += row * p.T;
    } else if (has_scale(of.dtype)) {
      of.scales += row * p.T;
    }
    return of;
  }

 private:
  template <typename T>
  void take_array(void* base, int64_t n, T** array) {
    *array = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + uintptr_t(bytes));
    bytes += (n * int64_t(sizeof(T)) + 127) / 128 * 128;
  }

  StoredRows take_rows(void* base, DType dtype, int64_t n, int64_t D) {
    StoredRows of{dtype, nullptr, nullptr, nullptr};
    unsigned char* rows;
    take_array(base, n * row_bytes(dtype, D), &rows);
    of.rows = rows;
    if (packed(dtype)) {
      take_array(base, n, &of.halves);
    } else if (has_scale(dtype)) {
      take_array(base, n, &of.scales);
    }
    return of;
  }
};

}  // namespace less::cuda
