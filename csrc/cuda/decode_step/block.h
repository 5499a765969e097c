// A block of decode_step.cu's kernel: its place in the layer, its arrays in shared memory, and what
// it does.
#pragma once

#include "cuda/codec.h"
#include "cuda/convert.h"
#include "cuda/decode_step/maps.h"
#include "cuda/decode_step/plan.h"
#include "cuda/features.h"
#include "cuda/notes.h"

namespace less::cuda {

constexpr float kInfinity = __builtin_huge_valf();

// Who might leave. An empty slot has the lowest rank and is older than every token, by its index.
struct DecodeCandidate {
  float rank;
  int32_t position;
  int32_t slot;  // S: the token itself
  float unused;

  LESS_DEVICE bool below(const DecodeCandidate& o) const {
    return leaves_before(rank, position, o.rank, o.position);
  }
  LESS_DEVICE bool empty() const { return position < 0; }
};

// The arrays of a block in shared memory, as the launcher has laid them out.
struct DecodeShared {
  unsigned char* raw;
  const DecodePlan& plan;
  const DecodeLayout& at;
  int range = 0;  // at hand, of this block's: of its mass and part

  template <typename T>
  LESS_DEVICE T* take(int offset) const {
    return reinterpret_cast<T*>(raw + offset);
  }
  LESS_DEVICE unsigned char* ring() const { return raw + at.ring; }
  LESS_DEVICE unsigned char* narrow_q() const { return raw + at.narrow_q; }
  LESS_DEVICE unsigned char* widened() const { return raw + at.widened; }
  LESS_DEVICE int8_t* digits() const { return take<int8_t>(at.digits); }
  LESS_DEVICE float* sums() const { return take<float>(at.sums); }
  LESS_DEVICE float* q() const { return take<float>(at.q); }
  LESS_DEVICE float* mass() const { return take<float>(at.mass) + range * plan.G * (plan.per + 8); }
  LESS_DEVICE float* part() const { return take<float>(at.part) + range * plan.part; }
  LESS_DEVICE float* score() const { return take<float>(at.score); }
  LESS_DEVICE float* weight() const { return take<float>(at.weight); }
  LESS_DEVICE float* k_scale() const { return take<float>(at.k_scale); }
  LESS_DEVICE float* v_scale() const { return take<float>(at.v_scale); }
  LESS_DEVICE float* key() const { return take<float>(at.key); }
  LESS_DEVICE float* value() const { return take<float>(at.value); }
  LESS_DEVICE float* token() const { return take<float>(at.token); }
  LESS_DEVICE int32_t* last() const { return take<int32_t>(at.token) + 3; }  // of its head's
  LESS_DEVICE float* top() const { return take<float>(at.top); }
  LESS_DEVICE float* sum() const { return take<float>(at.sum); }
  LESS_DEVICE float* low() const { return take<float>(at.low); }
  LESS_DEVICE float* share() const { return take<float>(at.share); }
  LESS_DEVICE float* token_mass() const { return take<float>(at.token_mass); }
  LESS_DEVICE float* feature() const { return take<float>(at.feature); }
  LESS_DEVICE float* h() const { return take<float>(at.h); }
  LESS_DEVICE float* z() const { return take<float>(at.z); }
  LESS_DEVICE float* H() const { return take<float>(at.H); }
  LESS_DEVICE float* victim_key() const { return take<float>(at.victim_key); }
  LESS_DEVICE float* victim_value() const { return take<float>(at.victim_value); }
  LESS_DEVICE FeatureNumbers* phi_numbers() const { return take<FeatureNumbers>(at.phi_numbers); }
  LESS_DEVICE FeatureNumbers* psi_numbers() const { return take<FeatureNumbers>(at.psi_numbers); }
  LESS_DEVICE float* psi_share() const { return take<float>(at.psi_share); }
  LESS_DEVICE float* psi_shares() const { return take<float>(at.psi_shares); }
  LESS_DEVICE int32_t* position() const { return take<int32_t>(at.position); }
  LESS_DEVICE DecodeCandidate* candidate() const { return take<DecodeCandidate>(at.candidate); }
  LESS_DEVICE DecodeMapScratch maps() const {
    return {take<float>(at.map_sums), take<float>(at.map_hidden), take<float>(at.map_turn),
            take<float>(at.map_unit), raw + at.map_w2};
  }
};

LESS_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

LESS_DEVICE float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// The power of two at or below a float >= 0 of these bits; 1 where it or its inverse is none.
LESS_DEVICE float power_below(uint32_t bits) {
  const uint32_t exponent = bits >> 23;
  return exponent == 0 || exponent >= 253 ? 1.0f : bits_of<float>(exponent << 23);
}

// One instance of the kernel.
//
// T:    the slots' elements; FewBits: packed rows.
// kD:   the head dim.
// kMma: whether the products are made on tensor cores.
// Then: what becomes of the token that leaves, see victim.h.
template <typename T, int kD, bool kMma, typename Then>
struct DecodeCase {
  static constexpr bool kPacked = kFewBits<T>;
  using Slot = std::conditional_t<kPacked, int8_t, T>;
  using Leaver = Then;
  static constexpr int kHeadDim = kD;
  static constexpr bool kTensorCores = kMma;
};

struct DecodeRows;  // packed.h

// Its stages lie in files of their own; run() in kernel.h calls them.
template <typename Case>
struct DecodeBlock {
  using T = typename Case::Slot;
  static constexpr int kD = Case::kHeadDim;
  static constexpr bool kMma = Case::kTensorCores;
  static constexpr bool kPacked = Case::kPacked;
  using Leaver = typename Case::Leaver;
  static constexpr bool kState = Leaver::kState;
  static constexpr bool kMerges = Leaver::kMerges;
  static constexpr bool kWeights = !kPacked || kMerges;  // whether slots have log-weights
  static constexpr bool kScaled = sizeof(T) == 1;
  // Whether queries are divided by what they are counted in, and so are values.
  static constexpr bool kUnits = kScaled && (kMma || kPacked);
  using Tile = DecodeTile<std::conditional_t<kPacked, FewBits, T>, kD>;

