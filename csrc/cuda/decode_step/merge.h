// The victim of decode_step's kernel becomes part of the slot that it is nearest to
// (common/merge.h).
//
// Keys are read again, from L2, each by the block whose range its slot is in, or all of them by the
// last block; the least cost meets as the victim did. The last rank writes the mean.
//
// Slot S is who has no slot yet: the token; of packed slots, who is in the token's hot slot.
#pragma once

#include "cuda/codec.h"
#include "cuda/decode_step/block.h"
#include "cuda/merge.h"

namespace less::cuda {

// The position of slot S; before any block writes it.
template <typename Case>
LESS_DEVICE int32_t DecodeBlock<Case>::joiner() const {
  if constexpr (kPacked) {
    return slots().position[hot_slot(p.layout, seen)];
  } else {
    return int32_t(seen);
  }
}

template <typename Case>
LESS_DEVICE float DecodeBlock<Case>::score_of(int slot) const {
  if constexpr (kPacked) {
    return score_at(true, slots(), slot < S ? slot : hot_slot(p.layout, seen));
  } else {
    return slot < S ? score_at(false, slots(), slot) : s.token()[2];
  }
}

// Keys or values of slots that are not hot.
template <typename Case>
LESS_DEVICE StoredRows DecodeBlock<Case>::cold(bool values) const {
  const Slots of = slots();
  if constexpr (kPacked) {
    return cold_rows(p.layout, of, values);
  } else {
    return {dtype_of<T>(), values ? of.v : of.k, values ? of.v_scale : of.k_scale, nullptr};
  }
}

template <typename Case>
LESS_DEVICE int DecodeBlock<Case>::cold_slot(int slot) const {
  return kPacked ? slot - hot_slots(p.layout) : slot;
}

// [D] codes, and [D] numbers, of this warp, one of two: nobody looks at the ring any more.
template <typename Case>
LESS_DEVICE uint8_t* DecodeBlock<Case>::codes() const {
  return s.ring() + warp * kD;
}

template <typename Case>
LESS_DEVICE float* DecodeBlock<Case>::numbers() const {
  return reinterpret_cast<float*>(s.ring() + 2 * kD) + warp * kD;
}

// Keys or values of slot S, as a slot that is not hot would hold them.
template <typename Case>
LESS_DEVICE LaneRow DecodeBlock<Case>::joining_row(bool values) const {
  if constexpr (kPacked) {
    const Slots of = slots();
    const int64_t own = hot_slot(p.layout, seen);
    const auto* const row = static_cast<const int8_t*>(values ? of.hot_v : of.hot_k) + own * kD;
    // narrow: the same number for all lanes
    const float scale = values ? of.hot_v_scale[own] : of.hot_k_scale[own];
    return rounded_row(values ? p.layout.v_dtype : p.layout.k_dtype,
                       decoded_row(DType::i8, row, scale, kD), kD, codes());
  } else {
    LaneRow out = lane_row(values ? s.value() : s.key(), kD);
    if constexpr (kScaled) {
      for_lane_dims(kD, [&](int i, int) { out.x[i] = __fmul_rn(out.x[i], s.token()[values]); });
    }
    return out;
  }
}

// The keys or values of a slot, as numbers; one warp. to [D]: shared.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::decode_slot(int slot, bool values, float* to) const {
  if (slot == S) {
    const LaneRow row = joining_row(values);
    for_lane_dims(kD, [&](int i, int d) {
      if (lane < kCodecLanes) to[d] = row.x[i];
    });
  } else {
    decode_row(cold(values), cold_slot(slot), kD, to);  // narrow: four numbers a lane, of one row
  }
  __syncwarp();
}

// The victim's rows, as numbers.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::keep_victim() {
  if (warp < 2) decode_slot(victim.slot, warp == 1, warp == 1 ? s.victim_value() : s.victim_key());
  __syncthreads();
}

// Whether others may become part of a token.
template <typename Case>
LESS_DEVICE bool DecodeBlock<Case>::takes_others(int slot, int32_t position, float score) const {
  return position >= 0 && slot != victim.slot &&
         rank_of(p.spec.rule, seen + 1, position, score) < kInfinity;
}

