// The page: everything that one layer holds of one sequence, and the only arithmetic that finds an
// address in it. less/layer/layout.py is the same in Python; a test holds one to the other.
//
//   header   int64 seen, 8 bytes of nothing, double share[K]
//   head 0   position [S]  k [S, D]  k_scale [S]  weight [S]  v [S, D]  v_scale [S]  z [R]
//            H [R, D]  score [S]
//   head 1   ...           each head with a number of slots S of its own
//
// The fields of a head lie in the order in which a step reads them. Every field begins at a
// multiple of kFieldAlign bytes; a head's rows are contiguous. Scales exist for rows of 8 bits
// alone, z and H where R > 0.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace less {

constexpr int64_t kFieldAlign = 128;
constexpr int kMaxKvHeads = 128;

// How a layer's pages are laid out; the same for all of them.
struct Layout {
  int64_t nbytes;  // of a page
  int32_t K;
  int32_t D;
  int32_t R;                   // rank of the state; 0: there is none
  int32_t S;                   // slots of the head that has most
  DType dtype;                 // of k and v
  int32_t slots[kMaxKvHeads];  // of each head
  int32_t first[kMaxKvHeads];  // where each head begins, in units of kFieldAlign
};

// What one head keeps of the tokens that stay.
struct Slots {
  int32_t* position;  // [S]     -1: empty
  void* k;            // [S, D]  keys after the rotary embedding, of the layout's dtype
  float* k_scale;     // [S]     of each row of k: max|x| / 127, of fp8 / 448; else null
  float* weight;      // [S]     log-weights, added to the logits
  void* v;            // [S, D]  values
  float* v_scale;     // [S]     of each row of v
  float* score;       // [S]
  int64_t S;
};

// What one head keeps of those that left; null where R = 0.
struct State {
  float* H;       // [R, D]
  float* z;       // [R]
  double* share;  // sum over queries of the state's part of the attention mass; never null
};

struct Head {
  Slots slots;
  State state;
};

LESS_HD constexpr int64_t field_bytes(int64_t bytes) {
  return (bytes + kFieldAlign - 1) / kFieldAlign * kFieldAlign;
}

// Where the fields of a head with S slots begin, in bytes from the head's own beginning.
struct HeadOffsets {
  int64_t position, k, k_scale, weight, v, v_scale, z, H, score, nbytes;
};

LESS_HD constexpr HeadOffsets head_offsets(DType dtype, int64_t D, int64_t R, int64_t S) {
  const int64_t numbers = field_bytes(4 * S), rows = field_bytes(row_bytes(dtype, D) * S);
  const int64_t scales = has_scale(dtype) ? numbers : 0;
  HeadOffsets at{};
  at.k = at.position + numbers;
  at.k_scale = at.k + rows;
  at.weight = at.k_scale + scales;
  at.v = at.weight + numbers;
  at.v_scale = at.v + rows;
  at.z = at.v_scale + scales;
  at.H = at.z + field_bytes(4 * R);
  at.score = at.H + field_bytes(4 * R * D);
  at.nbytes = at.score + numbers;
  return at;
}

LESS_HD constexpr int64_t header_bytes(int64_t K) { return field_bytes(16 + 8 * K); }

// The layout of K <= kMaxKvHeads heads, of slots[h] slots each.
inline Layout make_layout(DType dtype, int64_t K, int64_t D, int64_t R, const int64_t* slots) {
  Layout layout{};
  layout.K = int32_t(K);
  layout.D = int32_t(D);
  layout.R = int32_t(R);
  layout.dtype = dtype;
  int64_t at = header_bytes(K);
  for (int64_t h = 0; h < K; ++h) {
    layout.slots[h] = int32_t(slots[h]);
    layout.first[h] = int32_t(at / kFieldAlign);
    layout.S = layout.slots[h] > layout.S ? layout.slots[h] : layout.S;
    at += head_offsets(dtype, D, R, slots[h]).nbytes;
  }
  layout.nbytes = at;
  return layout;
}

// Tokens that the page's sequence has seen.
LESS_HD int64_t* seen(unsigned char* page) { return reinterpret_cast<int64_t*>(page); }

// All fields of a head, where one follows the other.
struct Span {
  unsigned char* data;
  int64_t nbytes;
};

LESS_HD Span head_span(const Layout& layout, unsigned char* page, int64_t h) {
  const int64_t begin = layout.first[h] * kFieldAlign;
  const int64_t end = h + 1 < layout.K ? layout.first[h + 1] * kFieldAlign : layout.nbytes;
  return {page + begin, end - begin};
}

// The head of a layer whose dtype and head dim the caller knows: those of the layout, or constants
// that are equal to them.
LESS_HD Head head(const Layout& layout, unsigned char* page, int64_t h, DType dtype, int64_t D) {
  const int64_t S = layout.slots[h];
  const HeadOffsets at = head_offsets(dtype, D, layout.R, S);
  unsigned char* const base = head_span(layout, page, h).data;
  const bool scaled = has_scale(dtype), state = layout.R > 0;
  const auto floats = [base](int64_t offset) { return reinterpret_cast<float*>(base + offset); };
  return {
      .slots = {.position = reinterpret_cast<int32_t*>(base + at.position),
                .k = base + at.k,
                .k_scale = scaled ? floats(at.k_scale) : nullptr,
                .weight = floats(at.weight),
                .v = base + at.v,
                .v_scale = scaled ? floats(at.v_scale) : nullptr,
                .score = floats(at.score),
                .S = S},
      .state = {.H = state ? floats(at.H) : nullptr,
                .z = state ? floats(at.z) : nullptr,
                .share = reinterpret_cast<double*>(page + 16) + h},
  };
}

LESS_HD Head head(const Layout& layout, unsigned char* page, int64_t h) {
  return head(layout, page, h, layout.dtype, layout.D);
}

// A layer's pages, and which of them a call's rows use.
struct Pool {
  unsigned char* data;  // [N, stride], at a multiple of 16 bytes
  int64_t stride;       // bytes from a page to the next, a multiple of kFieldAlign
  int64_t N;
  const int32_t* pages;  // [B]  null: row b has page b
  const int32_t* fresh;  // [B]  not 0: the page begins, whatever it holds; null: none does
  int32_t null_page;     // the page that is none; so is every number outside 0 .. N - 1
};

// The page of a row; null where it has none.
LESS_HD unsigned char* page(const Pool& pool, int64_t b) {
  const int64_t index = pool.pages == nullptr ? b : pool.pages[b];
  const bool none = index < 0 || index >= pool.N || index == pool.null_page;
  return none ? nullptr : pool.data + index * pool.stride;
}

// A page becomes that of an empty sequence.
inline void clear_page(const Layout& layout, unsigned char* page) {
  std::memset(page, 0, layout.nbytes);
  for (int64_t h = 0; h < layout.K; ++h) {
    const Slots slots = head(layout, page, h).slots;
    std::memset(slots.position, 0xff, slots.S * sizeof *slots.position);
  }
}

}  // namespace less
