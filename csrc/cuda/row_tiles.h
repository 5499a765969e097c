// What the kernels of chunk_attention and prompt_scores share: which keys and queries a kv head
// has, tiles of rows in shared memory, and numbers as sums of operands for tensor cores.
//
// Keys in order: the kept slots of a kv head, hot ones first, then the valid tokens of the call.
// Queries in order: the G query heads of the first valid token, then of the second: query m is head
// m % G of token m / G, and sees token j of the call where j G <= m. Padding is in neither, so that
// a row has the bits in a padded batch that it has alone.
#pragma once

#include "cuda/codec.h"
#include "cuda/convert.h"
#include "cuda/device.h"
#include "cuda/head_dims.h"
#include "params.h"

namespace less::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

// -- keys and queries --

struct KeyLists {
  int32_t* slot;    // [B, K, S]  kept slots, ascending, then the empty ones
  int32_t* slots;   // [B, K]     how many are kept
  int32_t* hot;     // [B, K]     of them in hot slots; null: there are none
  int32_t* token;   // [B, T]     valid tokens, ascending, then padding; null: all, in order
  int32_t* tokens;  // [B]        how many are valid; with token
};

// Cuts a workspace into arrays; with a null base it only measures.
struct Carver {
  void* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t n) {
    T* const array = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + used);
    used = (used + n * int64_t(sizeof(T)) + 255) / 256 * 256;
    return array;
  }
};

// Fills the lists.
cudaError_t list_keys(const ChunkAttentionParams& p, const KeyLists& lists, cudaStream_t stream);

// How the keys of a kv head are cut where its queries are so few that they fill one block: splits
// of a few tiles of slots, and a last one of the call's tokens, each a block. A head's own capacity
// decides how many tiles, and whether it is cut at all.
struct Splits {
  int count;         // of the head that has most; 0: nothing is cut
  int most;          // splits of slots, at most
  int warps;         // of a split that have queries
  bool all;          // every head is cut
  int32_t* arrived;  // [B, K]  splits that are done; 0 between launches
  float* parts;      // [B, K, count, warps, ..]  what each has, as Meeting lays it out
};

// Tiles of keys that the slots of a head fill at most: hot ones, then the others.
__host__ __device__ inline int tiles_of_slots(const Layout& layout, int64_t h, int keys) {
  const int W = hot_slots(layout);
  return (W + keys - 1) / keys + (layout.slots[h] - W + keys - 1) / keys;
}

// Tiles of slots of a split, of a head with so many tiles; 0: it is not cut.
__host__ __device__ inline int tiles_of_split(int tiles, int most) {
  return tiles < 2 ? 0 : (tiles + most - 1) / most;
}

// out and share, and lse [B, Q, T], the logarithm of each query's mass over slots and call (null:
// not wanted). Without p.call.v it is lse alone.
cudaError_t attend(const ChunkAttentionParams& p, const KeyLists& lists, const Splits& splits,
                   float* lse, cudaStream_t stream);

// score.
cudaError_t sum_columns(const ChunkAttentionParams& p, const KeyLists& lists, const float* lse,
                        cudaStream_t stream);

// One kv head of a row, with the keys and queries that it has.
struct KvHead {
  int row;  // b * K + h
  int b;
  int h;
  int G;
  unsigned char* page;  // null: the row has none, or the call knows no slots
  int slots;            // kept
  int hot;              // of them
  int tokens;           // valid; 0 without a page

  LESS_DEVICE KvHead(const ChunkAttentionParams& p, const KeyLists& lists, int row)
      : row(row), b(row / int(p.spec.K)), G(int(p.spec.Q) / int(p.spec.K)) {
    h = row - b * int(p.spec.K);
    page = p.layout.S == 0 ? nullptr : less::page(p.pool, b);
    slots = page == nullptr ? 0 : lists.slots[row];
    hot = page == nullptr || lists.hot == nullptr ? 0 : lists.hot[row];
    tokens = lists.token == nullptr ? int(p.T) : lists.tokens[b];
    if (page == nullptr && p.layout.S > 0) tokens = 0;
  }

