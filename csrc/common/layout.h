// The page: everything that one layer holds of one sequence, and the only arithmetic that finds an
// address in it. less/layer/layout.py is the same in Python; a test holds one to the other.
//
//   header   int64 seen, 8 bytes of nothing, double share[K]
//   head 0   position [S]
//            hot_k [W, D]  hot_k_scale [W]  k [S - W, D]  k_scale [S - W]  weight or count [S]
//            hot_v [W, D]  hot_v_scale [W]  v [S - W, D]  v_scale [S - W]
//            z [R]  H [R, D]  score [S]
//   head 1   ...           each head with a number of slots S of its own
//
// The fields of a head lie in the order in which a step reads them. A field begins at a multiple of
// the largest power of two that divides its rows' bytes, of kLeastAlign at least and kPageAlign at
// most; heads begin at multiples of kPageAlign. Rows are contiguous. The first W slots are hot:
// those of the first `sinks` tokens, then a ring of the last `hot`. Formats that are not packed
// have none. Scales exist for rows of 8 bits and fewer, z and H where R > 0. Where no row is
// packed, a slot has a float score and a float log-weight; where rows are, an fp16 score, and,
// where the layout asks for it, a count of the tokens that it stands for, whose logarithm is its
// log-weight.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace less {

constexpr int64_t kLeastAlign = 16;  // of a field
constexpr int64_t kPageAlign = 128;  // of a page, and of its heads
constexpr int kMaxKvHeads = 128;

// How a layer's pages are laid out; the same for all of them.
struct Layout {
  int64_t nbytes;  // of a page
  int32_t K;
  int32_t D;
  int32_t R;                   // rank of the state; 0: there is none
  int32_t S;                   // slots of the head that has most, hot ones included
  int32_t sinks;               // hot slots of the first tokens
  int32_t hot;                 // and of the last
  DType k_dtype;               // of keys that are not hot
  DType v_dtype;               // of their values
  DType call_dtype;            // of hot rows and of a call's own; without hot slots that of k
  bool weights;                // whether slots have log-weights or counts; all but packed ones do
  int32_t slots[kMaxKvHeads];  // of each head
  int32_t first[kMaxKvHeads];  // where each head begins, in units of kPageAlign
};

// Hot slots W of each head.
LESS_HD constexpr int32_t hot_slots(const Layout& layout) { return layout.sinks + layout.hot; }

// The hot slot of the token at a position.
LESS_HD constexpr int64_t hot_slot(const Layout& layout, int64_t position) {
  return position < layout.sinks ? position : layout.sinks + (position - layout.sinks) % layout.hot;
}

// Whether a token lies in a hot slot once n tokens were seen.
LESS_HD constexpr bool is_hot(const Layout& layout, int64_t position, int64_t n) {
  return position < layout.sinks || position >= n - layout.hot;
}