  // Without tensor cores, lanes of a key's row take its chunks in turns, and keep theirs of a few
  // queries; a thread has the sums of values of kHeads queries.
  static constexpr int kLanes = 1 << (Tile::kPower < 3 ? Tile::kPower : 3);
  static constexpr int kTurns = Tile::kChunks / kLanes;
  static constexpr int kFloats = kTurns * Tile::kElements;  // of a query that a lane keeps
  static constexpr int kQueries = kFloats <= 32 ? 2 : 1;
  static constexpr int kKept = kFloats <= 48 ? kFloats : 4;  // more are read when they are needed
  static constexpr int kHeads = decode_heads<T>();

  // On tensor cores: int8 and e4m3 are half floats, exactly.
  using Narrow = std::conditional_t<kScaled, __half, T>;
  using Tag = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, BFloatTag, HalfTag>;
  static constexpr int kRow = kD + decode_q_pad<T, kD>();  // of narrow_q
  static constexpr int kBlocks = kD / 16;                  // of 16 columns of out
  static constexpr int kPairs = kDecodePairs;
  static constexpr int kTiles =
      kDecodeWarps * kPairs / kBlocks;  // of 8 query heads, in a pass over values

  const DecodeStepParams& p;
  const DecodePlan& plan;
  DecodeShared s;
  DecodePart at;
  int t, lane, warp;
  int G, R, S;
  int stride;  // of mass
  int64_t b, head, row;
  unsigned char* memory;  // the row's page
  int64_t seen;           // tokens of the row before this one
  DecodeCandidate victim;
  int32_t joining;  // position of who competes as slot S, where it may merge; -1: nobody does
  int asked = 0;  // the stage that is asked for next, and after that the one that is looked at next
  int next_range = 0, next_tile = 0;  // what it is asked for: a tile of a range of this block,
  int next_pass = -1;                 // of keys, or of values for this pass over them

  LESS_DEVICE DecodeBlock(const DecodeStepParams& params, const DecodePlan& decode_plan,
                          unsigned char* raw)
      : p(params),
        plan(decode_plan),
        s{raw, decode_plan, decode_plan.layout},
        at(decode_plan.G, kState ? int(params.layout.R) : 0, kD) {
    t = threadIdx.x;
    lane = t % 32;
    warp = t / 32;
    head = plan.first_head + blockIdx.y;
    b = blockIdx.z;
    row = b * p.spec.K + head;
    G = plan.G;
    R = kState ? int(p.layout.R) : 0;
    S = plan.S;
    stride = plan.per + 8;
  }

  // The ranges of this block, computed anew at each use: registers are dearer. Slots
  // [first_slot(), last_slot()).
  LESS_DEVICE int first_range() const { return int(blockIdx.x) * plan.ranges; }
  LESS_DEVICE int ranges() const { return min(plan.ranges, plan.splits - first_range()); }
  LESS_DEVICE int first_slot() const { return first_range() * plan.per; }
  LESS_DEVICE int last_slot() const { return min(first_slot() + plan.ranges * plan.per, S); }
  // The one at hand: n() slots.
  LESS_DEVICE int split() const { return first_range() + s.range; }
  LESS_DEVICE int n() const { return min(plan.per, S - split() * plan.per); }