  LESS_DEVICE int token(const ChunkAttentionParams& p, const KeyLists& lists, int i) const {
    // narrow: a number of a query, whose lanes read its row
    return lists.token == nullptr ? i : lists.token[b * p.T + i];
  }

  // Where query m lies in [B, Q, T].
  LESS_DEVICE int64_t query_at(const ChunkAttentionParams& p, const KeyLists& lists, int m) const {
    const int i = m / G;
    return (row * G + m - i * G) * p.T + token(p, lists, i);
  }

  // Elements from the beginning of q or out to the row of query m.
  LESS_DEVICE int64_t query_row(const HeadRows& rows, const ChunkAttentionParams& p,
                                const KeyLists& lists, int m) const {
    const int i = m / G;
    return offset(rows, b, h * G + m - i * G, token(p, lists, i));
  }
};

enum class Keys { hot, slots, call };

// Rows of k and v, all slots, or the hot ones, or all tokens of the call, and what goes with each.
struct Source {
  const void* k;         // [n, D]
  const void* v;         // [n, D]
  const void* k_scale;   // [n] floats, of packed rows halves; null: 1
  const void* v_scale;   // [n]
  const void* weight;    // [n] floats, of packed rows counts; null: 0
  const int32_t* index;  // [count] of the rows, null: in order
  int count;
  int base;  // what an index is more than its row
  DType k_dtype;
  DType v_dtype;
  int64_t k_step;  // elements from a row to the next
  int64_t v_step;
};

// The log-weight of a row that there is, in units of log 2. kFew: rows may be packed.
template <bool kFew>
LESS_DEVICE float log_weight_of(const Source& of, int64_t n) {
  if (of.weight == nullptr) return 0.0f;
  if (kFew && packed(of.v_dtype)) {
    // narrow: a lane a row, side by side
    return __log2f(float(static_cast<const uint16_t*>(of.weight)[n]));
  }
  return static_cast<const float*>(of.weight)[n] * kLog2E;  // narrow: a lane a row, side by side
}

// A row's scale.
LESS_DEVICE float scale_at(const void* scales, DType dtype, int64_t n) {
  // narrow: a lane a row, side by side
  if (packed(dtype)) return level_scale(static_cast<const uint16_t*>(scales)[n]);
  return static_cast<const float*>(scales)[n];  // narrow: a lane a row, side by side
}

LESS_DEVICE const void* advance(const void* p, int64_t bytes) {
  return static_cast<const unsigned char*>(p) + bytes;
}

// The kept slots, the hot ones of them or the others, or the first `count` tokens of the call. All
// are computed and one is chosen: where pointers meet after branches, the compiler no longer knows
// that they are global. kFew: rows may be packed.
template <bool kFew>
LESS_DEVICE Source source_of(const ChunkAttentionParams& p, const KeyLists& lists,
                             const KvHead& head, Keys keys, int count) {
  const bool hot = keys == Keys::hot, slots = keys == Keys::slots;
  // Without a page no slot is read: any address will do, and any head where a call knows no slots.
  auto* const memory = head.page == nullptr ? static_cast<unsigned char*>(p.q.data) : head.page;
  const DType plain = p.layout.k_dtype;
  const Formats form = kFew ? formats(p.layout) : Formats{plain, plain, plain, 0, true};
  const Slots of = less::head(p.layout, memory, p.layout.S == 0 ? 0 : head.h, form, p.spec.D).slots;
  const CallRows& call = p.call;
  const int64_t first = head.row * p.T, bytes = bytes_of(p.layout.call_dtype), D = p.spec.D;
  const void* const k = advance(call.k.data, offset(call.k, head.b, head.h, 0) * bytes);
  const void* const v = call.v.data == nullptr
                            ? nullptr
                            : advance(call.v.data, offset(call.v, head.b, head.h, 0) * bytes);
  const float* const k_scale = call.k_scale == nullptr ? nullptr : call.k_scale + first;
  const float* const v_scale = call.v_scale == nullptr ? nullptr : call.v_scale + first;
  const int32_t* const token = lists.token == nullptr ? nullptr : lists.token + head.b * p.T;
  const auto choose = [=](auto* of_slots, auto* of_hot, auto* of_call) {
    return slots ? of_slots : hot ? of_hot : of_call;
  };
  const auto scale = [=](const float* floats, const uint16_t* halves) -> const void* {
    return halves != nullptr ? static_cast<const void*>(halves) : floats;
  };
  const auto* const no_weight = static_cast<const void*>(nullptr);
  const auto* const weight = of.count != nullptr ? static_cast<const void*>(of.count) : of.weight;
  const DType call_dtype = p.layout.call_dtype;
  const int32_t* const kept = lists.slot + head.row * int64_t{p.layout.S};
  return {
      choose(static_cast<const void*>(of.k), static_cast<const void*>(of.hot_k), k),
      choose(static_cast<const void*>(of.v), static_cast<const void*>(of.hot_v), v),
      choose(scale(of.k_scale, of.k_half), scale(of.hot_k_scale, nullptr), scale(k_scale, nullptr)),
      choose(scale(of.v_scale, of.v_half), scale(of.hot_v_scale, nullptr), scale(v_scale, nullptr)),
      slots ? weight : no_weight,
      choose(kept + head.hot, kept, token),
      hot     ? head.hot
      : slots ? head.slots - head.hot
              : count,
      slots ? hot_slots(p.layout) : 0,
      slots ? p.layout.k_dtype : call_dtype,
      slots ? p.layout.v_dtype : call_dtype,
      hot || slots ? D : call.k.t,
      hot || slots ? D : call.v.t};
}