// What one head keeps of the tokens that stay.
struct Slots {
  int32_t* position;   // [S]         -1: empty
  void* hot_k;         // [W, D]      of call_dtype, as hot_v; null: there are none
  float* hot_k_scale;  // [W]         of rows of 8 bits
  void* k;             // [S - W, D]  keys after the rotary embedding, of k_dtype
  float* k_scale;      // [S - W]     of each row of k of 8 bits; else null
  uint16_t* k_half;    // [S - W]     of each packed row of k, fp16; else null
  float* weight;       // [S]         log-weights, added to the logits; null: see count
  uint16_t* count;     // [S]         of packed rows: tokens, 0 in an empty slot; null: all are 1
  void* hot_v;         // [W, D]
  float* hot_v_scale;  // [W]
  void* v;             // [S - W, D]  values
  float* v_scale;      // [S - W]     of each row of v
  uint16_t* v_half;    // [S - W]
  float* score;        // [S]         of rows that are not packed; else null
  uint16_t* half;      // [S]         scores of packed rows, fp16
  int64_t S;
  int64_t W;
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

// The next multiple of a power of two.
LESS_HD constexpr int64_t aligned(int64_t bytes, int64_t to) { return (bytes + to - 1) / to * to; }

// What a field begins at a multiple of whose rows have so many bytes.
LESS_HD constexpr int64_t alignment(int64_t row) {
  const int64_t power = row & -row;
  return power < kLeastAlign ? kLeastAlign : power > kPageAlign ? kPageAlign : power;
}

// Formats of a layer's rows, how many slots of a head are hot, and whether slots have log-weights.
struct Formats {
  DType k, v, call;
  int64_t W;
  bool weights;
};

LESS_HD constexpr Formats formats(const Layout& layout) {
  return {layout.k_dtype, layout.v_dtype, layout.call_dtype, hot_slots(layout), layout.weights};
}

// Bytes of a slot's score, and of its log-weight or count.
LESS_HD constexpr int64_t note_bytes(DType v_dtype) { return packed(v_dtype) ? 2 : 4; }

// Where the fields of a head with S slots begin, in bytes from the head's own beginning.
struct HeadOffsets {
  int64_t position, hot_k, hot_k_scale, k, k_scale, weight, hot_v, hot_v_scale, v, v_scale, z, H,
      score, nbytes;
};

LESS_HD constexpr HeadOffsets head_offsets(const Formats& of, int64_t D, int64_t R, int64_t S) {
  HeadOffsets at{};
  const auto place = [&at](int64_t rows, int64_t row) {
    const int64_t begin = aligned(at.nbytes, alignment(row));
    if (rows * row > 0) at.nbytes = begin + rows * row;
    return begin;
  };
  const int64_t cold = S - of.W;
  at.position = place(S, 4);
  at.hot_k = place(of.W, row_bytes(of.call, D));
  at.hot_k_scale = place(of.W, scale_bytes(of.call));
  at.k = place(cold, row_bytes(of.k, D));
  at.k_scale = place(cold, scale_bytes(of.k));
  at.weight = place(of.weights ? S : 0, note_bytes(of.v));
  at.hot_v = place(of.W, row_bytes(of.call, D));
  at.hot_v_scale = place(of.W, scale_bytes(of.call));
  at.v = place(cold, row_bytes(of.v, D));
  at.v_scale = place(cold, scale_bytes(of.v));
  at.z = place(R, 4);
  at.H = place(R, 4 * D);
  at.score = place(S, note_bytes(of.v));
  at.nbytes = aligned(at.nbytes, kPageAlign);
  return at;
}

LESS_HD constexpr int64_t header_bytes(int64_t K) { return aligned(16 + 8 * K, kPageAlign); }

// Completes a layout that has all but its slots and bytes: K <= kMaxKvHeads heads, of slots[h] > W
// slots each.
inline void place_heads(Layout& layout, const int64_t* slots) {
  int64_t at = header_bytes(layout.K);
  for (int64_t h = 0; h < layout.K; ++h) {
    layout.slots[h] = int32_t(slots[h]);
    layout.first[h] = int32_t(at / kPageAlign);
    layout.S = layout.slots[h] > layout.S ? layout.slots[h] : layout.S;
    at += head_offsets(formats(layout), layout.D, layout.R, slots[h]).nbytes;
  }
  layout.nbytes = at;
}

// The layout of K heads whose rows have one dtype that is not packed.
inline Layout make_layout(DType dtype, int64_t K, int64_t D, int64_t R, const int64_t* slots) {
  Layout layout{};
  layout.K = int32_t(K);
  layout.D = int32_t(D);
  layout.R = int32_t(R);
  layout.k_dtype = layout.v_dtype = layout.call_dtype = dtype;
  layout.weights = true;
  place_heads(layout, slots);
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
  const int64_t begin = layout.first[h] * kPageAlign;
  const int64_t end = h + 1 < layout.K ? layout.first[h + 1] * kPageAlign : layout.nbytes;
  return {page + begin, end - begin};
}

// The head of a layer whose formats and offsets the caller knows: those of the layout, or constants
// that are equal to them.
LESS_HD Head head(const Layout& layout, unsigned char* page, int64_t h, const Formats& of,
                  const HeadOffsets& at) {
  const int64_t S = layout.slots[h];
  unsigned char* const base = head_span(layout, page, h).data;
  const bool state = layout.R > 0, hot = of.W > 0, few = packed(of.v);
  const auto floats = [base](int64_t offset) { return reinterpret_cast<float*>(base + offset); };
  const auto halves = [base](int64_t offset) { return reinterpret_cast<uint16_t*>(base + offset); };
  return {
      .slots = {.position = reinterpret_cast<int32_t*>(base + at.position),
                .hot_k = hot ? base + at.hot_k : nullptr,
                .hot_k_scale = hot && has_scale(of.call) ? floats(at.hot_k_scale) : nullptr,
                .k = base + at.k,
                .k_scale = scale_bytes(of.k) == 4 ? floats(at.k_scale) : nullptr,
                .k_half = packed(of.k) ? halves(at.k_scale) : nullptr,
                .weight = of.weights && !few ? floats(at.weight) : nullptr,
                .count = of.weights && few ? halves(at.weight) : nullptr,
                .hot_v = hot ? base + at.hot_v : nullptr,
                .hot_v_scale = hot && has_scale(of.call) ? floats(at.hot_v_scale) : nullptr,
                .v = base + at.v,
                .v_scale = scale_bytes(of.v) == 4 ? floats(at.v_scale) : nullptr,
                .v_half = packed(of.v) ? halves(at.v_scale) : nullptr,
                .score = few ? nullptr : floats(at.score),
                .half = few ? halves(at.score) : nullptr,
                .S = S,
                .W = of.W},
      .state = {.H = state ? floats(at.H) : nullptr,
                .z = state ? floats(at.z) : nullptr,
                .share = reinterpret_cast<double*>(page + 16) + h},
  };
}

// The same, who knows the head dim.
LESS_HD Head head(const Layout& layout, unsigned char* page, int64_t h, const Formats& of,
                  int64_t D) {
  return head(layout, page, h, of, head_offsets(of, D, layout.R, layout.slots[h]));
}

// The head of a layer that has one dtype, which is not packed.
LESS_HD Head head(const Layout& layout, unsigned char* page, int64_t h, DType dtype, int64_t D) {
  return head(layout, page, h, Formats{dtype, dtype, dtype, 0, true}, D);
}

LESS_HD Head head(const Layout& layout, unsigned char* page, int64_t h) {
  return head(layout, page, h, formats(layout), layout.D);
}

// A layer's pages, and which of them a call's rows use.
struct Pool {
  unsigned char* data;  // [N, stride], at a multiple of 16 bytes
  int64_t stride;       // bytes from a page to the next, a multiple of kPageAlign
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
