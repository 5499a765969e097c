// The kernel of decode_step.cu, where its formula, grid, memory and order stand.
#pragma once

#include "cuda/convert.h"
#include "cuda/decode_maps.h"
#include "cuda/decode_step.h"
#include "cuda/features.h"

namespace less::cuda {

constexpr float kInfinity = __builtin_huge_valf();

// Who might leave. The lowest key does: the rank's bits in ascending order, then the position; an
// empty slot is below them all, by its index.
struct DecodeCandidate {
  uint32_t rank;
  uint32_t position;
  int32_t slot;  // S: the token itself
  float unused;

  LESS_DEVICE bool below(const DecodeCandidate& o) const {
    return rank < o.rank || (rank == o.rank && position < o.position);
  }
};

// The bits of a float in the floats' order; NaN counts as the lowest, -0 as 0.
LESS_DEVICE uint32_t ordered(float x) {
  const uint32_t bits = bits_of<uint32_t>(x == x ? x + 0.0f : -kInfinity);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The arrays of a block in shared memory, as the launcher has laid them out.
struct DecodeShared {
  unsigned char* raw;
  const DecodeLayout& at;

  template <typename T>
  LESS_DEVICE T* take(int offset) const {
    return reinterpret_cast<T*>(raw + offset);
  }
  LESS_DEVICE unsigned char* ring() const { return raw + at.ring; }
  LESS_DEVICE unsigned char* narrow_q() const { return raw + at.narrow_q; }
  LESS_DEVICE float* sums() const { return take<float>(at.sums); }
  LESS_DEVICE float* q() const { return take<float>(at.q); }
  LESS_DEVICE float* mass() const { return take<float>(at.mass); }
  LESS_DEVICE float* part() const { return take<float>(at.part); }
  LESS_DEVICE float* score() const { return take<float>(at.score); }
  LESS_DEVICE float* weight() const { return take<float>(at.weight); }
  LESS_DEVICE float* k_scale() const { return take<float>(at.k_scale); }
  LESS_DEVICE float* v_scale() const { return take<float>(at.v_scale); }
  LESS_DEVICE float* key() const { return take<float>(at.key); }
  LESS_DEVICE float* value() const { return take<float>(at.value); }
  LESS_DEVICE float* token() const { return take<float>(at.token); }
  LESS_DEVICE float* top() const { return take<float>(at.top); }
  LESS_DEVICE float* sum() const { return take<float>(at.sum); }
  LESS_DEVICE float* low() const { return take<float>(at.low); }
  LESS_DEVICE float* share() const { return take<float>(at.share); }
  LESS_DEVICE float* token_mass() const { return take<float>(at.token_mass); }
  LESS_DEVICE float* feature() const { return take<float>(at.feature); }
  LESS_DEVICE float* h() const { return take<float>(at.h); }
  LESS_DEVICE float* H() const { return take<float>(at.H); }
  LESS_DEVICE float* victim_key() const { return take<float>(at.victim_key); }
  LESS_DEVICE float* victim_value() const { return take<float>(at.victim_value); }
  LESS_DEVICE float* psi_share() const { return take<float>(at.psi_share); }
  LESS_DEVICE float* psi_shares() const { return take<float>(at.psi_shares); }
  LESS_DEVICE int32_t* position() const { return take<int32_t>(at.position); }
  LESS_DEVICE DecodeCandidate* candidate() const { return take<DecodeCandidate>(at.candidate); }
  LESS_DEVICE DecodeMapScratch maps() const {
    return {take<float>(at.map_sums), take<float>(at.map_hidden), take<float>(at.map_turn),
            raw + at.map_w2};
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

template <typename T, int kD, bool kMma>
struct DecodeBlock {
  using Tile = DecodeTile<T, kD>;
  static constexpr bool kScaled = sizeof(T) == 1;
  static constexpr int kHeads = decode_heads<T>();

  // On tensor cores: int8 and e4m3 are half floats, exactly.
  using Narrow = std::conditional_t<kScaled, __half, T>;
  static constexpr int kRow = kD + decode_q_pad<T, kD>();  // of narrow_q
  using Tag = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, BFloatTag, HalfTag>;
  static constexpr int kBlocks = kD / 16;  // of 16 columns of out
  static constexpr int kPairs = kDecodePairs;
  static constexpr int kTiles =
      kDecodeWarps * kPairs / kBlocks;  // of 8 query heads, in a pass over values

  const DecodeStepParams& p;
  const DecodePlan& plan;
  DecodeShared s;
  DecodePart at;
  int t, lane, warp;
  int G, R, S;
  int split, first, n;  // the range of slots [first, first + n)
  int stride;           // of mass
  int64_t b, head, row;
  int64_t seen;  // tokens of the row before this one
  DecodeCandidate victim;
  int asked = 0;      // the stage that is asked for next
  int received = 0;   // the stage that is looked at next
  int rank, ranks;    // of those who finish
  int column, width;  // their columns of H and out: [column, column + width)

  LESS_DEVICE DecodeBlock(const DecodeStepParams& params, const DecodePlan& decode_plan,
                          unsigned char* raw)
      : p(params),
        plan(decode_plan),
        s{raw, decode_plan.layout},
        at(int(params.Q / params.K), params.H != nullptr ? int(params.R) : 0, kD) {
    t = threadIdx.x;
    lane = t % 32;
    warp = t / 32;
    split = blockIdx.x;
    head = blockIdx.y;
    b = blockIdx.z;
    row = b * p.K + head;
    G = int(p.Q / p.K);
    R = p.H != nullptr ? int(p.R) : 0;
    S = int(p.slots.S);
    first = split * plan.per;
    n = min(plan.per, S - first);
    stride = plan.per + 8;
    join(plan.cluster ? split : 0, plan.cluster ? plan.splits : 1);
  }

  LESS_DEVICE void join(int as, int of) {
    rank = as;
    ranks = of;
    constexpr int kUnits = kD / 16;
    column = kUnits * rank / ranks * 16;
    width = kUnits * (rank + 1) / ranks * 16 - column;
  }

  LESS_DEVICE Narrow* narrow_q() const { return s.take<Narrow>(plan.layout.narrow_q); }
  LESS_DEVICE float* q_scale() const { return s.take<float>(plan.layout.q_scale); }
  LESS_DEVICE int64_t query(int g) const { return (b * p.Q + head * G + g) * kD; }
  LESS_DEVICE bool alone() const { return plan.splits == 1; }
  LESS_DEVICE bool last_split() const { return split == plan.splits - 1; }

  LESS_DEVICE void run() {
    grid_dependency_wait();
    if (p.valid != nullptr && !p.valid[b]) return clear();
    seen = p.seen[b];
    const int tiles = (n + plan.tile - 1) / plan.tile;
    victim = {0, 0, S, 0.0f};
    // Keys are asked for first; which values there are is only known from what load() brings.
    const int first_asked = min(tiles, Tile::kStages - 1);
#pragma unroll 1
    for (int i = 0; i < Tile::kStages; ++i) {
      if (i == first_asked) {
        load();
        __syncthreads();
        if (R > 0 && (plan.cluster || alone())) ask_for_state();
        continue;
      }
      ask(i < first_asked ? i : i - 1, tiles);
      copy_async_commit();
    }
    // Features of the queries while slots are on their way, and then, should one leave, of its key:
    // one loop, because a map's code is long.
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      if (turn == 1) {
        attend(tiles);
        if (!meet()) return;
        weigh_parts();
        write_out();
        grid_launch_dependents();
        if (p.victim == Victim::none) {
          if (plan.cluster && !LESS_BUG(leave_early)) cluster_sync();  // parts may still be read
          return;
        }
        victim = choose(add_scores());
        if (R == 0 || p.victim != Victim::fold || victim.rank == 0) break;
        load_victim();
      }
      if (R == 0) continue;
      const FeatureMaps maps = turn == 0 ? p.phi : p.psi;
      share_of_maps(maps, turn == 0 ? head * G : head, turn == 0 ? G : 1,
                    turn == 0 ? s.q() : s.victim_key(), turn == 0 ? split : rank,
                    turn == 0 ? plan.splits : ranks, s.maps(),
                    turn == 0 ? s.part() + at.feature : s.psi_share());
      if (turn == 1) fold();
    }
    take(victim.slot);
    count();
  }

  // A row without a token: zeros.
  LESS_DEVICE void clear() {
    const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (split != 0) return;
#pragma unroll 1
    for (int i = t * 4; i < G * kD; i += kDecodeThreads * 4) {
      store_four(p.out, p.q_dtype, query(0) + i, zero);
    }
  }

  // -- what is read once
  // ---------------------------------------------------------------------------

  LESS_DEVICE unsigned char* stage(int index) const {
    return s.ring() + index * (plan.tile * Tile::kBytes);
  }

  // The stage after that, around the ring.
  LESS_DEVICE int after(int stage) const { return stage + 1 == plan.ring ? 0 : stage + 1; }

  LESS_DEVICE void ask_for_keys(unsigned char* to, int tile) {
    const auto* const rows = static_cast<const unsigned char*>(p.slots.k) +
                             (row * S + first + tile * plan.tile) * Tile::kBytes;
    const int chunks = min(plan.tile, n - tile * plan.tile) * Tile::kChunks;
#pragma unroll 1
    for (int i = t; i < completed(chunks); i += kDecodeThreads) {
      const bool in = LESS_BUG(key_bound) || i < chunks;
      copy_async16(to + Tile::place(i) * 16, rows + (in ? i * 16 : 0), in);
    }
  }

  // Tensor cores take 16 rows at once.
  static LESS_DEVICE int completed(int chunks) {
    constexpr int kBlock = 16 * Tile::kChunks;
    return kMma ? (chunks + kBlock - 1) / kBlock * kBlock : chunks;
  }

  // Rows of empty slots, and those that complete a multiple of 16, become zeros.
  LESS_DEVICE void ask_for_values(unsigned char* to, int tile) {
    const int slot0 = tile * plan.tile, rows = min(plan.tile, n - slot0);
    const auto* const from =
        static_cast<const unsigned char*>(p.slots.v) + (row * S + first + slot0) * Tile::kBytes;
#pragma unroll 1
    for (int i = t; i < completed(rows * Tile::kChunks); i += kDecodeThreads) {
      const int r = i / Tile::kChunks;
      const bool held = s.position()[slot0 + r] >= 0;
      copy_async16(to + Tile::place(i) * 16, from + (held ? i * 16 : 0),
                   held || (LESS_BUG(empty_values) && r < rows));
    }
  }

  // Tiles of keys, then of values, as often as those are read; then nothing.
  LESS_DEVICE void ask(int item, int tiles) {
    unsigned char* const to = stage(asked);
    asked = after(asked);
    if (item < tiles) {
      ask_for_keys(to, item);
    } else if (item < tiles * (1 + decode_passes<T, kD, kMma>(G))) {
      ask_for_values(to, (item - tiles) % tiles);
    }
  }

  // This block's columns of H.
  LESS_DEVICE void ask_for_state() {
    const float* const H = p.H + row * R * kD + column;
    const int chunks = width / 4;
#pragma unroll 1
    for (int i = t; i < R * chunks; i += kDecodeThreads) {
      const int r = i / chunks, c = i % chunks * 4;
      copy_async16(s.H() + r * width + c, H + r * kD + c);
    }
  }

  // Queries, the token, and what is known of each slot.
  LESS_DEVICE void load() {
#pragma unroll 1
    for (int i = t; i < plan.per; i += kDecodeThreads) {
      const bool in = i < n;
      const int64_t slot = row * S + first + i;
      const int32_t position = in ? p.slots.position[slot] : -1;
      s.position()[i] = position;
      s.weight()[i] = in ? p.slots.weight[slot] : 0.0f;
      s.score()[i] = in ? p.slots.score[slot] : 0.0f;
      if constexpr (kScaled) {
        s.k_scale()[i] = in ? p.slots.k_scale[slot] : 0.0f;
        s.v_scale()[i] = position >= 0 ? p.slots.v_scale[slot] : 0.0f;
      }
    }
    if constexpr (kMma && kScaled) {
      load_scaled_queries();
    } else {
      load_queries();
    }
    if constexpr (kMma) {  // heads that complete a multiple of 8
#pragma unroll 1
      for (int i = G * kD + t * 4; i < (G + 7) / 8 * 8 * kD; i += kDecodeThreads * 4) {
        store8_shared(narrow_q() + i / kD * kRow + i % kD, make_uint2(0, 0));
      }
    }
    if (warp == 0) load_row(p.k, s.key(), s.token());
    if (warp == 1) load_row(p.v, s.value(), s.token() + 1);
  }

  LESS_DEVICE void load_queries() {
#pragma unroll 1
    for (int i = t * 4; i < G * kD; i += kDecodeThreads * 4) {
      float four[4];
      load_four(p.q, p.q_dtype, query(0) + i, four);
      store16_shared(s.q() + i, bits_of<uint4>(make_float4(four[0], four[1], four[2], four[3])));
      if constexpr (kMma) narrow_queries(i, four, 1.0f);
    }
  }

  LESS_DEVICE void narrow_queries(int i, const float (&four)[4], float factor) {
    if constexpr (kMma) {
      store8_shared(narrow_q() + i / kD * kRow + i % kD,
                    make_uint2(two_narrowed<Narrow>(four[0] * factor, four[1] * factor),
                               two_narrowed<Narrow>(four[2] * factor, four[3] * factor)));
    }
  }

  // Queries of any size as half floats: each is divided by the power of two below its largest
  // element. A warp per query.
  LESS_DEVICE void load_scaled_queries() {
#pragma unroll 1
    for (int g = warp; g < G; g += kDecodeWarps) {
      uint32_t largest = 0;
#pragma unroll 1
      for (int d = lane * 4; d < kD; d += 128) {
        float four[4];
        load_four(p.q, p.q_dtype, query(g) + d, four);
        store16_shared(s.q() + g * kD + d,
                       bits_of<uint4>(make_float4(four[0], four[1], four[2], four[3])));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          largest = max(largest, bits_of<uint32_t>(four[i]) & 0x7fffffffu);
        }
      }
      const float step = power_below(__reduce_max_sync(0xffffffffu, largest));
      if (lane == 0) q_scale()[g] = step;
#pragma unroll 1
      for (int d = lane * 4; d < kD; d += 128) {
        const float4 x = bits_of<float4>(load16_shared(s.q() + g * kD + d));
        const float four[4] = {x.x, x.y, x.z, x.w};
        narrow_queries(g * kD + d, four, 1.0f / step);
      }
    }
  }

  // The power of two at or below a float >= 0 of these bits; 1 where it or its inverse is none.
  static LESS_DEVICE float power_below(uint32_t bits) {
    const uint32_t exponent = bits >> 23;
    return exponent == 0 || exponent >= 253 ? 1.0f : bits_of<float>(exponent << 23);
  }

  // A row [D] of the token's, rounded as the slots round it; one warp.
  LESS_DEVICE void load_row(const void* x, float* to, float* scale) {
    float step = 1.0f;
    if constexpr (kScaled) {
      uint32_t largest = 0;  // of |x| as integers: in order, and NaN is above infinity
#pragma unroll 1
      for (int d = lane * 4; d < kD; d += 128) {
        float four[4];
        load_four(x, p.kv_dtype, row * kD + d, four);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          largest = max(largest, bits_of<uint32_t>(four[i]) & 0x7fffffffu);
      }
      largest = __reduce_max_sync(0xffffffffu, largest);
      step = bits_of<float>(largest) / (std::is_same_v<T, int8_t> ? 127.0f : 448.0f);
      if (lane == 0) *scale = step;
    }
#pragma unroll 1
    for (int d = lane * 4; d < kD; d += 128) {
      float four[4];
      load_four(x, p.kv_dtype, row * kD + d, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kScaled) {
          const bool sound = step > 0.0f && step < kInfinity;
          four[i] = sound ? widened(narrowed<T>(four[i] / step)) : 0.0f;
        } else {
          four[i] = widened(narrowed<T>(four[i]));
        }
      }
      store16_shared(to + d, bits_of<uint4>(make_float4(four[0], four[1], four[2], four[3])));
    }
  }

  // -- attention over the range
  // --------------------------------------------------------------------

  LESS_DEVICE void attend(int tiles) {
    if constexpr (kMma) {
#pragma unroll 1
      for (int item = 0; item < tiles; ++item) {
        multiply_keys_mma(receive(item, tiles), item * plan.tile);
      }
    } else {
      float q[kQueries][kKept];
#pragma unroll 1
      for (int item = 0; item < tiles; ++item) {
        const unsigned char* const tile = receive(item, tiles);
#pragma unroll 1
        for (int g0 = 0; g0 < G; g0 += kQueries) {
          if (kKept == kFloats && (item == 0 || G > kQueries)) keep_queries(g0, q);
          multiply_keys(tile, item * plan.tile, g0, q);
        }
      }
    }
    if (!LESS_BUG(logits_barrier)) __syncthreads();
    softmax();
    if constexpr (kMma) {
      add_values<kPairs, 4>(tiles);
    } else if (G <= 2) {
      add_values<2, Tile::kElements>(tiles);
    } else {
      add_values<kHeads, Tile::kElements>(tiles);
    }
    copy_async_wait<0>();
    __syncthreads();
    add_token();
  }

  // Where the item is, once it is here; asks for the one that takes the place of the item before.
  LESS_DEVICE const unsigned char* receive(int item, int tiles) {
    if (!LESS_BUG(wait)) copy_async_wait<Tile::kStages - 2>();
    if (!LESS_BUG(tile_barrier)) __syncthreads();
    ask(item + Tile::kStages - 1, tiles);
    copy_async_commit();
    const unsigned char* const here = stage(received);
    received = after(received);
    return here;
  }

  template <int kN, int kM>
  LESS_DEVICE void add_values(int tiles) {
    int item = tiles;
#pragma unroll 1
    for (int pass = 0; pass < decode_passes<T, kD, kMma>(G); ++pass) {
      float acc[kN][kM];
#pragma unroll
      for (int i = 0; i < kN; ++i) {
#pragma unroll
        for (int j = 0; j < kM; ++j) acc[i][j] = 0.0f;
      }
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile, ++item) {
        multiply_values(receive(item, tiles), tile * plan.tile, pass, acc);
      }
      keep_values(pass, acc);
    }
  }

