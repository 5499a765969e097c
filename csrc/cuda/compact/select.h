// Who leaves a head and where those who stay go.
//
// Tokens of hot rows do not compete. Who was in the ring of hot slots and is there no more is one
// of the candidates for the others, and older than the call's.
//
// Grid:   (B*K), a block per head.
// Memory: scores, positions and valid once; a key of 4 bytes per candidate is written and read up
//         to four times, from L2: three passes find the rank that parts those who leave from those
//         who stay, 11 bits at a time, and one writes them down. Where that rank is shared, three
//         more passes part its holders by position.
// Order:  counts of integers, and places by prefix sums: nothing depends on the schedule.
#pragma once

#include "cuda/compact/workspace.h"
#include "cuda/notes.h"

namespace less::cuda {

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kBins = 2048;

// An order-preserving integer, never 0. NaN is -infinity, and -0 is 0.
LESS_DEVICE uint32_t key_of(float rank) {
  const uint32_t bits = __float_as_uint((rank == rank ? rank : -INFINITY) + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The sum of the values of the threads before this one, and of all. sums: shared, kSelectWarps.
LESS_DEVICE int block_prefix(int value, int* sums, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int up_to = value;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, up_to, by);
    if (lane >= by) up_to += before;
  }
  if (lane == 31) sums[warp] = up_to;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kSelectWarps; ++w) {
    if (w == warp) before = total;
    total += sums[w];
  }
  __syncthreads();
  return before + up_to - value;
}

struct SelectShared {
  int* bins;   // [kBins]
  int* sums;   // [kSelectWarps]
  int* found;  // [3]  bin, what is still to be taken of it, what it holds
};

struct Threshold {
  uint32_t value;
  int take;   // how many of those who equal it are among the lowest
  int equal;  // how many there are
};

// The k-th lowest of what load(i, four) gives for i = 0, 4, .., n - 4; zeros do not count.
template <typename Load>
LESS_DEVICE Threshold find_lowest(const SelectShared& s, int64_t n, int k, Load load) {
  uint32_t known = 0, mask = 0;
  int equal = 0;
  for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
    const uint32_t digits = shift == 0 ? kBins / 2 - 1 : kBins - 1;
    for (int i = threadIdx.x; i < kBins; i += kSelectThreads) s.bins[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x * 4; i < n; i += kSelectThreads * 4) {
      uint32_t x[4];
      load(i, x);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (x[j] != 0 && (x[j] & mask) == known) atomicAdd(&s.bins[x[j] >> shift & digits], 1);
      }
    }
    __syncthreads();
    static_assert(kBins == 4 * kSelectThreads);
    const uint4 four = load16_shared(s.bins + threadIdx.x * 4);
    const int mine[4] = {int(four.x), int(four.y), int(four.z), int(four.w)};
    int total, before = block_prefix(mine[0] + mine[1] + mine[2] + mine[3], s.sums, total);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (before < k && k <= before + mine[j]) {
        s.found[0] = threadIdx.x * 4 + j;
        s.found[1] = k - before;
        s.found[2] = mine[j];
      }
      before += mine[j];
    }
    __syncthreads();
    known |= uint32_t(s.found[0]) << shift;
    mask |= digits << shift;
    k = s.found[1];
    equal = s.found[2];
  }
  return {known, k, equal};
}

// One head's candidates: slots, then the call's tokens, but for those of hot rows.
struct Candidates {
  const Layout& layout;
  const int32_t* position;   // [S]
  const float* slot_score;   // [S]
  const float* token_score;  // [T]
  const bool* valid;         // [T] or null
  const float* slot_rank;    // [S] or null
  const float* token_rank;   // [T] or null
  uint32_t* key;             // [S + T, and up to a multiple of 4]  0: it does not compete
  int64_t S;                 // of this head
  int64_t T;
  int64_t seen;  // before the call

  LESS_DEVICE int64_t count() const { return (S + T + 3) / 4 * 4; }

  LESS_DEVICE float noted(const float* score, int64_t i) const {
    // narrow: a lane a candidate, side by side
    return noted_score(packed(layout.v_dtype), score[i]);
  }

  // Whether a token is in a hot slot once `after` tokens are seen.
  LESS_DEVICE bool is_hot(int64_t position, int64_t after) const {
    return layout.hot > 0 && less::is_hot(layout, position, after);
  }

