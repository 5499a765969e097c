// Packed rows in decode_step's kernel. A range's rows come to shared memory as they are stored, hot
// ones and then cold ones, and become int8 rows there, tile by tile: the levels of a cold row are
// whole numbers, and its scale counts in units of them. integers.h multiplies them.
#pragma once

#include "cuda/codec.h"
#include "cuda/decode_step/block.h"

namespace less::cuda {

// Where the rows of a tile are. Of the bytes of cold rows, whole pieces of 16 are copied: fields
// begin and end with such.
struct DecodeRows {
  DType dtype;  // of cold rows
  int hot;      // rows, first
  int rows;     // of both
  int64_t at;   // bytes from the beginning of the cold rows to the first of the tile's
  LESS_DEVICE int skew() const { return int(at & 15); }
};

template <typename Case>
LESS_DEVICE DecodeRows DecodeBlock<Case>::rows_of_tile(int range, int tile, bool values) const {
  const int begin = range * plan.per + tile * plan.tile, W = hot_slots(p.layout);
  DecodeRows of{};
  of.rows = rows_from(begin, tile);
  of.hot = min(max(W - begin, 0), of.rows);
  of.dtype = values ? p.layout.v_dtype : p.layout.k_dtype;
  of.at = int64_t{max(begin - W, 0)} * int(row_bytes(of.dtype, kD));
  return of;
}

template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::ask_for_rows(unsigned char* to, int range, int tile,
                                                 bool values) {
  const DecodeRows rows = rows_of_tile(range, tile, values);
  const Slots of = slots();
  if (rows.hot > 0) {
    const auto* const hot = static_cast<const unsigned char*>(values ? of.hot_v : of.hot_k) +
                            int64_t{range * plan.per + tile * plan.tile} * kD;
#pragma unroll 1
    for (int i = t; i < rows.hot * Tile::kChunks; i += kDecodeThreads) {
      copy_async16(to + i * 16, hot + i * 16);
    }
    to += rows.hot * kD;
  }
  const int count = rows.rows - rows.hot;
  const int bytes = count == 0 ? 0 : rows.skew() + count * int(row_bytes(rows.dtype, kD));
  const auto* const cold =
      static_cast<const unsigned char*>(values ? of.v : of.k) + (rows.at - rows.skew());
#pragma unroll 4
  for (int i = t * 16; i < bytes; i += kDecodeThreads * 16) {
    copy_async16(to + i, cold + i);
  }
}

// 16 bytes of shared memory at a multiple of 8.
LESS_DEVICE uint4 load_two8_shared(const unsigned char* shared) {
  const uint2 low = load8_shared(shared), high = load8_shared(shared + 8);
  return make_uint4(low.x, low.y, high.x, high.y);
}

// Dims 16 c .. 16 c + 15 of a cold row, as int8.
template <typename Case>
template <DType kType>
LESS_DEVICE uint4 DecodeBlock<Case>::widened_chunk(const unsigned char* row, int c) {
  const int d = c * 16;
  if constexpr (kType == DType::i8) {
    return load16_shared(row + d);
  } else if constexpr (kD % 64 != 0) {
    uint32_t four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      four[i] = levels_of_codes<kType>(four_codes(kType, kD, d + i * 4, row));
    }
    return make_uint4(four[0], four[1], four[2], four[3]);
  } else {
    static_assert(kType == DType::b3, "others have widen_pieces");
    constexpr int kPart = kD / 4, kEighth = kD / 8;
    const int by = d / kEighth, shift = 6 - d / kPart * 2;
    const uint4 low = load_two8_shared(row + d % kPart);
    uint4 third;
    if constexpr (kEighth >= 16) {
      third = load_two8_shared(row + kPart + d % kEighth);
      third = make_uint4(third.x >> by, third.y >> by, third.z >> by, third.w >> by);
    } else {  // 8 dims are of one bit, the next 8 of the next
      const uint2 both = load8_shared(row + kPart);
      third = make_uint4(both.x >> by, both.y >> by, both.x >> (by + 1), both.y >> (by + 1));
    }
    const auto levels = [=](uint32_t x, uint32_t bit) {
      return ((x << shift >> 1 & 0x60606060u) | (bit << 7 & 0x80808080u)) ^ kLevelBits<kType>;
    };
    return make_uint4(levels(low.x, third.x), levels(low.y, third.y), levels(low.z, third.z),
                      levels(low.w, third.w));
  }
}