  // mass[g, slot] = q k of the tile's rows. Without tensor cores, lanes of a row take its chunks in
  // turns, and keep theirs of a few queries.
  static constexpr int kLanes = 1 << (Tile::kPower < 3 ? Tile::kPower : 3);
  static constexpr int kTurns = Tile::kChunks / kLanes;
  static constexpr int kFloats = kTurns * Tile::kElements;  // of a query that a lane keeps
  static constexpr int kQueries = kFloats <= 32 ? 2 : 1;
  static constexpr int kKept = kFloats <= 48 ? kFloats : 4;  // more are read when they are needed

  LESS_DEVICE void keep_queries(int g0, float (&q)[kQueries][kKept]) const {
    constexpr int kE = Tile::kElements;
#pragma unroll
    for (int g = 0; g < kQueries; ++g) {
#pragma unroll
      for (int i = 0; i < kKept / 4; ++i) {
        const int d = (i / (kE / 4) * kLanes + lane % kLanes) * kE + i % (kE / 4) * 4;
        const float4 x = bits_of<float4>(load16_shared(s.q() + min(g0 + g, G - 1) * kD + d));
        q[g][i * 4] = x.x;
        q[g][i * 4 + 1] = x.y;
        q[g][i * 4 + 2] = x.z;
        q[g][i * 4 + 3] = x.w;
      }
    }
  }

