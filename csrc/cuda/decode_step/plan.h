// How decode_step cuts a layer into blocks, and a block's shared memory into arrays.
//
// The S slots of a head are cut into `splits` ranges of `per` slots; a block attends over `ranges`
// of them, one after the other, and keeps a part of each. The blocks of a head meet in one of two
// ways: as a cluster that reads its members' shared memory (sm_90 on), or in the workspace, where
// the last to arrive finishes alone. A block that has all ranges meets nobody. The cut, the order
// in which parts are merged and the shares of psi follow from the head's capacity, the layer's
// shape and the device, never from the batch or from other heads: a head has the same bits in any
// batch and in any layer. How many ranges a block has follows from the batch too, and changes no
// bit. Heads of another capacity are another launch.
#pragma once

#include "cuda/codec.h"
#include "cuda/device.h"
#include "cuda/head_dims.h"
#include "params.h"

namespace less::cuda {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeWarps = kDecodeThreads / 32;
constexpr int kDecodeCluster = 8;   // blocks of a head that a cluster holds on every device
constexpr int kDecodeMapUnits = 4;  // units of 32 bytes of a row of W1 that a block takes at once

// Whether slots are packed rows; they are multiplied as int8.
template <typename T>
constexpr bool kFewBits = std::is_same_v<T, FewBits>;

// A tile of slots' rows in shared memory, of 16-byte chunks. Chunk i = row * kChunks + column lies
// at place(i): 8 chunks that follow each other, and 8 rows' chunks of one column, are both in 8
// different groups of 4 banks.
template <typename T, int kD>
struct DecodeTile {
  static constexpr int kElements = 16 / int(sizeof(T));  // of a chunk
  static constexpr int kChunks = kD / kElements;         // of a row
  static constexpr int kBytes = kD * int(sizeof(T));     // of a row
  // Packed rows are half as long where they come from, or less.
  static constexpr int kMost = kFewBits<T> && kBytes <= 128 ? 128 : 64;
  static constexpr int kRows = kBytes <= 256 ? kMost : 16384 / kBytes;
  static constexpr int kStages = 49152 / (kRows * kBytes) < 8 ? 49152 / (kRows * kBytes) : 8;
  static constexpr int kPower = kChunks % 64 == 0   ? 6
                                : kChunks % 32 == 0 ? 5
                                : kChunks % 16 == 0 ? 4
                                : kChunks % 8 == 0  ? 3
                                : kChunks % 4 == 0  ? 2
                                : kChunks % 2 == 0  ? 1
                                                    : 0;
  static constexpr int kShift = kPower > 3 ? kPower : 3;
  static constexpr int kMask = kPower > 3 ? 7 : (1 << kPower) - 1;