// -- numbers as operands --
//
// A tensor core multiplies 16-bit floats. A float is a sum of three bf16 parts, to 2^-24 of itself,
// a softmax weight of two to 2^-17; of a product of sums the small products are left out.

// q, k and v of one 16-bit type.
template <typename Tag>
struct Plain {
  using KeyTag = Tag;
  using ValueTag = Tag;
  static constexpr int kParts = 1;        // of q and k
  static constexpr int kValueParts = 1;   // of v
  static constexpr int kWeightParts = 2;  // of e^(l - top)
  static constexpr bool kScaled = false;  // rows of k and v have scales
};

// q of a 16-bit type; rows of k and v in int8 or e4m3, which both half types hold exactly. v in
// bf16, because a weight times a scale may be small.
template <typename Tag>
struct Eight {
  using KeyTag = Tag;
  using ValueTag = BFloatTag;
  static constexpr int kParts = 1;
  static constexpr int kValueParts = 1;
  static constexpr int kWeightParts = 2;
  static constexpr bool kScaled = true;
};

// Any q, k and v, as floats.
struct Wide {
  using KeyTag = BFloatTag;
  using ValueTag = BFloatTag;
  static constexpr int kParts = 3;
  static constexpr int kValueParts = 3;
  static constexpr int kWeightParts = 3;
  static constexpr bool kScaled = true;
};

template <typename Scheme>
constexpr bool kIsWide = Scheme::kParts > 1;
// k and v are copied to shared memory as they are.
template <typename Scheme>
constexpr bool kIsPlain = !Scheme::kScaled;

// A head dim, and up to the next multiple of 32.
constexpr int padded_dim(int D) { return (D + 31) / 32 * 32; }

template <typename Scheme, typename Run>
cudaError_t dispatch_dim(int64_t D, const Run& run) {
  cudaError_t error = cudaErrorInvalidValue;
  with_head_dim(D, [&](auto head_dim) {
    error = run.template launch<Scheme, padded_dim(decltype(head_dim)::value)>();
  });
  return error;
}

// run.launch<Scheme, kD>() for these dtypes and this head dim, which is padded to kD.
template <typename Run>
cudaError_t dispatch(DType q, const Layout& layout, int64_t D, const Run& run) {
  const DType k = layout.k_dtype;
  const bool bytes = has_scale(k);
  if (packed(layout.v_dtype)) return dispatch_dim<Wide>(D, run);
  if (q == DType::fp16 && k == DType::fp16) return dispatch_dim<Plain<HalfTag>>(D, run);
  if (q == DType::bf16 && k == DType::bf16) return dispatch_dim<Plain<BFloatTag>>(D, run);
  if (q == DType::fp16 && bytes) return dispatch_dim<Eight<HalfTag>>(D, run);
  if (q == DType::bf16 && bytes) return dispatch_dim<Eight<BFloatTag>>(D, run);
  return dispatch_dim<Wide>(D, run);
}