// Rows of 4 bits or 2: a byte has codes of several parts of the row, so that 16 of them become a
// chunk of each part. Lanes take the parts in different order: eight of them are then in different
// banks.
template <typename Case>
template <DType kType>
LESS_DEVICE void DecodeBlock<Case>::widen_pieces(const DecodeRows& rows,
                                                 const unsigned char* from) {
  constexpr int kBits = kType == DType::b4 ? 4 : 2, kParts = 8 / kBits;
  constexpr int kPieces = Tile::kChunks / kParts;  // of a row
  constexpr uint32_t kMask = kType == DType::b4 ? 0xf0f0f0f0u : 0xc0c0c0c0u;
  const unsigned char* const cold = from + rows.hot * (kD - kPieces * 16) + rows.skew();
  const int turn = kParts == 2 ? t >> 2 & 1 : t & 3;
  // Whether a thread's next chunk is as far on in the tile as it is in order.
  constexpr bool kEven = kDecodeThreads % kPieces == 0 &&
                         (kDecodeThreads * kParts >> Tile::kShift) % (Tile::kMask + 1) == 0;
  const auto chunk = [&](int i, int part) {
    return i / kPieces * Tile::kChunks + part * kPieces + i % kPieces;
  };
  int shift[kParts], first[kParts];
#pragma unroll
  for (int j = 0; j < kParts; ++j) {
    shift[j] = 8 - kBits - (j ^ turn) * kBits;
    first[j] = Tile::place(chunk(t, j ^ turn));
  }
#pragma unroll 4
  for (int i = t; i < rows.rows * kPieces; i += kDecodeThreads) {
    if (i < rows.hot * kPieces) continue;
    const uint4 w = load16_shared(cold + i * 16);
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
      const auto levels = [&](uint32_t x) {
        return and_xor(x << shift[j], kMask, kLevelBits<kType>);
      };
      const int at = kEven ? first[j] + (i - t) * kParts : Tile::place(chunk(i, j ^ turn));
      store16_shared(s.widened() + at * 16,
                     make_uint4(levels(w.x), levels(w.y), levels(w.z), levels(w.w)));
    }
  }
}

template <typename Case>
template <DType kType>
LESS_DEVICE void DecodeBlock<Case>::widen_cold(const DecodeRows& rows, const unsigned char* from) {
  if constexpr ((kType == DType::b4 || kType == DType::b2) && kD % 64 == 0) {
    widen_pieces<kType>(rows, from);
  } else {
    constexpr int kRowBytes = int(row_bytes(kType, kD));
    const unsigned char* const cold = from + rows.hot * (kD - kRowBytes) + rows.skew();
#pragma unroll 4
    for (int i = rows.hot * Tile::kChunks + t; i < rows.rows * Tile::kChunks; i += kDecodeThreads) {
      const int r = i / Tile::kChunks, c = i % Tile::kChunks;
      store16_shared(s.widened() + Tile::place(i) * 16,
                     widened_chunk<kType>(cold + r * kRowBytes, c));
    }
  }
}

// The rows that have come become a tile of int8, with zeros after them up to a multiple of 32 rows.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::widen_rows(const unsigned char* from, int tile, bool values) {
  const DecodeRows rows = rows_of_tile(split(), tile, values);