  static LESS_DEVICE int place(int i) { return i ^ ((i >> kShift) & kMask); }
};

// Where a block's arrays begin in its shared memory, in bytes.
struct DecodeLayout {
  int32_t ring;        // [ring, stage] bytes
  int32_t widened;     // [tile in 32s, D]  of int8: packed rows, as they are multiplied
  int32_t sums;        // [threads / chunks, heads, D]  of values, by threads; not for tensor cores
  int32_t q;           // [G, D]
  int32_t narrow_q;    // [8 ceil(G / 8), D + 8] of T, for tensor cores; of packed rows digits,
                       // [8 ceil(G / 2), D + ..] of int8
  int32_t q_scale;     // [G + ranges]  what its rows were divided by; units of the values' scales
  int32_t mass;        // [ranges, G, per + 8]  logits, e^(logit - top); at `per` the token's
  int32_t part;        // [ranges]  DecodePart
  int32_t digits;      // [ranges, G, 3, digits]  of int8: of masses times scales, for packed rows
  int32_t position;    // [ranges, per]
  int32_t score;       // [ranges, per]
  int32_t weight;      // [ranges, per]
  int32_t k_scale;     // [ranges, per]
  int32_t v_scale;     // [ranges, per]
  int32_t key;         // [D]  the token's, as the slots will hold it, not scaled
  int32_t value;       // [D]
  int32_t token;       // [4]  scales of key and value, the token's score, what last() says
  int32_t top;         // [splits, G], then a split's factor of out
  int32_t sum;         // [splits, G], then what a split's masses are of the whole
  int32_t low;         // [G]  factor of phi H
  int32_t share;       // [G]
  int32_t token_mass;  // [G]  what the token itself received
  int32_t candidate;   // [warps + kDecodeCluster], and so many again for those who merge
  int32_t feature;     // [G, R]
  int32_t h;           // [R]
  int32_t z;           // [R]
  int32_t H;           // [R, columns]
  int32_t victim_key;  // [D]
  int32_t victim_value;  // [columns]; [D] of one that merges
  int32_t phi_numbers;   // [G, R]  FeatureNumbers
  int32_t psi_numbers;   // [R]
  int32_t psi_share;     // [R]
  int32_t psi_shares;    // [kDecodeCluster, R]
  int32_t map_sums;      // DecodeMapScratch
  int32_t map_hidden;
  int32_t map_turn;
  int32_t map_unit;
  int32_t map_w2;
};

// What a launch has worked out for its kernel.
struct DecodePlan {
  int first_head;  // of the launch, whose heads all have S slots
  int heads;
  int G;
  int S;
  HeadOffsets at;        // of those heads' fields, of packed rows
  int splits;            // ranges of a head's slots
  int per;               // slots of a range, a multiple of 16; the last one may have fewer
  int ranges;            // of a block; the last one may have fewer
  int blocks;            // of a head
  int shares;            // of psi: splits where clusters can be, else 1
  int block_of;          // 64 / ranges, rounded up: of up to 8 ranges, the block by a product
  int tile;              // rows of a tile
  int tiles;             // of a range
  int ring;              // tiles that a block holds
  int stage;             // bytes of one
  int digits;            // of a range's slots, a row of them in bytes
  bool clusters;         // the blocks of a head do not meet in the workspace
  bool cluster;          // but are a cluster, of more than one
  bool mma;              // on tensor cores
  bool dependent;        // the launch may begin before the kernel before it is over
  int64_t shared;        // bytes of shared memory of a block
  int part;              // floats of a block's part, see DecodePart
  uint32_t inverse_per;  // 2^32 / per, rounded up: slots of a block to their range by a product
  int columns;           // of H, that a finishing block holds
  int inverse;           // 2^16 / blocks that finish, rounded up: up to 128 / blocks by a product
  DecodeLayout layout;
  // In the workspace; zero between launches.
  int32_t* row_count;   // [B]     heads of a row that are done
  int32_t* head_count;  // [B, K]  splits of a head that have arrived
  // In the workspace, where the splits are no cluster.
  float* parts;   // [B, K, splits, part]
  float* masses;  // [B, K, splits, G, per]  e^(logit - top) of each slot
};

// What a block tells the others of its range: offsets into `part` floats.
struct DecodePart {
  int top;      // [G]     the largest logit, the token's own included in the last split
  int sum;      // [G]     sum e^(logit - top)
  int token;    // [G]     the token's own logit; only of the last split
  int feature;  // [G, R]  this block's share of phi's y, before the nonlinearity
  int value;    // [G, D]  sum e^(logit - top) v
  int floats;