  LESS_DEVICE bool there(int64_t t) const {
    // narrow: a lane a token, side by side
    return t >= 0 && t < T && (valid == nullptr || valid[t]);
  }

  // Of those who rank alike the older leaves first. The call's tokens are younger than the slots',
  // and in order.
  LESS_DEVICE uint32_t age_key(int64_t i) const {
    // narrow: a lane a slot, side by side
    return uint32_t(i < S ? int64_t{position[i]} : seen + i - S) + 1u;
  }
};

// How many of the call's tokens are valid.
LESS_DEVICE int count_tokens(const Candidates& c, int* sums) {
  int mine = 0, total;
  for (int64_t t = threadIdx.x; t < c.T; t += kSelectThreads) mine += c.there(t);
  block_prefix(mine, sums, total);
  return total;
}

// Writes the keys, and returns how many candidates there are.
LESS_DEVICE int write_keys(const Candidates& c, const Rule& rule, int tokens, int* sums) {
  const int64_t after = c.seen + tokens;
  int held = 0, total;
  for (int64_t s = threadIdx.x; s < c.S; s += kSelectThreads) {
    const int32_t position = c.position[s];  // narrow: a lane a slot, side by side
    uint32_t key = 0;
    if (position >= 0 && !c.is_hot(position, after)) {
      // narrow: a lane a slot, side by side
      const float own = c.slot_rank != nullptr ? c.slot_rank[s] : c.noted(c.slot_score, s);
      key = key_of(c.slot_rank != nullptr ? own : rank_of(rule, after, position, own));
      ++held;
    }
    store(c.key + s, key);  // narrow: a lane a slot, side by side
  }
  int64_t position = c.seen;
  for (int64_t t0 = 0; t0 < c.count() - c.S; t0 += kSelectThreads) {
    const int64_t t = t0 + threadIdx.x;
    const bool there = c.there(t);
    const int before = block_prefix(there, sums, total);
    uint32_t key = 0;
    if (there && !c.is_hot(position + before, after)) {
      ++held;
      // narrow: a lane a token, side by side
      const float own = c.token_rank != nullptr ? c.token_rank[t] : c.noted(c.token_score, t);
      const int32_t at = int32_t(position + before);
      key = key_of(c.token_rank != nullptr ? own : rank_of(rule, after, at, own));
    }
    if (t < c.count() - c.S) store(c.key + c.S + t, key);  // narrow: a lane a token, side by side
    position += total;
  }
  block_prefix(held, sums, total);
  return total;
}

// Those who leave: ranks below `rank`, and, of those who have it, up to `age`.
struct Leavers {
  uint32_t rank;
  uint32_t age;
};

LESS_DEVICE Leavers find_leavers(const Candidates& c, const SelectShared& s, int leaving) {
  const auto keys = [&](int64_t i, uint32_t (&x)[4]) {
    const uint4 v = load16(c.key + i);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  };
  const Threshold rank = find_lowest(s, c.count(), leaving, keys);
  if (rank.take == rank.equal) return {rank.value, 0xffffffffu};
  const auto ages = [&](int64_t i, uint32_t (&x)[4]) {
    keys(i, x);
    for (int j = 0; j < 4; ++j) x[j] = x[j] == rank.value ? c.age_key(i + j) : 0;
  };
  return {rank.value, find_lowest(s, c.count(), rank.take, ages).value};
}

LESS_DEVICE bool leaves(const Candidates& c, const Leavers& who, int64_t i) {
  const uint32_t key = c.key[i];  // narrow: a lane a candidate, side by side
  return key != 0 && (key < who.rank || (key == who.rank && c.age_key(i) <= who.age));
}

