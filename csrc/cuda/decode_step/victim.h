// Who leaves in decode_step's kernel, and what becomes of it.
#pragma once

#include "cuda/decode_step/block.h"

namespace less::cuda {

template <typename Case>
LESS_DEVICE DecodeCandidate DecodeBlock<Case>::candidate(int slot, int32_t position,
                                                         float score) const {
  if (position < 0) return {-kInfinity, INT32_MIN + slot, slot, 0.0f};
  return {rank_of(p.spec.rule, seen + 1, position, score), position, slot, 0.0f};
}

// Whether a slot's token may leave, and as whom. Of packed slots those of hot rows stay; but whose
// hot slot the token takes competes with those in cold slots, as none of them.
template <typename Case>
LESS_DEVICE bool DecodeBlock<Case>::competes(int slot, int32_t position, float score,
                                             DecodeCandidate& as) const {
  as = candidate(slot, position, score);
  if constexpr (kPacked) {
    if (slot >= hot_slots(p.layout)) return true;
    as.slot = S;
    return position >= 0 && slot == hot_slot(p.layout, seen);
  }
  return true;
}

// Writes the scores of this block's slots; who of them would leave.
template <typename Case>
LESS_DEVICE DecodeCandidate DecodeBlock<Case>::add_scores() {
  if (warp == 0) {
    float received = 0.0f;
#pragma unroll 1
    for (int g = lane; g < G; g += 32) received += s.token_mass()[g];
    received = warp_sum(received);
    // Thread 0 looks at it below, the others after the next barrier.
    if (lane == 0) s.token()[2] = p.spec.scores ? noted_score(kPacked, received) : 0.0f;
  }
  const bool own = plan.cluster || alone();
  const int begin = own ? first_slot() : 0, end = own ? last_slot() : S;
  const Slots of_head = slots();
  DecodeCandidate best{kInfinity, INT32_MAX, S, 0.0f};
#pragma unroll 1
  for (int slot = begin + t; slot < end; slot += kDecodeThreads) {
    // The slots of a block are few, those of a head may be many.
    const int of =
        own ? first_range() + int(__umulhi(slot - begin, plan.inverse_per)) : slot / plan.per;
    const int i = slot - of * plan.per;
    // narrow: a lane a slot, side by side
    const int32_t position = own ? s.position()[slot - begin] : of_head.position[slot];
    float score = own ? s.score()[slot - begin] : score_at(kPacked, of_head, slot);
    if (p.spec.scores) {
      const float* const masses = plan.masses + (row * plan.splits + of) * G * plan.per + i;
      const float* const own_masses = s.mass() + (of - first_range()) * G * stride + i;
      float received = 0.0f;
#pragma unroll 1
      for (int g = 0; g < G; ++g) {
        // narrow: a lane a slot, side by side
        const float mass = own ? own_masses[g * stride] : masses[g * plan.per];
        received = fmaf(mass, s.sum()[of * G + g], received);
      }
      score = position >= 0 ? fmaf(score, p.spec.decay, received) : 0.0f;
      score = note_score(kPacked, of_head, slot, score);
    }
    DecodeCandidate here;
    if (competes(slot, position, score, here) && here.below(best)) best = here;
  }
  if (!kPacked && rank() == ranks() - 1 && t == 0) {
    const DecodeCandidate token = candidate(S, int32_t(seen), s.token()[2]);
    if (token.below(best)) best = token;
  }
  return best;
}

// The lowest of all threads and blocks. turn: others may still look at the candidates of the one
// before.
template <typename Case>
LESS_DEVICE DecodeCandidate DecodeBlock<Case>::choose(DecodeCandidate best, int turn) {
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
  __syncthreads();
  best = lowest(0, kDecodeWarps);
  if (ranks() == 1) return best;
  const int met = kDecodeWarps + turn * kDecodeCluster;
  if (t < ranks()) store_cluster(s.candidate() + met + rank(), t, best);
  cluster_sync();
  return lowest(met, ranks());
}

template <typename Case>
LESS_DEVICE DecodeCandidate DecodeBlock<Case>::lowest(int begin, int count) const {
  auto best = bits_of<DecodeCandidate>(load16_shared(s.candidate() + begin));
#pragma unroll 4
  for (int i = 1; i < count; ++i) {
    const auto other = bits_of<DecodeCandidate>(load16_shared(s.candidate() + begin + i));
    if (other.below(best)) best = other;
  }
  return best;
}

// The victim's key, and its value in this block's columns, as numbers.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::load_victim() {
  const int column = first_column(), width = columns();
  const bool kept = victim.slot < S;
  const Slots of = slots();
  const int64_t slot = victim.slot;
  float k_scale = 1.0f, v_scale = 1.0f;
  if constexpr (kScaled) {
    k_scale = kept ? of.k_scale[slot] : s.token()[0];  // narrow: the same number for all lanes
    v_scale = kept ? of.v_scale[slot] : s.token()[1];  // narrow: the same number for all lanes
  }
  const T* const keys = static_cast<const T*>(of.k) + slot * kD;
  const T* const values = static_cast<const T*>(of.v) + slot * kD + column;
#pragma unroll 1
  for (int d = t; d < kD; d += kDecodeThreads) {
    const bool own = d < width;
    // narrow: a lane an element of the one row that leaves
    const float k = kept ? widened(keys[d]) : s.key()[d];
    float v = 0.0f;
    // narrow: a lane an element of the one row that leaves
    if (own) v = kept ? widened(values[d]) : s.value()[column + d];
    s.victim_key()[d] = k * k_scale;
    if (own) s.victim_value()[d] = v * v_scale;
  }
  __syncthreads();
}