  __host__ __device__ DecodePart(int G, int R, int D)
      : top(0),
        sum(G),
        token(2 * G),
        feature(3 * G),
        value((3 * G + G * R + 3) / 4 * 4),
        floats(value + G * D) {}
};

// Query heads whose sums of values a thread holds at once, without tensor cores.
template <typename T>
constexpr int decode_heads() {
  return sizeof(T) == 1 ? 4 : 8;
}

// Products of 16 columns of values with the masses of 8 query heads, whose sums a warp holds at
// once on tensor cores; how many times 8 heads that is.
constexpr int kDecodePairs = 12;

template <int kD>
constexpr int decode_head_tiles() {
  return kDecodeWarps * kDecodePairs / (kD / 16);
}

// How often values are read: once, unless there are more query heads than that.
template <typename T, int kD, bool kMma>
__host__ __device__ int decode_passes(int G) {
  constexpr int kMost = kMma ? 8 * decode_head_tiles<kD>() : decode_heads<T>();
  return (G + kMost - 1) / kMost;
}

// Numbers are multiplied with packed rows as int8, three digits each to the base of 256. A row of
// their digits, in bytes: what 8 rows have at one column is in different banks.
constexpr int kDecodeDigits = 3;

__host__ __device__ constexpr int decode_digit_row(int numbers) {
  return ((numbers + 31) / 32 * 2 | 1) * 16;
}

// Between rows of queries for tensor cores, in 16-bit floats: rows that are read together are then
// in different banks, 16 bytes of 8 rows of half types, 32 bytes of 4 rows of others.
template <typename T, int kD>
constexpr int decode_q_pad() {
  return sizeof(T) == 2 ? 8 : kD * 2 % 64 == 32 ? 0 : 16;
}

// Lays a block's arrays out from c.base on; c.used bytes in all.
template <typename T, int kD, bool kMma>
__host__ __device__ DecodeLayout decode_layout(SharedCarver& c, const DecodeStepParams& p,
                                               const DecodePlan& plan) {
  using Tile = DecodeTile<T, kD>;
  const int64_t G = p.spec.Q / p.spec.K, R = p.maps.phi.R;
  const int64_t heads = G < decode_heads<T>() ? G : decode_heads<T>();
  const auto take = [&c](int64_t bytes) {
    const auto* const array = c.template take<unsigned char>(bytes);
    return int32_t(reinterpret_cast<uintptr_t>(array) - reinterpret_cast<uintptr_t>(c.base));
  };
  DecodeLayout at{};
  at.ring = take(int64_t(plan.ring) * plan.stage);
  at.q = take(4 * G * kD);
  if (kFewBits<T>) {
    at.widened = take(int64_t(plan.tile + 31) / 32 * 32 * Tile::kBytes);
    at.narrow_q = take((G + 1) / 2 * 8 * decode_digit_row(kD));
    at.digits = take(plan.ranges * G * kDecodeDigits * plan.digits);
  } else if (kMma) {
    at.narrow_q = take((G + 7) / 8 * 8 * (kD + decode_q_pad<T, kD>()) * 2);
  } else {
    at.sums = take(4 * kDecodeThreads * Tile::kElements * heads);
  }
  if ((kMma && sizeof(T) == 1) || kFewBits<T>) at.q_scale = take(4 * (G + plan.ranges));
  const int64_t slots = int64_t(plan.ranges) * plan.per;
  at.mass = take(4 * plan.ranges * G * (plan.per + 8));
  at.part = take(4 * plan.ranges * plan.part);
  at.position = take(4 * slots);
  at.score = take(4 * slots);
  if (p.layout.weights) at.weight = take(4 * slots);
  if (sizeof(T) == 1) {
    at.k_scale = take(4 * slots);
    at.v_scale = take(4 * slots);
  }
  at.key = take(4 * kD);
  at.value = take(4 * kD);
  at.token = take(16);
  at.top = take(4 * plan.splits * G);
  at.sum = take(4 * plan.splits * G);
  at.low = take(4 * G);
  at.share = take(4 * G);
  at.token_mass = take(4 * G);
  const bool merges = p.spec.victim == Victim::merge;
  at.candidate = take(16 * (kDecodeWarps + (merges ? 2 : 1) * kDecodeCluster));
  if (R == 0 && !merges) return at;
  at.victim_key = take(4 * kD);
  at.victim_value = take(4 * (merges ? kD : plan.columns));
  if (R == 0) return at;
  at.feature = take(4 * G * R);
  at.h = take(4 * R);
  at.z = take(4 * R);
  at.H = take(4 * R * plan.columns);
  at.phi_numbers = take(12 * G * R);
  at.psi_numbers = take(12 * R);
  at.psi_share = take(4 * R);
  at.psi_shares = take(4 * kDecodeCluster * R);
  at.map_sums = take(4 * kDecodeWarps * 32 * kDecodeMapUnits);
  at.map_hidden = take(4 * 32 * kDecodeMapUnits);
  at.map_turn = take(4 * kDecodeThreads * kDecodeMapUnits);
  at.map_unit = take(4 * kDecodeMapUnits * R);
  at.map_w2 = take(32 * kDecodeMapUnits * R);
  return at;
}

// Guards between the arrays, where the emulator runs the kernel; elsewhere nothing.
template <typename T, int kD, bool kMma>
LESS_DEVICE void guard_decode_layout(unsigned char* raw, const DecodeStepParams& p,
                                     const DecodePlan& plan) {
  if (kSharedGuard == 0) return;
  SharedCarver c{raw};
  decode_layout<T, kD, kMma>(c, p, plan);
}

// f(integral_constant<int, D>, bool_constant<mma>); false where this build has not D. Tensor cores
// of floats take half types and those of 8 bits; packed rows have an instance of their own.
template <typename T, typename F>
bool decode_dispatch(int64_t D, bool mma, F f) {
  return with_head_dim(D, [&](auto head_dim) {
    if constexpr (sizeof(T) <= 2 && !kFewBits<T>) {
      if (mma) return f(head_dim, std::true_type{});
    }
    f(head_dim, std::false_type{});
  });
}

// One of these for each dtype of slots, in a file of its own.
template <typename T>
cudaError_t launch_decode(const DecodeStepParams& p, const DecodePlan& plan, cudaStream_t stream);

}  // namespace less::cuda