  LESS_DEVICE void multiply_keys(const unsigned char* tile, int slot0, int g0,
                                 const float (&q)[kQueries][kKept]) {
    constexpr int kE = Tile::kElements, kAtOnce = kDecodeThreads / kLanes;
    const int rows = min(plan.tile, n - slot0), turn = lane % kLanes;
#pragma unroll 1
    for (int r0 = 0; r0 < rows; r0 += kAtOnce) {
      const int r = r0 + t / kLanes;
      float dot[kQueries];
#pragma unroll
      for (int g = 0; g < kQueries; ++g) dot[g] = 0.0f;
      if (r < rows) {
#pragma unroll
        for (int i = 0; i < kTurns; ++i) {
          const int chunk = r * Tile::kChunks + i * kLanes + turn;
          float k[kE];
          widen16<T>(load16_shared(tile + Tile::place(chunk) * 16), k);
#pragma unroll
          for (int g = 0; g < kQueries; ++g) {
            if (g0 + g >= G) break;
            if constexpr (kKept == kFloats) {
#pragma unroll
              for (int e = 0; e < kE; ++e) dot[g] = fmaf(q[g][i * kE + e], k[e], dot[g]);
            } else {
              const float* const x = s.q() + (g0 + g) * kD + (i * kLanes + turn) * kE;
#pragma unroll
              for (int e = 0; e < kE; e += 4) {
                const float4 four = bits_of<float4>(load16_shared(x + e));
                dot[g] = fmaf(four.x, k[e], dot[g]);
                dot[g] = fmaf(four.y, k[e + 1], dot[g]);
                dot[g] = fmaf(four.z, k[e + 2], dot[g]);
                dot[g] = fmaf(four.w, k[e + 3], dot[g]);
              }
            }
          }
        }
      }
#pragma unroll
      for (int g = 0; g < kQueries; ++g) {
        if (g0 + g >= G) break;
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) {
          dot[g] += __shfl_xor_sync(0xffffffffu, dot[g], step);
        }
        if (turn == 0 && r < rows) s.mass()[(g0 + g) * stride + slot0 + r] = dot[g];
      }
    }
  }

  LESS_DEVICE float capped(float logit) const {
    return p.softcap > 0.0f ? p.softcap * tanhf(logit / p.softcap) : logit;
  }

  // mass: q k becomes the logit, then e^(logit - top). A warp per query; the first tile of values
  // has the barrier after it.
  LESS_DEVICE void softmax() {
    const int padded = (n + 15) / 16 * 16;
    if constexpr (kScaled && kMma) {
      uint32_t largest = 0;
#pragma unroll 1
      for (int i = lane; i < n; i += 32) {
        largest = max(largest, bits_of<uint32_t>(s.v_scale()[i]) & 0x7fffffffu);
      }
      largest = __reduce_max_sync(0xffffffffu, largest);
      if (t == 0) q_scale()[G] = power_below(largest);
    }
#pragma unroll 1
    for (int g = warp; g < G; g += kDecodeWarps) {
      float* const mass = s.mass() + g * stride;
      float top = -kInfinity, token = -kInfinity;
#pragma unroll 1
      for (int i = lane; i < n; i += 32) {
        float dot = mass[i];
        if constexpr (kScaled) dot *= s.k_scale()[i];
        if constexpr (kScaled && kMma) dot *= q_scale()[g];
        const float logit =
            s.position()[i] >= 0 ? capped(dot * p.scale) + s.weight()[i] : -kInfinity;
        mass[i] = logit;
        top = fmaxf(top, logit);
      }
      if (last_split()) {
        float dot = 0.0f;
#pragma unroll 1
        for (int d = lane; d < kD; d += 32) dot = fmaf(s.q()[g * kD + d], s.key()[d], dot);
        dot = warp_sum(dot);
        if constexpr (kScaled) dot *= s.token()[0];
        token = capped(dot * p.scale);
      }
      top = fmaxf(warp_max(top), token);
      float sum = 0.0f;
#pragma unroll 1
      for (int i = lane; i < padded; i += 32) {
        const float logit = i < n ? mass[i] : -kInfinity;
        const float e = logit == -kInfinity ? 0.0f : expf(logit - top);
        mass[i] = e;
        sum += e;
      }
      sum = warp_sum(sum);
      if (lane == 0) {
        const float e = token == -kInfinity ? 0.0f : expf(token - top);
        mass[plan.per] = e;
        s.part()[at.top + g] = top;
        s.part()[at.sum + g] = sum + e;
        s.part()[at.token + g] = token;
      }
    }
  }

  // acc[g] += mass[g, slot] v of the tile's rows: a thread has a chunk of every so many rows.
  template <int kN, int kM>
  LESS_DEVICE void multiply_values(const unsigned char* tile, int slot0, int pass,
                                   float (&acc)[kN][kM]) {
    const int rows = min(plan.tile, n - slot0);
    if constexpr (kMma) {
      multiply_values_mma(tile, slot0, rows, pass, acc);
    } else {
      constexpr int kAtOnce = kDecodeThreads / Tile::kChunks;
      const int chunk = t % Tile::kChunks;
      const int heads = min(kN, G - pass * kN);
      if (t >= kAtOnce * Tile::kChunks) return;
      const float* const mass = s.mass() + pass * kN * stride + slot0;
#pragma unroll kN <= 2 ? 4 : 1
      for (int r = t / Tile::kChunks; r < rows; r += kAtOnce) {
        float v[kM];
        widen16<T>(load16_shared(tile + Tile::place(r * Tile::kChunks + chunk) * 16), v);
        if constexpr (kScaled) {
          const float scale = s.v_scale()[slot0 + r];
#pragma unroll
          for (int e = 0; e < kM; ++e) v[e] *= scale;
        }
#pragma unroll
        for (int g = 0; g < kN; ++g) {
          if (g >= heads) break;
          const float m = mass[g * stride + r];
#pragma unroll
          for (int e = 0; e < kM; ++e) acc[g][e] = fmaf(m, v[e], acc[g][e]);
        }
      }
    }
  }

  // The sums of a pass go to the part, over those who took other rows.
  template <int kN, int kM>
  LESS_DEVICE void keep_values(int pass, float (&acc)[kN][kM]) {
    if constexpr (kMma) {
      keep_values_mma(pass, acc);
    } else {
      constexpr int kAtOnce = kDecodeThreads / Tile::kChunks;
      const int heads = min(kN, G - pass * kN);
      if (t < kAtOnce * Tile::kChunks) {
#pragma unroll
        for (int g = 0; g < kN; ++g) {
          if (g >= heads) break;
          float* const to =
              s.sums() + (t / Tile::kChunks * heads + g) * kD + t % Tile::kChunks * Tile::kElements;
#pragma unroll
          for (int e = 0; e < kM; e += 4) {
            store16_shared(to + e, bits_of<uint4>(make_float4(acc[g][e], acc[g][e + 1],
                                                              acc[g][e + 2], acc[g][e + 3])));
          }
        }
      }
      if (!LESS_BUG(sums_barrier)) __syncthreads();
#pragma unroll 1
      for (int i = t; i < heads * kD; i += kDecodeThreads) {
        float sum = s.sums()[i];
#pragma unroll
        for (int w = 1; w < kAtOnce; ++w) sum += s.sums()[w * heads * kD + i];
        s.part()[at.value + pass * kN * kD + i] = sum;
      }
    }
  }

  // -- the same on tensor cores
  // --------------------------------------------------------------------

  // Slots are the rows of the product, queries its columns.
  LESS_DEVICE void multiply_keys_mma(const unsigned char* tile, int slot0) {
    const int rows = min(plan.tile, n - slot0);
#pragma unroll 1
    for (int r0 = warp * 16; r0 < rows; r0 += kDecodeWarps * 16) {
#pragma unroll 1
      for (int g0 = 0; g0 < G; g0 += 8) {
        float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int k = 0; k < kBlocks; ++k) {
          uint32_t keys[4], queries[2];
          if constexpr (kScaled) {
            // A thread has 4 elements of a row, where the product's order has two and two: the sum
            // over D takes them in this order on both sides.
            uint32_t fours[2];
            const int chunk = (r0 + lane % 16) * Tile::kChunks + k;
            ldmatrix_x2(fours, tile + Tile::place(chunk) * 16);
            keys[0] = two_halves<0, 1>(fours[0]);
            keys[1] = two_halves<0, 1>(fours[1]);
            keys[2] = two_halves<2, 3>(fours[0]);
            keys[3] = two_halves<2, 3>(fours[1]);
            const uint2 q =
                load8_shared(narrow_q() + (g0 + lane / 4) * kRow + k * 16 + lane % 4 * 4);
            queries[0] = q.x;
            queries[1] = q.y;
          } else {
            const int chunk = (r0 + lane % 16) * Tile::kChunks + k * 2 + lane / 16;
            ldmatrix_x4(keys, tile + Tile::place(chunk) * 16);
            ldmatrix_x2(queries, narrow_q() + (g0 + lane % 8) * kRow + k * 16 + lane / 8 % 2 * 8);
          }
          mma_m16n8k16(acc, keys, queries, Tag());
        }
        // Lanes of a quad take their two heads in different order: 32 different banks.
        const int turn = lane % 4 / 2, g = g0 + lane % 4 * 2;
        float* const mass = s.mass() + slot0 + r0 + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float even = acc[half * 2], odd = acc[half * 2 + 1];
          if (g + turn < G) mass[(g + turn) * stride + half * 8] = turn ? odd : even;
          if (g + 1 - turn < G) mass[(g + 1 - turn) * stride + half * 8] = turn ? even : odd;
        }
      }
    }
  }

  // Bytes kI and kJ of four int8 or e4m3, as half floats.
  template <int kI, int kJ>
  static LESS_DEVICE uint32_t two_halves(uint32_t four) {
    if constexpr (std::is_same_v<T, int8_t>) {
      // x + 128 as the last bits of 1024 + 128 + x.
      const uint32_t biased =
          __byte_perm(four ^ 0x80808080u, 0x64646464u, kI | 0x40 | kJ << 8 | 0x4000);
      return bits_of<uint32_t>(
          __hsub2(bits_of<__half2>(biased), bits_of<__half2>(uint32_t(0x64806480))));
    } else {
      const uint32_t two = __byte_perm(four, 0, kI | kJ << 4 | 0x4400) & 0xffffu;
      return bits_of<uint32_t>(__nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(two), __NV_E4M3));
    }
  }

  // x = high + low, to twice the bits of Narrow.
  static LESS_DEVICE void split_two(float2 x, uint32_t& high, uint32_t& low) {
    high = two_narrowed<Narrow>(x.x, x.y);
    float rounded[2];
    widen4(high, rounded, Narrow());
    low = two_narrowed<Narrow>(x.x - rounded[0], x.y - rounded[1]);
  }

  // Masses of two slots, times the scales of their values in units of the range's.
  LESS_DEVICE float2 two_weights(const float* mass, int slot, float inverse) const {
    float2 two = bits_of<float2>(load8_shared(mass + slot));
    if constexpr (kScaled) {
      const float2 scale = bits_of<float2>(load8_shared(s.v_scale() + slot));
      two.x *= scale.x * inverse;
      two.y *= scale.y * inverse;
    }
    return two;
  }

  // Columns of values are the rows of the product, queries its columns. The masses go in as sums of
  // two narrow numbers, so that what they lose by it is below what a sum of floats loses.
  LESS_DEVICE void multiply_values_mma(const unsigned char* tile, int slot0, int rows, int pass,
                                       float (&acc)[kPairs][4]) {
    const int pairs = min(kTiles, (G + 7) / 8 - pass * kTiles) * kBlocks;
    float inverse = 1.0f;
    if constexpr (kScaled) inverse = 1.0f / q_scale()[G];
#pragma unroll 1
    for (int r0 = 0; r0 < rows; r0 += 16) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int pair = i * kDecodeWarps + warp;
        if (pair >= pairs) break;
        const int block = pair % kBlocks;
        const int g = (pass * kTiles + pair / kBlocks) * 8 + lane / 4;
        float2 near = make_float2(0.0f, 0.0f), far = near;
        if (g < G) {
          near = two_weights(s.mass() + g * stride, slot0 + r0 + lane % 4 * 2, inverse);
          far = two_weights(s.mass() + g * stride, slot0 + r0 + lane % 4 * 2 + 8, inverse);
        }
        uint32_t high[2], low[2], values[4];
        split_two(near, high[0], low[0]);
        split_two(far, high[1], low[1]);
        if constexpr (kScaled) {
          // Transposed in pairs of columns: a thread has columns 2 i and 2 i + 1 of two slots.
          uint32_t fours[2];
          const int chunk = (r0 + lane % 16) * Tile::kChunks + block;
          ldmatrix_x2_trans(fours, tile + Tile::place(chunk) * 16);
          values[0] = two_halves<0, 2>(fours[0]);
          values[1] = two_halves<1, 3>(fours[0]);
          values[2] = two_halves<0, 2>(fours[1]);
          values[3] = two_halves<1, 3>(fours[1]);
        } else {
          const int chunk =
              (r0 + lane / 16 * 8 + lane % 8) * Tile::kChunks + block * 2 + lane / 8 % 2;
          ldmatrix_x4_trans(values, tile + Tile::place(chunk) * 16);
        }
        mma_m16n8k16(acc[i], values, high, Tag());
        if (!LESS_BUG(low_half)) mma_m16n8k16(acc[i], values, low, Tag());
      }
    }
  }

  LESS_DEVICE void keep_values_mma(int pass, const float (&acc)[kPairs][4]) {
    float unit = 1.0f;
    if constexpr (kScaled) unit = q_scale()[G];
    const int pairs = min(kTiles, (G + 7) / 8 - pass * kTiles) * kBlocks;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int pair = i * kDecodeWarps + warp;
      if (pair >= pairs) break;
      constexpr int kFar = kScaled ? 1 : 8;  // from a thread's first column to its second
      const int d = pair % kBlocks * 16 + lane / 4 * (kScaled ? 2 : 1);
      const int g = (pass * kTiles + pair / kBlocks) * 8 + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (g + j % 2 >= G) continue;
        s.part()[at.value + (g + j % 2) * kD + d + j / 2 * kFar] = acc[i][j] * unit;
      }
    }
  }

  // The token's own value; it is in the last split.
  LESS_DEVICE void add_token() {
    if (!last_split()) return;
    float scale = 1.0f;
    if constexpr (kScaled) scale = s.token()[1];
#pragma unroll 1
    for (int i = t; i < G * kD; i += kDecodeThreads) {
      const float mass = s.mass()[i / kD * stride + plan.per];
      s.part()[at.value + i] = fmaf(mass, s.value()[i % kD] * scale, s.part()[at.value + i]);
    }
  }

  // -- where the blocks of a head meet
  // -------------------------------------------------------------

  // Makes the parts known to those who finish; false: this block does not.
  LESS_DEVICE bool meet() {
    if (plan.cluster) {
      if (!LESS_BUG(meet_barrier)) cluster_sync();
      return true;
    }
    if (alone()) {
      __syncthreads();
      return true;
    }
#pragma unroll 1
    for (int i = 3 * G + G * R + t; i < at.value; i += kDecodeThreads) s.part()[i] = 0.0f;
    __syncthreads();
    float* const part = plan.parts + (row * plan.splits + split) * plan.part;
#pragma unroll 1
    for (int i = t * 4; i < plan.part; i += kDecodeThreads * 4) {
      store16(part + i, load16_shared(s.part() + i));
    }
    if (p.scores) {
      float* const masses = plan.masses + (row * plan.splits + split) * G * plan.per;
      const int padded = (n + 15) / 16 * 16;
#pragma unroll 1
      for (int i = t * 4; i < G * padded; i += kDecodeThreads * 4) {
        const int g = i / padded, slot = i % padded;
        store16(masses + g * plan.per + slot, load16_shared(s.mass() + g * stride + slot));
      }
    }
    SMEM_ARRAY(int, last, 1);
    // One thread's fences speak for the block: the barriers order the others before and after them.
    if (!LESS_BUG(arrive_barrier)) __syncthreads();
    if (t == 0) {
      if (!LESS_BUG(arrive_fence)) fence_gpu();
      last[0] = atomic_add(plan.head_count + row, 1) == plan.splits - 1;
      if (!LESS_BUG(last_fence)) fence_gpu();
    }
    __syncthreads();
    if (last[0] == 0) return false;
    if (t == 0 && !LESS_BUG(head_count)) store(plan.head_count + row, 0);
    if (R == 0) return true;
    ask_for_state();
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    return true;
  }

  LESS_DEVICE float part_float(int of, int i) const {
    if (plan.cluster) return load_cluster(s.part() + i, of);
    return alone() ? s.part()[i] : plan.parts[(row * plan.splits + of) * plan.part + i];
  }

  LESS_DEVICE float4 part_four(int of, int i) const {
    if (plan.cluster) return load_cluster(reinterpret_cast<const float4*>(s.part() + i), of);
    return bits_of<float4>(alone() ? load16_shared(s.part() + i)
                                   : load16(plan.parts + (row * plan.splits + of) * plan.part + i));
  }

  // -- the softmax over all parts
  // ------------------------------------------------------------------

  // The parts' factors, the state's, and what each part received of the whole.
  LESS_DEVICE void weigh_parts() {
#pragma unroll 1
    for (int i = t; i < plan.splits * G; i += kDecodeThreads) {
      s.top()[i] = part_float(i / G, at.top + i % G);
      s.sum()[i] = part_float(i / G, at.sum + i % G);
    }
#pragma unroll 1
    for (int g = t; g < G; g += kDecodeThreads) {
      s.token_mass()[g] = part_float(plan.splits - 1, at.token + g);
    }
#pragma unroll 1
    for (int i = t; i < G * R; i += kDecodeThreads) {
      float y = 0.0f;
#pragma unroll 4
      for (int of = 0; of < plan.splits; ++of) y += part_float(of, at.feature + i);
      s.feature()[i] = feature(p.phi, head * G + i / R, i % R, y);
    }
    if (!LESS_BUG(gather_barrier)) __syncthreads();
#pragma unroll 1
    for (int g = t; g < G; g += kDecodeThreads) {
      float top = -kInfinity, total = 0.0f, low = 0.0f;
#pragma unroll 4
      for (int of = 0; of < plan.splits; ++of) top = fmaxf(top, s.top()[of * G + g]);
#pragma unroll 4
      for (int of = 0; of < plan.splits; ++of) {
        total = fmaf(s.sum()[of * G + g], expf(s.top()[of * G + g] - top), total);
      }
#pragma unroll 1
      for (int r = 0; r < R; ++r) low = fmaf(s.feature()[g * R + r], p.z[row * R + r], low);
      const float inverse = 1.0f / total;
      float kept = inverse;
      s.low()[g] = s.share()[g] = 0.0f;
      if (low > 0.0f) {
        const float log_low = logf(low), both = fmaxf(top, log_low);
        const float kept_mass = expf(top - both) * total, low_mass = expf(log_low - both);
        const float whole = 1.0f / (kept_mass + low_mass);
        kept = expf(top - both) * whole;
        s.low()[g] = low_mass * whole / low;
        s.share()[g] = low_mass * whole;
      }
      s.token_mass()[g] = expf(s.token_mass()[g] - top) * inverse;
#pragma unroll 4
      for (int of = 0; of < plan.splits; ++of) {
        const float mass = expf(s.top()[of * G + g] - top);
        s.top()[of * G + g] = mass * kept;
        s.sum()[of * G + g] = mass * inverse;
      }
    }
    if (!LESS_BUG(weigh_barrier)) __syncthreads();
  }

  LESS_DEVICE void write_out() {
    const int fours = width / 4;
#pragma unroll 1
    for (int i = t; i < G * fours; i += kDecodeThreads) {
      const int g = i / fours, c = i % fours * 4;
      float four[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
      for (int of = 0; of < plan.splits; ++of) {
        const float factor = s.top()[of * G + g];
        const float4 v = part_four(of, at.value + g * kD + column + c);
        four[0] = fmaf(factor, v.x, four[0]);
        four[1] = fmaf(factor, v.y, four[1]);
        four[2] = fmaf(factor, v.z, four[2]);
        four[3] = fmaf(factor, v.w, four[3]);
      }
      const float low = s.low()[g];
#pragma unroll 1
      for (int r = 0; r < R; ++r) {
        const float factor = s.feature()[g * R + r] * low;
        const float4 h = bits_of<float4>(load16_shared(s.H() + r * width + c));
        four[0] = fmaf(factor, h.x, four[0]);
        four[1] = fmaf(factor, h.y, four[1]);
        four[2] = fmaf(factor, h.z, four[2]);
        four[3] = fmaf(factor, h.w, four[3]);
      }
      store_four(p.out, p.q_dtype, query(g) + column + c, four);
    }
    if (R > 0 && rank == 0 && t == 0) {
      double share = 0.0;
#pragma unroll 1
      for (int g = 0; g < G; ++g) share += s.share()[g];
      p.share[row] += share;
    }
  }

  // -- who leaves
  // ----------------------------------------------------------------------------------

  LESS_DEVICE DecodeCandidate candidate(int slot, int32_t position, float score) const {
    if (position < 0) return {0, uint32_t(slot), slot, 0.0f};
    float rank_of = -kInfinity;
    if (p.rule.by_score) {
      rank_of = p.rule.per_age ? score / float(max(int(seen) + 1 - position, 1)) : score;
    }
    const bool stays = position > seen - p.rule.recent || position < p.rule.sinks;
    return {stays ? ordered(kInfinity) : ordered(rank_of), uint32_t(position), slot, 0.0f};
  }

  // Writes the scores of this block's slots; who of them would leave.
  LESS_DEVICE DecodeCandidate add_scores() {
    if (warp == 0) {
      float received = 0.0f;
#pragma unroll 1
      for (int g = lane; g < G; g += 32) received += s.token_mass()[g];
      received = warp_sum(received);
      if (lane == 0) s.token()[2] = p.scores ? received : 0.0f;
    }
    __syncthreads();
    const bool own = plan.cluster || alone();
    const int begin = own ? first : 0, end = own ? first + n : S;
    DecodeCandidate best{0xffffffffu, 0xffffffffu, S, 0.0f};
#pragma unroll 1
    for (int slot = begin + t; slot < end; slot += kDecodeThreads) {
      const int of = own ? split : slot / plan.per, i = slot - of * plan.per;
      const int32_t position = own ? s.position()[i] : p.slots.position[row * S + slot];
      float score = own ? s.score()[i] : p.slots.score[row * S + slot];
      if (p.scores) {
        const float* const masses = plan.masses + (row * plan.splits + of) * G * plan.per + i;
        float received = 0.0f;
#pragma unroll 1
        for (int g = 0; g < G; ++g) {
          const float mass = own ? s.mass()[g * stride + i] : masses[g * plan.per];
          received = fmaf(mass, s.sum()[of * G + g], received);
        }
        score = position >= 0 ? fmaf(score, p.decay, received) : 0.0f;
        store(p.slots.score + row * S + slot, score);
      }
      const DecodeCandidate here = candidate(slot, position, score);
      if (here.below(best)) best = here;
    }
    if (rank == ranks - 1 && t == 0) {
      const DecodeCandidate token = candidate(S, int32_t(seen), s.token()[2]);
      if (token.below(best)) best = token;
    }
    return best;
  }

  // The lowest of all threads and blocks.
  LESS_DEVICE DecodeCandidate choose(DecodeCandidate best) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      DecodeCandidate other;
      other.rank = __shfl_xor_sync(0xffffffffu, best.rank, step);
      other.position = __shfl_xor_sync(0xffffffffu, best.position, step);
      other.slot = __shfl_xor_sync(0xffffffffu, best.slot, step);
      other.unused = 0.0f;
      if (other.below(best)) best = other;
    }
    if (lane == 0) store16_shared(s.candidate() + warp, bits_of<uint4>(best));
    if (!LESS_BUG(choose_barrier)) __syncthreads();
    best = lowest(0, kDecodeWarps);
    if (ranks == 1) return best;
    if (t < ranks) store_cluster(s.candidate() + kDecodeWarps + rank, t, best);
    if (!LESS_BUG(choose_cluster_barrier)) cluster_sync();
    return lowest(kDecodeWarps, ranks);
  }

  LESS_DEVICE DecodeCandidate lowest(int begin, int count) const {
    auto best = bits_of<DecodeCandidate>(load16_shared(s.candidate() + begin));
#pragma unroll 1
    for (int i = 1; i < count; ++i) {
      const auto other = bits_of<DecodeCandidate>(load16_shared(s.candidate() + begin + i));
      if (other.below(best)) best = other;
    }
    return best;
  }

  // -- what becomes of it
  // --------------------------------------------------------------------------

  // The victim's key, and its value in this block's columns, as numbers.
  LESS_DEVICE void load_victim() {
    const bool kept = victim.slot < S;
    const int64_t slot = row * S + victim.slot;
    float k_scale = 1.0f, v_scale = 1.0f;
    if constexpr (kScaled) {
      k_scale = kept ? p.slots.k_scale[slot] : s.token()[0];
      v_scale = kept ? p.slots.v_scale[slot] : s.token()[1];
    }
    const T* const keys = static_cast<const T*>(p.slots.k) + slot * kD;
    const T* const values = static_cast<const T*>(p.slots.v) + slot * kD + column;
#pragma unroll 1
    for (int d = t; d < kD; d += kDecodeThreads) {
      s.victim_key()[d] = (kept ? widened(keys[d]) : s.key()[d]) * k_scale;
    }
#pragma unroll 1
    for (int c = t; c < width; c += kDecodeThreads) {
      s.victim_value()[c] = (kept ? widened(values[c]) : s.value()[column + c]) * v_scale;
    }
    __syncthreads();
  }

  // H += psi(k)^T v, z += psi(k) of the victim, from the blocks' shares of psi.
  LESS_DEVICE void fold() {
#pragma unroll 1
    for (int i = t; i < ranks * R; i += kDecodeThreads) {
      float* const to = s.psi_shares() + rank * R + i % R;
      if (ranks > 1) {
        store_cluster(to, i / R, s.psi_share()[i % R]);
      } else {
        *to = s.psi_share()[i % R];
      }
    }
    if (ranks > 1) {
      if (!LESS_BUG(psi_cluster_barrier)) cluster_sync();
    } else {
      __syncthreads();
    }
    if (t < R) {
      float y = 0.0f;
#pragma unroll 1
      for (int of = 0; of < ranks; ++of) y += s.psi_shares()[of * R + t];
      s.h()[t] = feature(p.psi, head, t, y);
    }
    __syncthreads();
    const bool mixed = p.psi.mix != nullptr;
    if (mixed) {
      if (t < R) s.psi_share()[t] = mixed_feature(p.psi, head, t, s.h());
      __syncthreads();
    }
    const float* const psi = mixed ? s.psi_share() : s.h();
    const int fours = width / 4;
#pragma unroll 1
    for (int i = t; i < R * fours; i += kDecodeThreads) {
      const int r = i / fours, c = i % fours * 4;
      float4 h = bits_of<float4>(load16_shared(s.H() + r * width + c));
      const float4 v = bits_of<float4>(load16_shared(s.victim_value() + c));
      h.x = fmaf(psi[r], v.x, h.x);
      h.y = fmaf(psi[r], v.y, h.y);
      h.z = fmaf(psi[r], v.z, h.z);
      h.w = fmaf(psi[r], v.w, h.w);
      store16(p.H + (row * R + r) * kD + column + c, bits_of<uint4>(h));
    }
    if (rank == 0 && t < R) store(p.z + row * R + t, p.z[row * R + t] + psi[t]);
  }

  // The token takes a slot; S is none.
  LESS_DEVICE void take(int slot) {
    if (slot == S || (plan.cluster && slot / plan.per != split)) return;
    const int64_t to = row * S + slot;
#pragma unroll 1
    for (int i = t; i < 2 * Tile::kChunks; i += kDecodeThreads) {
      const bool key = i < Tile::kChunks;
      const int chunk = key ? i : i - Tile::kChunks;
      const float* const from = (key ? s.key() : s.value()) + chunk * Tile::kElements;
      constexpr int kN = 4 / int(sizeof(T));
      uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll
      for (int e = 0; e < Tile::kElements; ++e) {
        if constexpr (sizeof(T) == 4) {
          word[e] = bits_of<uint32_t>(from[e]);
        } else if constexpr (sizeof(T) == 2) {
          word[e / kN] |= uint32_t(bits_of<uint16_t>(narrowed<T>(from[e]))) << (e % kN * 16);
        } else {
          word[e / kN] |= uint32_t(bits_of<uint8_t>(narrowed<T>(from[e]))) << (e % kN * 8);
        }
      }
      store16(
          static_cast<unsigned char*>(key ? p.slots.k : p.slots.v) + to * Tile::kBytes + chunk * 16,
          make_uint4(word[0], word[1], word[2], word[3]));
    }
    if (t != 0) return;
    if constexpr (kScaled) {
      store(p.slots.k_scale + to, s.token()[0]);
      store(p.slots.v_scale + to, s.token()[1]);
    }
    store(p.slots.position + to, int32_t(seen));
    store(p.slots.score + to, s.token()[2]);
    store(p.slots.weight + to, 0.0f);
  }

  // The last of the row's heads counts the token; by then all have read how many there were.
  LESS_DEVICE void count() {
    if (rank != 0 || t != 0) return;
    if (!LESS_BUG(count_fence)) fence_gpu();
    if (atomic_add(plan.row_count + b, 1) != int(p.K) - 1) return;
    fence_gpu();
    if (!LESS_BUG(row_count)) store(plan.row_count + b, 0);
    p.seen[b] = seen + 1;
  }
};

template <typename T, int kD, bool kMma>
__global__ void __launch_bounds__(kDecodeThreads, sizeof(T) == 1 && !kMma ? 2 : 3)
    decode_step_kernel(const __grid_constant__ DecodeStepParams p,
                       const __grid_constant__ DecodePlan plan) {
  DYN_SMEM(raw);
  guard_decode_layout<T, kD, kMma>(raw, p, plan);
  DecodeBlock<T, kD, kMma>(p, plan, raw).run();
}

}  // namespace less::cuda