  // Of those who finish a head.
  LESS_DEVICE int rank() const { return plan.cluster ? int(blockIdx.x) : 0; }
  LESS_DEVICE int ranks() const { return plan.cluster ? plan.blocks : 1; }

  // The columns of H and out that a block finishes, units of 16: from here to those of the next.
  LESS_DEVICE int column_of(int finisher) const {
    return (kD / 16 * finisher * plan.inverse >> 16) * 16;
  }
  LESS_DEVICE int first_column() const { return column_of(rank()); }
  LESS_DEVICE int columns() const { return column_of(rank() + 1) - column_of(rank()); }

  LESS_DEVICE Narrow* narrow_q() const { return s.take<Narrow>(plan.layout.narrow_q); }
  LESS_DEVICE float* q_scale() const { return s.take<float>(plan.layout.q_scale); }
  // Where query head g of this kv head lies in q and out.
  LESS_DEVICE int64_t query(const HeadRows& rows, int g) const {
    return offset(rows, b, head * G + g, 0);
  }
  LESS_DEVICE Head kept() const {
    if constexpr (kPacked) {
      return less::head(p.layout, memory, head, formats(p.layout), plan.at);
    } else {
      return less::head(p.layout, memory, head, dtype_of<T>(), kD);
    }
  }
  LESS_DEVICE Slots slots() const { return kept().slots; }
  LESS_DEVICE State state() const { return kept().state; }
  LESS_DEVICE bool alone() const { return plan.blocks == 1; }
  LESS_DEVICE bool last_block() const { return int(blockIdx.x) == plan.blocks - 1; }
  LESS_DEVICE bool last_split() const { return split() == plan.splits - 1; }

  LESS_DEVICE void run();

  // Rows of a tile of a range that begins with this slot; none where the range has fewer tiles.
  LESS_DEVICE int rows_from(int slot, int tile) const {
    return max(0, min(min(plan.tile, plan.per - tile * plan.tile), S - slot));
  }

  // -- load.h: what is read once
  LESS_DEVICE unsigned char* stage(int index) const { return s.ring() + index * plan.stage; }
  // Tensor cores take 16 rows at once.
  static LESS_DEVICE int completed(int chunks) {
    constexpr int kBlock = 16 * Tile::kChunks;
    return kMma ? (chunks + kBlock - 1) / kBlock * kBlock : chunks;
  }
  LESS_DEVICE void ask();
  LESS_DEVICE void ask_for_keys(unsigned char* to, int range, int tile);
  LESS_DEVICE void ask_for_values(unsigned char* to, int range, int tile);
  LESS_DEVICE void ask_for_state();
  LESS_DEVICE void load();
  LESS_DEVICE void load_slots();
  LESS_DEVICE float scale_of_bits(int slot, bool value, uint32_t bits) const;
  LESS_DEVICE uint4 ask_for_query(int i) const;
  LESS_DEVICE void load_queries(uint4 first);
  LESS_DEVICE void load_scaled_queries();
  LESS_DEVICE void narrow_queries(int i, const float (&four)[4], float factor);
  LESS_DEVICE void load_token();
  static constexpr int kRowPieces = (kD + 127) / 128;  // of a row that a warp reads, by a lane
  LESS_DEVICE void ask_for_row(const HeadRows& x, uint4 (&row)[kRowPieces]) const;
  LESS_DEVICE void keep_row(DType dtype, const uint4 (&row)[kRowPieces], float* to, float* scale);

  // -- packed.h: packed rows, which become rows of int8
  LESS_DEVICE DecodeRows rows_of_tile(int range, int tile, bool values) const;
  LESS_DEVICE void ask_for_rows(unsigned char* to, int range, int tile, bool values);
  template <DType kType>
  static LESS_DEVICE uint4 widened_chunk(const unsigned char* row, int c);
  template <DType kType>
  LESS_DEVICE void widen_pieces(const DecodeRows& rows, const unsigned char* from);
  template <DType kType>
  LESS_DEVICE void widen_cold(const DecodeRows& rows, const unsigned char* from);
  LESS_DEVICE void widen_rows(const unsigned char* from, int tile, bool values);
  LESS_DEVICE void ask_for_scales(const Slots& of, int slot, uint32_t& k, uint32_t& v) const;
  LESS_DEVICE void move_in(int slot);