template <typename Tag>
LESS_DEVICE uint32_t pack(float a, float b) {
  if constexpr (std::is_same_v<Tag, HalfTag>) {
    const __half2 pair = __floats2half2_rn(a, b);
    return bits_of<uint32_t>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return bits_of<uint32_t>(pair);
  }
}

template <typename Tag>
using Element = std::conditional_t<std::is_same_v<Tag, HalfTag>, __half, __nv_bfloat16>;

// a and b as sums of parts, largest first.
template <typename Tag, int kParts>
LESS_DEVICE void split(float a, float b, uint32_t (&part)[kParts]) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    part[i] = pack<Tag>(a, b);
    if (i + 1 == kParts) break;
    float taken[2];
    widen4(part[i], taken, Element<Tag>());
    a -= taken[0];
    b -= taken[1];
  }
}

LESS_DEVICE void four_bytes(uint32_t w, DType dtype, float (&x)[4]) {
  if (dtype == DType::i8) return widen4(w, x, int8_t());
  widen4(w, x, __nv_fp8_e4m3());
}

// Dims d .. d + 3 of the packed row that begins with number `from`, in units of its scale's.
LESS_DEVICE void four_levels(const void* x, DType dtype, int D, int64_t from, int d,
                             float (&levels)[4]) {
  const auto* const row = static_cast<const uint8_t*>(x) + row_bytes(dtype, from);
  widen4(levels_of_codes(dtype, four_codes(dtype, D, d, row)), levels, int8_t());
}

// -- tiles --
//
// A tile holds rows of kD 16-bit numbers, part by part. The 16-byte pieces of a row are permuted:
// the same piece of eight rows, and eight pieces in a row, lie in different banks.

// Pieces that are permuted among themselves.
template <int kD>
constexpr int kPermuted = kD % 64 == 0 ? 8 : 4;

template <int kD>
LESS_DEVICE int permutation(int row) {
  static_assert(kD % 32 == 0, "a row is whole or half wavefronts");
  return kD % 64 == 0 ? row & 7 : row >> 1 & 3;
}

template <int kD>
LESS_DEVICE int tile_at(int row, int piece) {
  return row * kD + (piece ^ permutation<kD>(row)) * 8;
}

// Pieces first, first + 2, first + 4, ... of a row, and of the rows 16, 32, ... below. One address
// that little is done to: first must be below the step, counted in pieces, that i takes.
template <int kD, typename T = const uint16_t>
class Pieces {
 public:
  LESS_DEVICE Pieces(T* tile, int row, int first)
      : row_(tile + row * kD), first_((first ^ permutation<kD>(row)) * 8) {}

  LESS_DEVICE T* at(int sixteens, int i) const {
    constexpr int kPairs = kPermuted<kD> / 2;
    return row_ + (first_ ^ i % kPairs * 16) + (i / kPairs * kPairs * 16 + sixteens * 16 * kD);
  }

 private:
  T* row_;
  int first_;
};

// Starts copying a tile of rows of 16-bit numbers: row r of the tile has the D numbers from
// x[at(r)] on, zero where at(r) < 0, and beyond D.
template <int kD, int kRows, int kThreads, typename At>
LESS_DEVICE void copy_rows(const void* x, int64_t D, const At& at, uint16_t* tile) {
  constexpr int kLanes = kPermuted<kD>;  // of a row
  constexpr int kAtOnce = kThreads / kLanes;
  static_assert(kRows % kAtOnce == 0, "every thread copies as much");
  const int piece = int(threadIdx.x) % kLanes;
#pragma unroll
  for (int i = 0; i < kRows / kAtOnce; ++i) {
    const int row = i * kAtOnce + int(threadIdx.x) / kLanes;
    const int64_t from = at(row);
    const uint16_t* source = static_cast<const uint16_t*>(x) + (from < 0 ? 0 : from);
#pragma unroll
    for (int j = 0; j < kD / 8; j += kLanes) {
      const bool there = from >= 0 && (piece + j) * 8 < D;
      copy_async16(tile + tile_at<kD>(row, piece) + j * 8, source + (there ? (piece + j) * 8 : 0),
                   there);
    }
  }
}