__global__ void __launch_bounds__(kSelectThreads, 2)
    compact_select_kernel(const __grid_constant__ CompactParams p,
                          const __grid_constant__ CompactWorkspace w) {
  SMEM_ARRAY(int, bins, kBins);
  SMEM_ARRAY(int, sums, kSelectWarps);
  SMEM_ARRAY(int, found, 3);
  const int64_t row = blockIdx.x, b = row / p.spec.K, h = row - b * p.spec.K;
  const int64_t most = p.layout.S, S = p.layout.slots[h], T = p.T;
  unsigned char* const memory = page(p.pool, b);
  if (memory == nullptr) {
    if (threadIdx.x == 0) store(w.leaving + row, 0);
    return;
  }
  const float* const score = p.score + row * (most + T);
  const float* const rank = p.rank == nullptr ? nullptr : p.rank + row * (most + T);
  const Candidates c{p.layout,
                     head(p.layout, memory, h).slots.position,
                     score,
                     score + most,
                     p.valid == nullptr ? nullptr : p.valid + b * T,
                     rank,
                     rank == nullptr ? nullptr : rank + most,
                     w.key + row * w.candidates,
                     S,
                     T,
                     *seen(memory)};
  const int tokens = count_tokens(c, sums);
  const int W = hot_slots(p.layout), hot = p.layout.hot;
  const int leaving = write_keys(c, for_slots(p.spec.rule, S), tokens, sums) - int(S - W);
  __syncthreads();
  Leavers who{0, 0};
  if (leaving > 0) who = find_leavers(c, {bins, sums, found}, leaving);

  int32_t* list = w.list + row * T;
  int32_t* when = w.when == nullptr ? nullptr : w.when + row * T;
  int32_t* free = w.free + row * most;
  int32_t* take = w.take + row * most;
  int32_t* position = w.position + row * most;
  int listed = 0, freed = 0, total;
  for (int64_t s0 = 0; s0 < S; s0 += kSelectThreads) {
    const int64_t s = s0 + threadIdx.x;
    const bool gone = s < S && leaves(c, who, s);
    const bool still =
        // narrow: a lane a slot, side by side
        s < S && !gone && (s < W ? c.key[s] == 0 && c.position[s] >= 0 : c.key[s] != 0);
    const bool open = s >= W && s < S && !still;
    const int before = block_prefix(int(gone) | int(open) << 16, sums, total);
    const int place = listed + (before & 0xffff);
    if (gone && place < T) {
      store(list + place, int32_t(s));  // narrow: a lane a slot, side by side
      // narrow: a lane a slot, side by side
      if (when != nullptr) store(when + place, c.position[s]);
    }
    // narrow: a lane a slot, side by side
    if (open) store(free + freed + (before >> 16), int32_t(s));
    if (s < S) store(take + s, still ? kStays : kEmpty);  // narrow: a lane a slot, side by side
    listed += total & 0xffff;
    freed += total >> 16;
  }
  // The barriers of the next block_prefix are those between `free` and `take` and their readers.
  // Those of the ring, as old as they are, and then the call's.
  int taken = 0;
  int64_t next = c.seen;
  for (int64_t i0 = 0; i0 < hot + T; i0 += kSelectThreads) {
    const int64_t t = i0 + threadIdx.x - hot;
    const bool of_call = c.there(t);
    const int64_t old = c.seen + t;  // who is in the ring
    const int64_t ring = t < 0 && old >= p.layout.sinks ? hot_slot(p.layout, old) : -1;
    // narrow: a lane a slot, side by side
    const bool of_ring = ring >= 0 && c.position[ring] == old;
    const int64_t at = of_call ? S + t : ring;
    // narrow: a lane a candidate, side by side
    const bool competes = (of_call || of_ring) && c.key[at] != 0;
    const bool gone = competes && leaves(c, who, at), joins = competes && !gone;
    // A block's counts stay below 2^10.
    const int before =
        block_prefix(int(gone && of_call) | int(joins) << 10 | int(of_call) << 20, sums, total);
    const int64_t own = of_call ? next + (before >> 20) : old;
    if (gone && of_call && listed + (before & 1023) < T) {
      // narrow: a lane a token, side by side
      store(list + listed + (before & 1023), int32_t(at));
      // narrow: a lane a token, side by side
      if (when != nullptr) store(when + listed + (before & 1023), int32_t(own));
    }
    const int place = taken + (before >> 10 & 1023);
    int64_t slot = -1;
    if (joins && place < freed) {
      slot = free[place];  // narrow: a lane a token, side by side
    } else if (of_call && !competes) {
      slot = hot_slot(p.layout, own);
    }
    if (slot >= 0) {
      // narrow: a lane a token, side by side
      store(take + slot, int32_t(of_call ? t : kFromHot - ring));
      store(position + slot, int32_t(own));  // narrow: a lane a token, side by side
    }
    listed += total & 1023;
    taken += total >> 10 & 1023;
    next += total >> 20;
  }
  if (threadIdx.x == 0) {
    store(w.leaving + row, int32_t(min(int64_t{listed}, T)));
    store(w.tokens + row, tokens);
  }
}

}  // namespace less::cuda