  // -- attend.h: attention over the ranges
  LESS_DEVICE void attend();
  LESS_DEVICE const unsigned char* receive(int tile, bool values);
  LESS_DEVICE void multiply_keys();
  LESS_DEVICE void keep_queries(int g0, float (&q)[kQueries][kKept]) const;
  template <int kN>
  LESS_DEVICE void multiply_keys(const unsigned char* tile, int slot0, int g0,
                                 const float (&q)[kQueries][kKept]);
  LESS_DEVICE float capped(float logit) const {
    return p.spec.softcap > 0.0f ? p.spec.softcap * tanhf(logit / p.spec.softcap) : logit;
  }
  LESS_DEVICE void softmax();
  template <int kN>
  LESS_DEVICE void softmax(int first, int count);
  LESS_DEVICE void find_value_units();
  LESS_DEVICE float* value_unit() const { return q_scale() + G + s.range; }
  template <int kN, int kM>
  LESS_DEVICE void add_values();
  template <int kN, int kM>
  LESS_DEVICE void multiply_values(const unsigned char* tile, int slot0, int pass,
                                   float (&acc)[kN][kM]);
  template <int kN, int kM>
  LESS_DEVICE void keep_values(int pass, float (&acc)[kN][kM]);
  LESS_DEVICE void add_token();

  // -- mma.h: the same on tensor cores
  LESS_DEVICE void multiply_keys_mma(const unsigned char* tile, int slot0);
  template <int kI, int kJ>
  static LESS_DEVICE uint32_t two_halves(uint32_t four);
  static LESS_DEVICE void split_two(float2 x, uint32_t& high, uint32_t& low);
  LESS_DEVICE float2 two_weights(const float* mass, int slot, float inverse) const;
  LESS_DEVICE void multiply_values_mma(const unsigned char* tile, int slot0, int rows, int pass,
                                       float (&acc)[kPairs][4]);
  LESS_DEVICE void keep_values_mma(int pass, const float (&acc)[kPairs][4]);

  // -- integers.h: the same of packed rows, on tensor cores of integers
  static constexpr int kDigitRow = decode_digit_row(kD);  // bytes of a row of narrow_q
  static constexpr int kPackedBlocks = (kBlocks + kDecodeWarps - 1) / kDecodeWarps;  // of a warp
  static constexpr int kPackedPairs = kHeads / 2;  // of query heads, in a pass over values
  static LESS_DEVICE void three_digits(float x, uint32_t (&digit)[kDecodeDigits]);
  LESS_DEVICE void load_query_digits();
  static LESS_DEVICE int digit_at(int slot);
  LESS_DEVICE void keep_digits(int item, int slot, float mass, float scale) const;
  static LESS_DEVICE float sum_of_digits(const int32_t (&acc)[4]);
  static LESS_DEVICE int place_at(int r0, int r, int c);
  LESS_DEVICE void multiply_keys_packed(const unsigned char* tile, int slot0);
  LESS_DEVICE void add_values_packed();
  LESS_DEVICE void multiply_values_packed(const unsigned char* tile, int slot0, int pass,
                                          int32_t (&acc)[kPackedBlocks][kPackedPairs][4]) const;
  LESS_DEVICE void keep_values_packed(int pass,
                                      const int32_t (&acc)[kPackedBlocks][kPackedPairs][4]);

  // -- meet.h: where the blocks of a head meet, and the softmax over all parts
  LESS_DEVICE bool meet();
  LESS_DEVICE float* own_part(int of) const;
  LESS_DEVICE float part_float(int of, int i) const;
  LESS_DEVICE float4 part_four(int of, int i) const;
  LESS_DEVICE void weigh_parts();
  LESS_DEVICE void write_out();
  LESS_DEVICE void clear();

  // -- victim.h: who leaves, and what becomes of it
  LESS_DEVICE DecodeCandidate candidate(int slot, int32_t position, float score) const;
  LESS_DEVICE DecodeCandidate add_scores();
  LESS_DEVICE DecodeCandidate choose(DecodeCandidate best, int turn = 0);
  LESS_DEVICE DecodeCandidate lowest(int begin, int count) const;
  LESS_DEVICE void load_victim();
  LESS_DEVICE void fold();
  LESS_DEVICE bool competes(int slot, int32_t position, float score, DecodeCandidate& as) const;
  LESS_DEVICE void take(int slot);
  LESS_DEVICE void count();

  // -- merge.h: the victim becomes part of a slot that stays
  LESS_DEVICE int32_t joiner() const;
  LESS_DEVICE float score_of(int slot) const;
  LESS_DEVICE StoredRows cold(bool values) const;
  LESS_DEVICE int cold_slot(int slot) const;
  LESS_DEVICE uint8_t* codes() const;
  LESS_DEVICE float* numbers() const;
  LESS_DEVICE LaneRow joining_row(bool values) const;
  LESS_DEVICE void decode_slot(int slot, bool values, float* to) const;
  LESS_DEVICE void keep_victim();
  LESS_DEVICE bool takes_others(int slot, int32_t position, float score) const;
  LESS_DEVICE DecodeCandidate nearest(float mass) const;
  LESS_DEVICE void merge();
};

}  // namespace less::cuda