// The same of rows of any dtype, as sums of parts, and at once.
template <typename Tag, int kParts, int kD, int kRows, int kThreads, typename At>
LESS_DEVICE void split_rows(const void* x, DType dtype, int64_t D, const At& at, uint16_t* tile) {
  constexpr int kLanes = kPermuted<kD> * 2;  // of a row
  constexpr int kAtOnce = kThreads / kLanes;
  static_assert(kRows % kAtOnce == 0, "every thread splits as much");
  const int lane = int(threadIdx.x) % kLanes;
#pragma unroll 1
  for (int row = int(threadIdx.x) / kLanes; row < kRows; row += kAtOnce) {
    const int64_t from = at(row);
    uint16_t* to = tile + tile_at<kD>(row, lane / 2) + lane % 2 * 4;
#pragma unroll
    for (int j = 0; j < kD; j += kLanes * 4) {
      const int d = j + lane * 4;
      float v[4] = {};
      if (from >= 0 && d < D) {
        if (packed(dtype)) {
          four_levels(x, dtype, int(D), from, d, v);
        } else if (has_scale(dtype)) {
          // narrow: four elements a lane, 16 bytes where they are float32
          four_bytes(static_cast<const uint32_t*>(x)[(from + d) / 4], dtype, v);
        } else {
          // narrow: four elements a lane, 16 bytes where they are float32
          load_four(x, dtype, from + d, v);
        }
      }
      uint32_t a[kParts], b[kParts];
      split<Tag>(v[0], v[1], a);
      split<Tag>(v[2], v[3], b);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        store8_shared(to + j + part * kRows * kD, make_uint2(a[part], b[part]));
      }
    }
  }
}

// A tile of rows of bytes on its way through registers, each thread with 16-byte units of one row.
// Eight lanes take the same units of eight rows, so that no two of them store to the same bank.
template <int kD, int kRows, int kThreads>
class Bytes {
 public:
  template <typename At>
  LESS_DEVICE void fetch(const void* x, int64_t D, const At& at) {
    const int64_t from = at(row());
    const uint8_t* source = static_cast<const uint8_t*>(x) + (from < 0 ? 0 : from);
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int d = (unit() + i * kOfRow) * 16;
      unit_[i] = from >= 0 && d < D ? load16_nc(source + d) : make_uint4(0, 0, 0, 0);
    }
  }

  template <typename Tag>
  LESS_DEVICE void place(DType dtype, uint16_t* tile) const {
    const Pieces<kD, uint16_t> low(tile, row(), unit() * 2), high(tile, row(), unit() * 2 + 1);
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      store16_shared(low.at(0, i * kOfRow), widened<Tag>(unit_[i].x, unit_[i].y, dtype));
      store16_shared(high.at(0, i * kOfRow), widened<Tag>(unit_[i].z, unit_[i].w, dtype));
    }
  }

 private:
  static constexpr int kOfRow = kThreads / kRows;  // threads of a row
  static constexpr int kUnits = kD / 16 / kOfRow;
  static_assert(kThreads % (8 * kOfRow) == 0 && kD % (16 * kOfRow) == 0,
                "every thread takes as much");

  static LESS_DEVICE int row() {
    return int(threadIdx.x) / (8 * kOfRow) * 8 + int(threadIdx.x) % 8;
  }
  static LESS_DEVICE int unit() { return int(threadIdx.x) / 8 % kOfRow; }

  template <typename Tag>
  static LESS_DEVICE uint4 widened(uint32_t low, uint32_t high, DType dtype) {
    float a[4], b[4];
    four_bytes(low, dtype, a);
    four_bytes(high, dtype, b);
    return make_uint4(pack<Tag>(a[0], a[1]), pack<Tag>(a[2], a[3]), pack<Tag>(b[0], b[1]),
                      pack<Tag>(b[2], b[3]));
  }

  uint4 unit_[kUnits];
};

