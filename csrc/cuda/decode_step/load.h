// What decode_step's kernel reads once: the slots through a ring of tiles, and all the rest.
#pragma once

#include "cuda/decode_step/packed.h"

namespace less::cuda {

// Tiles of keys of all ranges; then of each range tiles of values, as often as those are read; then
// nothing.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::ask() {
  unsigned char* const to = stage(asked);
  asked = asked + 1 == Tile::kStages ? 0 : asked + 1;
  if (next_range == ranges()) return;
  const int range = first_range() + next_range, tile = next_tile;
  const bool values = next_pass >= 0;
  if (++next_tile == plan.tiles) {
    next_tile = 0;
    if (!values || ++next_pass == decode_passes<T, kD, kMma>(G)) {
      if (values) next_pass = 0;
      if (++next_range == ranges() && !values) next_range = next_pass = 0;
    }
  }
  if constexpr (kPacked) {
    ask_for_rows(to, range, tile, values);
  } else if (values) {
    ask_for_values(to, range, tile);
  } else {
    ask_for_keys(to, range, tile);
  }
}

template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::ask_for_keys(unsigned char* to, int range, int tile) {
  const int slot0 = range * plan.per + tile * plan.tile;
  const auto* const rows =
      static_cast<const unsigned char*>(slots().k) + int64_t{slot0} * Tile::kBytes;
  const int chunks = rows_from(slot0, tile) * Tile::kChunks;
#pragma unroll 1
  for (int i = t; i < completed(chunks); i += kDecodeThreads) {
    const bool in = i < chunks;
    copy_async16(to + Tile::place(i) * 16, rows + (in ? i * 16 : 0), in);
  }
}

// Rows of empty slots, and those that complete a multiple of 16, become zeros.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::ask_for_values(unsigned char* to, int range, int tile) {
  const int slot0 = range * plan.per + tile * plan.tile;
  const int rows = rows_from(slot0, tile);
  const auto* const from =
      static_cast<const unsigned char*>(slots().v) + int64_t{slot0} * Tile::kBytes;
  const int32_t* const position = s.position() + (slot0 - first_slot());
#pragma unroll 1
  for (int i = t; i < completed(rows * Tile::kChunks); i += kDecodeThreads) {
    const int r = i / Tile::kChunks;
    const bool held = position[r] >= 0;
    copy_async16(to + Tile::place(i) * 16, from + (held ? i * 16 : 0), held);
  }
}

// This block's columns of H.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::ask_for_state() {
  const int width = columns();
  const float* const H = state().H + first_column();
  const int chunks = width / 4;
#pragma unroll 1
  for (int i = t; i < R * chunks; i += kDecodeThreads) {
    const int r = i / chunks, c = i % chunks * 4;
    copy_async16(s.H() + r * width + c, H + r * kD + c);
  }
}

// One float at a time: there are no accesses of twelve bytes.
LESS_DEVICE void keep_numbers(const FeatureNumbers& x, FeatureNumbers* shared) {
  shared->factor = x.factor;
  shared->bias = x.bias;
  shared->scale = x.scale;
}

// Queries, the token, what is known of each slot, and numbers of the maps. All that a thread has
// one of is asked for before anything is waited for: the block waits for memory once.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::load() {
  const bool needs_token = !kPacked || last_block();  // of packed slots, the last range looks at it
  uint4 row[kRowPieces];
  if (needs_token && warp < 2) ask_for_row(warp == 0 ? p.k : p.v, row);
  uint4 query_four{};
  if (!kUnits && t * 4 < G * kD) query_four = ask_for_query(t * 4);
  float z = 0.0f;
  FeatureNumbers of_phi{}, of_psi{};
  if constexpr (kState) {
    if (t < R) {
      z = state().z[t];  // narrow: a lane a feature, side by side
      of_psi = feature_numbers(p.maps.psi, head, t);
    }
    if (t < G * R) of_phi = feature_numbers(p.maps.phi, head * G + t / R, t % R);
  }
  load_slots();
  if constexpr (kPacked) {
    load_query_digits();
  } else if constexpr (kUnits) {
    load_scaled_queries();
  } else {
    load_queries(query_four);
  }
  if constexpr (kMma) {  // heads that complete a multiple of 8
#pragma unroll 1
    for (int i = G * kD + t * 4; i < (G + 7) / 8 * 8 * kD; i += kDecodeThreads * 4) {
      store8_shared(narrow_q() + i / kD * kRow + i % kD, make_uint2(0, 0));
    }
  }
  if (needs_token && warp < 2) {
    keep_row(warp == 0 ? p.k.dtype : p.v.dtype, row, warp == 0 ? s.key() : s.value(),
             s.token() + warp);
  }
  if constexpr (kState) {
    if (t < R) {
      s.z()[t] = z;
      keep_numbers(of_psi, s.psi_numbers() + t);
    }
#pragma unroll 1
    for (int i = t; i < G * R; i += kDecodeThreads) {
      keep_numbers(i == t ? of_phi : feature_numbers(p.maps.phi, head * G + i / R, i % R),
                   s.phi_numbers() + i);
    }
  }
}

// What is known of each slot, of several at once. What an empty one holds is read, and left.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::load_slots() {
  constexpr int kAtOnce = kPacked ? 4 : 2;
  const Slots of = slots();
  const int end = ranges() * plan.per;