// Of those that this block looks at, the target of least cost, which takes the place of a rank;
// slot -1: there is none. mass: the victim's.
template <typename Case>
LESS_DEVICE DecodeCandidate DecodeBlock<Case>::nearest(float mass) const {
  constexpr int kRowLanes = 4, kAtOnce = kDecodeThreads / kRowLanes;
  const bool own = plan.cluster || alone();
  const int begin = max(own ? first_slot() : 0, kPacked ? hot_slots(p.layout) : 0);
  const int end = own ? last_slot() : S;
  const Slots of = slots();
  const StoredRows keys = cold(false);
  DecodeCandidate best{kInfinity, INT32_MAX, -1, 0.0f};
  const auto offer = [&](int slot, int32_t position, float score, float far) {
    const DecodeCandidate here{merge_cost(mass, mass_of(score), far), position, slot, 0.0f};
    if (here.rank < kInfinity && here.below(best)) best = here;
  };
#pragma unroll 1
  for (int slot0 = begin; slot0 < end; slot0 += kAtOnce) {
    const int slot = slot0 + t / kRowLanes;
    const bool in = slot < end;
    const int32_t position = in ? of.position[slot] : -1;  // narrow: one number of each slot
    const float score = in ? score_at(kPacked, of, slot) : 0.0f;
    const bool target = takes_others(slot, position, score);
    float far = 0.0f;
    if (target) {  // narrow: one number of each slot
      const int at = cold_slot(slot);
      const void* const row = keys.at(at, kD);
      const float scale = keys.scale(at);
#pragma unroll
      for (int i = 0; i < kD / 16; ++i) {
        const int d = i * 16 + t % kRowLanes * 4;
        float k[4];
        // narrow: four numbers a lane, 16 bytes where they are float32
        four_numbers(keys.dtype, row, scale, kD, d, k);
        const float4 x = bits_of<float4>(load16_shared(s.victim_key() + d));
        const float by[4] = {x.x - k[0], x.y - k[1], x.z - k[2], x.w - k[3]};
#pragma unroll
        for (int e = 0; e < 4; ++e) far = fmaf(by[e], by[e], far);
      }
    }
#pragma unroll
    for (int step = 1; step < kRowLanes; step *= 2) far += __shfl_xor_sync(0xffffffffu, far, step);
    if (target) offer(slot, position, score, far);
  }
  if (rank() == ranks() - 1 && warp == 0) {
    const float score = score_of(S);
    if (takes_others(S, joining, score)) {
      const LaneRow row = joining_row(false);
      LaneRow by;
      for_lane_dims(kD, [&](int i, int d) { by.x[i] = s.victim_key()[d] - row.x[i]; });
      offer(S, joining, score, ordered_sum(kD, [&](int i) { return by.x[i] * by.x[i]; }));
    }
  }
  return best;
}

// Nobody leaves where there is room; without a target the victim is forgotten.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::merge() {
  if (victim.empty() || joining < 0) return;
  keep_victim();
  // Before a block lets the token in.
  const float score = score_of(victim.slot), mass = mass_of(score);
  const float one = weight_of_one(kPacked);
  const float weight = victim.slot < S ? weight_at(kPacked, slots(), victim.slot) : one;
  const DecodeCandidate target = choose(nearest(mass), 1);
  if (target.slot < 0) return;
  const int slot = target.slot < S ? target.slot : victim.slot;  // where the mean goes
  if (rank() == ranks() - 1) {
    const float own = score_of(target.slot), part = mass / (mass + mass_of(own));
    __syncthreads();  // scores are written below
    if (warp < 2) {
      const float* const leaves = warp == 1 ? s.victim_value() : s.victim_key();
      decode_slot(target.slot, warp == 1, numbers());
      LaneRow mean = lane_row(numbers(), kD);
      for_lane_dims(kD, [&](int i, int d) { mean.x[i] = moved(mean.x[i], leaves[d], part); });
      store_row(cold(warp == 1), cold_slot(slot), mean, kD, codes());
    }
    if (t == 0) {
      const Slots to = slots();
      const float before = target.slot < S ? weight_at(kPacked, to, target.slot) : one;
      store(to.position + slot, max(target.position, victim.position));
      put_score(kPacked, to, slot, own + score);
      put_weight(kPacked, to, slot, both_weights(kPacked, before, weight));
    }
  }
  // Where the mean is in the victim's slot, nobody else takes it.
  if (target.slot == S) victim.slot = S;
}

}  // namespace less::cuda