// s += the products of a's part i and b's part j with kFrom <= i + j < kTo, of dot_products.
template <typename Tag, int kFrom, int kTo, int kD, int kRows, int kN>
LESS_DEVICE void add_products(const Pieces<kD>& of_a, const Pieces<kD>& of_b,
                              float (&s)[kN / 8][4]) {
#pragma unroll(kD > (kTo > 1 ? 64 : 128) ? kPermuted<kD> / 2 : kD / 16)
  for (int d = 0; d < kD / 16; ++d) {
    uint32_t left[kTo][4];
#pragma unroll
    for (int part = 0; part < kTo; ++part) {
      ldmatrix_x4(left[part], of_a.at(part * (kRows / 16), d));
    }
#pragma unroll
    for (int n = 0; n < kN / 16; ++n) {
#pragma unroll
      for (int part = 0; part < kTo; ++part) {
        uint32_t right[4];
        ldmatrix_x4(right, of_b.at(part * (kN / 16) + n, d));
        const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
#pragma unroll
        for (int other = part < kFrom ? kFrom - part : 0; other < kTo - part; ++other) {
          mma_m16n8k16(s[2 * n], left[other], first, Tag{});
          mma_m16n8k16(s[2 * n + 1], left[other], second, Tag{});
        }
      }
    }
  }
}

// s = a b^T, the dot products of 16 rows of tile a, from `row` on, with the kN rows of tile b:
// s[n][0], s[n][1] are those of row lane / 4 with 8 n + lane % 4 * 2 and the next, s[n][2], s[n][3]
// those of row lane / 4 + 8.
//
// A tensor core cuts a sum off instead of rounding it, each time that something is added: the small
// products go first, while the sum is small, so that few are added to a large one.
template <typename Tag, int kParts, int kD, int kRows, int kN>
LESS_DEVICE void dot_products(const uint16_t* a, int row, const uint16_t* b,
                              float (&s)[kN / 8][4]) {
  const int lane = int(threadIdx.x) % 32;
  const Pieces<kD> of_a(a, row + lane % 16, lane / 16);
  const Pieces<kD> of_b(b, lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int n = 0; n < kN / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
  if constexpr (kParts > 1) add_products<Tag, 1, kParts, kD, kRows, kN>(of_a, of_b, s);
  add_products<Tag, 0, 1, kD, kRows, kN>(of_a, of_b, s);
}

// The value of all four lanes that hold a row of a fragment, combined.
LESS_DEVICE float sum_of_quad(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

LESS_DEVICE float max_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// tanh(x), to 3e-7 of itself, without a branch.
LESS_DEVICE float hyperbolic_tangent(float x) {
  const float square = x * x;
  float small = fmaf(square, -0.0055910074f, 0.020538810f);
  small = fmaf(small, square, -0.053709656f);
  small = fmaf(small, square, 0.13331093f);
  small = fmaf(small, square, -0.33333269f);
  small = fmaf(x * square, small, x);
  const float e = exp2_approx(fabsf(x) * (2.0f * kLog2E));
  const float large = 1.0f - __fdividef(2.0f, 1.0f + e);
  return fabsf(x) < 0.625f ? small : copysignf(large, x);
}

// How dot products become logits, in units of log 2, before the keys' weights are added.
struct Logit {
  float scale;    // with log2(e), unless capped
  float softcap;  // with log2(e); 0: none

  explicit LESS_DEVICE Logit(const ChunkAttentionParams& p)
      : scale(p.spec.softcap == 0.0f ? p.spec.scale * kLog2E : p.spec.scale / p.spec.softcap),
        softcap(p.spec.softcap * kLog2E) {}

  // Caps the logits where they are to be; factor(n, j) is what s[n][j] is to be multiplied by.
  // Returns whether it did; else that is left to do.
  template <int kN, typename Factor>
  LESS_DEVICE bool cap(float (&s)[kN][4], const Factor& factor) const {
    if (softcap == 0.0f) return false;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[n][j] = softcap * hyperbolic_tangent(s[n][j] * factor(n, j));
      }
    }
    return true;
  }
};

}  // namespace less::cuda