#pragma unroll 1
  for (int i = t; i < rows.hot * Tile::kChunks; i += kDecodeThreads) {
    store16_shared(s.widened() + Tile::place(i) * 16, load16_shared(from + i * 16));
  }
  if (rows.dtype == DType::b4) {
    widen_cold<DType::b4>(rows, from);
  } else if (rows.dtype == DType::b3) {
    widen_cold<DType::b3>(rows, from);
  } else if (rows.dtype == DType::b2) {
    widen_cold<DType::b2>(rows, from);
  } else {
    widen_cold<DType::i8>(rows, from);
  }
#pragma unroll 1
  for (int i = rows.rows * Tile::kChunks + t; i < (rows.rows + 31) / 32 * 32 * Tile::kChunks;
       i += kDecodeThreads) {
    store16_shared(s.widened() + Tile::place(i) * 16, make_uint4(0, 0, 0, 0));
  }
}

// The scales of a slot's rows, as they are stored.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::ask_for_scales(const Slots& of, int slot, uint32_t& k,
                                                   uint32_t& v) const {
  const int W = hot_slots(p.layout), cold = slot - W;
  if (slot < W) {
    k = bits_of<uint32_t>(of.hot_k_scale[slot]);  // narrow: a lane a slot, side by side
    v = bits_of<uint32_t>(of.hot_v_scale[slot]);  // narrow: a lane a slot, side by side
  } else {
    v = of.v_half[cold];  // narrow: a lane a slot, side by side
    if (of.k_half != nullptr) {
      k = of.k_half[cold];  // narrow: a lane a slot, side by side
    } else {
      k = bits_of<uint32_t>(of.k_scale[cold]);  // narrow: a lane a slot, side by side
    }
  }
}

// The token takes its hot slot. Who was there takes the cold slot of the victim, if there is one:
// S is none, and then who was there leaves.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::move_in(int slot) {
  if (rank() != ranks() - 1) return;
  if (!last_block()) {  // all others have not looked at the token
    load_token();
    __syncthreads();
  }
  const Slots to = slots();
  const int W = hot_slots(p.layout), own = int(hot_slot(p.layout, seen));
  const int32_t left = to.position[own];  // narrow: the same number for all lanes
  const bool moves = left >= 0 && slot != S;
  LaneRow numbers{};  // asked for with that
  if (warp < 2 && slot != S) {
    const bool key = warp == 0;
    // narrow: the same number for all lanes
    const float scale = key ? to.hot_k_scale[own] : to.hot_v_scale[own];
    const void* const row =
        static_cast<const int8_t*>(key ? to.hot_k : to.hot_v) + int64_t{own} * kD;
    numbers = decoded_row(DType::i8, row, scale, kD);
  }
  if (moves && warp < 2) {
    encode_row(cold_rows(p.layout, to, warp == 1), slot - W, numbers, kD, s.widened() + warp * kD);
  }
  __syncthreads();  // who was there is not read any more
#pragma unroll 1
  for (int i = t * 4; i < 2 * kD; i += kDecodeThreads * 4) {
    const bool key = i < kD;
    const int d = i % kD;
    const float4 x = bits_of<float4>(load16_shared((key ? s.key() : s.value()) + d));
    const float four[4] = {x.x, x.y, x.z, x.w};
    uint32_t word = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      word |= uint32_t(bits_of<uint8_t>(narrowed<int8_t>(four[e]))) << (e * 8);
    }
    auto* const row = static_cast<int8_t*>(key ? to.hot_k : to.hot_v) + int64_t{own} * kD;
    // narrow: four numbers a lane, of the one token
    store(reinterpret_cast<uint32_t*>(row + d), word);
  }
  if (t != 0) return;
  if (moves) {
    store(to.position + slot, left);
    put_score(true, to, slot, score_at(true, to, own));
    if constexpr (kWeights) put_weight(true, to, slot, 1.0f);
  }
  if constexpr (kWeights) put_weight(true, to, own, 1.0f);
  store(to.hot_k_scale + own, s.token()[0]);
  store(to.hot_v_scale + own, s.token()[1]);
  store(to.position + own, int32_t(seen));
  put_score(true, to, own, s.token()[2]);
}

}  // namespace less::cuda
