// What decode_step's kernel reads once: the slots through a ring of tiles, and all the rest.
#pragma once

#include "cuda/decode_step/packed.h"

namespace less::cuda {

// Tiles of keys of all ranges; then of each range tiles of values, as often as those are read; then
// nothing.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::ask() {
  unsigned char* const to = stage(asked);
  asked = after(asked);
  if (next_range == ranges()) return;
  const int range = first_range() + next_range, tile = next_tile;
  const bool values = next_values;
  if (++next_tile == plan.tiles) {
    next_tile = 0;
    if (!values || ++next_pass == decode_passes<T, kD, kMma>(G)) {
      next_pass = 0;
      ++next_range;
      if (!values && next_range == ranges()) {
        next_range = 0;
        next_values = true;
      }
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
  const int32_t* const position = s.take<int32_t>(plan.layout.position) + (slot0 - first_slot());
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

// Queries, the token, and what is known of each slot.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::load() {
  const Slots of = slots();
  float z = 0.0f;
  if constexpr (kState) {
    if (t < R) z = state().z[t];  // narrow: a lane a feature, side by side
  }
#pragma unroll 1
  for (int i = t; i < ranges() * plan.per; i += kDecodeThreads) {
    const int slot = first_slot() + i;
    const bool in = slot < last_slot();
    // narrow: a lane a slot, side by side
    const int32_t position = in ? of.position[slot] : -1;
    s.position()[i] = position;
    s.score()[i] = in ? score_at(kPacked, of, slot) : 0.0f;
    if constexpr (kWeights) {
      s.weight()[i] = position >= 0 ? log_weight_at(kPacked, of, slot) : 0.0f;
    }
    if constexpr (kPacked) {
      if (in) load_scales(of, i, slot, position >= 0);
    } else if constexpr (kScaled) {
      s.k_scale()[i] = in ? of.k_scale[slot] : 0.0f;  // narrow: a lane a slot, side by side
      // narrow: a lane a slot, side by side
      s.v_scale()[i] = position >= 0 ? of.v_scale[slot] : 0.0f;
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
  // Of packed slots, only the last range looks at the token.
  if (!kPacked || last_block()) load_token();
  if constexpr (kState) {
    if (t < R) s.z()[t] = z;
  }
}

template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::load_token() {
  if (warp == 0) load_row(p.k, s.key(), s.token());
  if (warp == 1) load_row(p.v, s.value(), s.token() + 1);
}

template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::load_queries() {
#pragma unroll 1
  for (int i = t * 4; i < G * kD; i += kDecodeThreads * 4) {
    float four[4];
    // narrow: four 16-bit elements a lane, of the one token
    load_four(p.q.data, p.q.dtype, query(p.q, i / kD) + i % kD, four);
    store16_shared(s.q() + i / kD * kD + spread(i % kD),
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

// A row [D] of the token's, rounded as the slots round it; one warp.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::load_row(const HeadRows& x, float* to, float* scale) {
  constexpr int kEach = (kD + 127) / 128;  // of a lane, four numbers each
  const int64_t from = offset(x, b, head, 0);
  float four[kEach][4];
  uint32_t largest = 0;  // of |x| as integers: in order, and NaN is above infinity
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int d = lane * 4 + j * 128;
    if (d >= kD) break;
    // narrow: four 16-bit elements a lane, of the one token
    load_four(x.data, x.dtype, from + d, four[j]);
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
  for (int j = 0; j < kEach; ++j) {
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