// H += psi(k)^T v, z += psi(k) of the victim, from the blocks' shares of psi.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::fold() {
#pragma unroll 1
  for (int i = t; ranks() > 1 && i < ranks() * ranges() * R; i += kDecodeThreads) {
    const int to = i / (ranges() * R), at_share = first_range() * R + i % (ranges() * R);
    if (to != rank()) store_cluster(s.psi_shares() + at_share, to, s.psi_shares()[at_share]);
  }
  if (ranks() > 1) cluster_sync();
  if (t < R) {
    float y = 0.0f;
#pragma unroll 4
    for (int of = 0; of < plan.shares; ++of) y += s.psi_shares()[of * R + t];
    s.h()[t] = feature(p.maps.psi, s.psi_numbers()[t], y);
  }
  __syncthreads();
  const bool mixed = p.maps.psi.mix != nullptr;
  if (mixed) {
    if (t < R) s.psi_share()[t] = mixed_feature(p.maps.psi, head, t, s.h());
    __syncthreads();
  }
  const float* const psi = mixed ? s.psi_share() : s.h();
  const State to = state();
  const int column = first_column(), width = columns(), fours = width / 4;
#pragma unroll 1
  for (int i = t; i < R * fours; i += kDecodeThreads) {
    const int r = i / fours, c = i % fours * 4;
    float4 h = bits_of<float4>(load16_shared(s.H() + r * width + c));
    const float4 v = bits_of<float4>(load16_shared(s.victim_value() + c));
    h.x = fmaf(psi[r], v.x, h.x);
    h.y = fmaf(psi[r], v.y, h.y);
    h.z = fmaf(psi[r], v.z, h.z);
    h.w = fmaf(psi[r], v.w, h.w);
    store16(to.H + r * kD + column + c, bits_of<uint4>(h));
  }
  // narrow: a lane a feature, side by side
  if (rank() == 0 && t < R) store(to.z + t, s.z()[t] + psi[t]);
}

// The token takes a slot; S is none.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::take(int slot) {
  if (slot == S || (plan.cluster && (slot < first_slot() || slot >= last_slot()))) return;
  const Slots to = slots();
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
        static_cast<unsigned char*>(key ? to.k : to.v) + int64_t{slot} * Tile::kBytes + chunk * 16,
        make_uint4(word[0], word[1], word[2], word[3]));
  }
  if (t != 0) return;
  if constexpr (kScaled) {
    store(to.k_scale + slot, s.token()[0]);
    store(to.v_scale + slot, s.token()[1]);
  }
  store(to.position + slot, int32_t(seen));
  store(to.score + slot, s.token()[2]);
  store(to.weight + slot, 0.0f);
}

// The last of the row's heads counts the token; by then all have read how many there were.
template <typename Case>
LESS_DEVICE void DecodeBlock<Case>::count() {
  if (rank() != 0 || t != 0) return;
  fence_gpu();
  if (atomic_add(plan.row_count + b, 1) != int(p.spec.K) - 1) return;
  fence_gpu();
  store(plan.row_count + b, 0);
  *less::seen(memory) = seen + 1;
}
// What becomes of the token that leaves is a case of the kernel, a struct with
//
//   kState         whether a step has a low-rank state, which is then attended, and maps
//   kMerges        whether slots may stand for several tokens, in any format
//   begin(block)   whether something becomes of this one, whose features are then computed
//   end(block)     the rest, from the blocks' shares of its psi
//
// A step without a state: the token is forgotten.
struct DecodeForget {
  static constexpr bool kState = false;
  static constexpr bool kMerges = false;

  template <typename Block>
  static LESS_DEVICE bool begin(Block&) {
    return false;
  }
  template <typename Block>
  static LESS_DEVICE void end(Block&) {}
};

// It is folded into the state, unless the step is to forget, or what leaves is an empty slot.
struct DecodeFold {
  static constexpr bool kState = true;
  static constexpr bool kMerges = false;

  template <typename Block>
  static LESS_DEVICE bool begin(Block& block) {
    if (block.p.spec.victim != Victim::fold || block.victim.empty()) return false;
    block.load_victim();
    return true;
  }
  template <typename Block>
  static LESS_DEVICE void end(Block& block) {
    block.fold();
  }
};

// It becomes part of a slot that stays, unless the step is to forget.
struct DecodeMerge {
  static constexpr bool kState = false;
  static constexpr bool kMerges = true;

  template <typename Block>
  static LESS_DEVICE bool begin(Block& block) {
    if (block.p.spec.victim == Victim::merge) block.merge();
    return false;
  }
  template <typename Block>
  static LESS_DEVICE void end(Block&) {}
};

}  // namespace less::cuda