#pragma unroll 1
  for (int i0 = t; i0 < end; i0 += kAtOnce * kDecodeThreads) {
    int32_t position[kAtOnce];
    uint32_t score[kAtOnce], weight[kAtOnce], k_scale[kAtOnce], v_scale[kAtOnce];  // bits
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int slot = min(first_slot() + i0 + j * kDecodeThreads, last_slot() - 1);
      position[j] = of.position[slot];  // narrow: a lane a slot, side by side
      score[j] = score_bits_at(kPacked, of, slot);
      if constexpr (kWeights) weight[j] = weight_bits_at(kPacked, of, slot);
      if constexpr (kPacked) {
        ask_for_scales(of, slot, k_scale[j], v_scale[j]);
      } else if constexpr (kScaled) {
        k_scale[j] = bits_of<uint32_t>(of.k_scale[slot]);  // narrow: a lane a slot, side by side
        v_scale[j] = bits_of<uint32_t>(of.v_scale[slot]);  // narrow: a lane a slot, side by side
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = i0 + j * kDecodeThreads, slot = first_slot() + i;
      if (i >= end) break;
      const bool in = slot < last_slot(), held = in && position[j] >= 0;
      s.position()[i] = in ? position[j] : -1;
      s.score()[i] = in ? score_of_bits(kPacked, score[j]) : 0.0f;
      if constexpr (kWeights) {
        s.weight()[i] = held ? log_weight_of_bits(kPacked, weight[j]) : 0.0f;
      }
      if constexpr (kScaled) {
        s.k_scale()[i] = in ? scale_of_bits(slot, false, k_scale[j]) : 0.0f;
        s.v_scale()[i] = held ? scale_of_bits(slot, true, v_scale[j]) : 0.0f;
      }
    }
  }
}

// The scale of a slot's row as that of an int8 row.
template <typename Case>
LESS_DEVICE float DecodeBlock<Case>::scale_of_bits(int slot, bool value, uint32_t bits) const {
  if constexpr (kPacked) {
    const DType cold = value ? p.layout.v_dtype : p.layout.k_dtype;
    if (slot >= hot_slots(p.layout) && packed(cold)) return level_scale(uint16_t(bits));
  }
  return bits_of<float>(bits);
}

template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::load_token() {
  if (warp >= 2) return;
  uint4 row[kRowPieces];
  ask_for_row(warp == 0 ? p.k : p.v, row);
  keep_row(warp == 0 ? p.k.dtype : p.v.dtype, row, warp == 0 ? s.key() : s.value(),
           s.token() + warp);
}

// Elements i .. i + 3 of the queries.
template <typename Case>
LESS_DEVICE uint4 DecodeBlock<Case>::ask_for_query(int i) const {
  // narrow: four 16-bit elements a lane, of the one token
  return load_four_stored(p.q.data, p.q.dtype, query(p.q, i / kD) + i % kD);
}

// first: those of this thread's that come first.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::load_queries(uint4 first) {
#pragma unroll 1
  for (int i = t * 4; i < G * kD; i += kDecodeThreads * 4) {
    float four[4];
    widen_four(i == t * 4 ? first : ask_for_query(i), p.q.dtype, four);
    store16_shared(s.q() + i / kD * kD + i % kD,
                   bits_of<uint4>(make_float4(four[0], four[1], four[2], four[3])));
    if constexpr (kMma) narrow_queries(i, four, 1.0f);
  }
}

template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::narrow_queries(int i, const float (&four)[4], float factor) {
  if constexpr (kMma) {
    store8_shared(narrow_q() + i / kD * kRow + i % kD,
                  make_uint2(two_narrowed<Narrow>(four[0] * factor, four[1] * factor),
                             two_narrowed<Narrow>(four[2] * factor, four[3] * factor)));
  }
}

// Queries of any size as half floats: each is divided by the power of two below its largest
// element. A warp per query.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::load_scaled_queries() {
#pragma unroll 1
  for (int g = warp; g < G; g += kDecodeWarps) {
    uint32_t largest = 0;
#pragma unroll 1
    for (int d = lane * 4; d < kD; d += 128) {
      float four[4];
      // narrow: four 16-bit elements a lane, of the one token
      load_four(p.q.data, p.q.dtype, query(p.q, g) + d, four);
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

// A row [D] of the token's; one warp.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::ask_for_row(const HeadRows& x, uint4 (&row)[kRowPieces]) const {
  const int64_t from = offset(x, b, head, 0);
#pragma unroll
  for (int j = 0; j < kRowPieces; ++j) {
    const int d = lane * 4 + j * 128;
    if (d >= kD) break;
    // narrow: four 16-bit elements a lane, of the one token
    row[j] = load_four_stored(x.data, x.dtype, from + d);
  }
}

// That row, rounded as the slots round it.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::keep_row(DType dtype, const uint4 (&row)[kRowPieces], float* to,
                                             float* scale) {
  float four[kRowPieces][4];
  uint32_t largest = 0;  // of |x| as integers: in order, and NaN is above infinity
#pragma unroll
  for (int j = 0; j < kRowPieces; ++j) {
    const int d = lane * 4 + j * 128;
    if (d >= kD) break;
    widen_four(row[j], dtype, four[j]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      largest = max(largest, bits_of<uint32_t>(four[j][i]) & 0x7fffffffu);
    }
  }
  float step = 1.0f;
  if constexpr (kScaled) {
    largest = __reduce_max_sync(0xffffffffu, largest);
    step = bits_of<float>(largest) / (std::is_same_v<T, int8_t> ? 127.0f : 448.0f);
    if (lane == 0) *scale = step;
  }
#pragma unroll
  for (int j = 0; j < kRowPieces; ++j) {
    const int d = lane * 4 + j * 128;
    if (d >= kD) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& one = four[j][i];
      if constexpr (kScaled) {
        const bool sound = step > 0.0f && step < kInfinity;
        one = sound ? widened(narrowed<T>(one / step)) : 0.0f;
      } else {
        one = widened(narrowed<T>(one));
      }
    }
    store16_shared(to + d,
                   bits_of<uint4>(make_float4(four[j][0], four[j][1], four[j][2], four[j][3])));
  }
}

}  // namespace less::cuda
