// One row through the space of a layer's rows (common/space.h).
#pragma once

#include <algorithm>
#include <utility>

#include "common/space.h"
#include "cpu/features.h"
#include "cpu/simd.h"

namespace less::cpu::LESS_ISA {

// The sums and differences of lanes i and i + kLength of every part.
template <int kLength, size_t... i>
LESS_INLINE Floats mix_lanes(Floats x, std::index_sequence<i...>) {
  const Ints sign = {(i & kLength) != 0 ? INT32_MIN : 0 ...};
  return Floats{x[i ^ kLength]...} + (Floats)((Ints)x ^ sign);
}

template <int kLength>
LESS_INLINE Vec mix(Vec x) {
  if constexpr (kLength < kNative) {
    constexpr std::make_index_sequence<kNative> lanes;
    LESS_EACH_PART(x.part[i] = mix_lanes<kLength>(x.part[i], lanes));
    return x;
  } else {
    const Floats a = x.part[0], b = x.part[kParts - 1];
    x.part[0] = a + b;
    x.part[kParts - 1] = a - b;
    return x;
  }
}

// The butterflies of blocks within a vector.
template <int kBlock>
LESS_INLINE Vec mixed(Vec x) {
  if constexpr (kBlock > 1) x = mix<1>(x);
  if constexpr (kBlock > 2) x = mix<2>(x);
  if constexpr (kBlock > 4) x = mix<4>(x);
  if constexpr (kBlock > 8) x = mix<8>(x);
  return x;
}

template <int kBlock>
LESS_INLINE void small_blocks(float* x, int64_t D) {
  for_each(x, D, [](Vec a, int64_t, int) { return mixed<kBlock>(a); });
}

// Those of kVecs vectors, or of the last length below, in registers.
template <int kVecs, int kLength = kVecs / 2>
LESS_INLINE void mix_vectors(Vec (&a)[kVecs]) {
  if constexpr (kLength > 0) {
    mix_vectors<kVecs, kLength / 2>(a);
    for (int i = 0; i < kVecs; ++i) {
      if ((i & kLength) != 0) continue;
      const Vec sum = a[i] + a[i + kLength];
      a[i + kLength] = a[i] - a[i + kLength];
      a[i] = sum;
    }
  }
}

template <int kVecs>
LESS_INLINE void large_blocks(float* x, int64_t D) {
  constexpr int kV = Vec::kSize;
  for (int64_t first = 0; first < D; first += kVecs * kV) {
    Vec a[kVecs];
    for (int i = 0; i < kVecs; ++i) a[i] = mixed<kV>(Vec::load(x + first + i * kV));
    mix_vectors<kVecs>(a);
    for (int i = 0; i < kVecs; ++i) a[i].store(x + first + i * kV);
  }
}

// x [D] times the Hadamard matrix of +-1, blockwise, in place; the order is that of space.h.
inline void butterflies(float* x, int64_t D) {
  constexpr int64_t kV = Vec::kSize, kMost = 8;  // vectors that are mixed in registers
  const int64_t block = hadamard_block(D);
  if (block < kV) {
    if (block == 2) return small_blocks<2>(x, D);
    if (block == 4) return small_blocks<4>(x, D);
    if (block == 8) return small_blocks<8>(x, D);
    return;
  }
  if (block == kV) return large_blocks<1>(x, D);
  if (block == 2 * kV) return large_blocks<2>(x, D);
  if (block == 4 * kV) return large_blocks<4>(x, D);
  large_blocks<kMost>(x, D);
  for (int64_t length = kMost * kV; length < block; length *= 2) {
    for (int64_t first = 0; first < D; first += 2 * length) {
      for (int64_t i = first; i < first + length; i += kV) {
        const Vec a = Vec::load(x + i), b = Vec::load(x + i + length);
        (a + b).store(x + i);
        (a - b).store(x + i + length);
      }
    }
  }
}

// Numbers of fp16, by their bits; the rest is 1, by which what is not there may be divided.
LESS_INLINE Vec load_half(const uint16_t* p, int n) {
  const fp16* const half = reinterpret_cast<const fp16*>(p);
  return n == Vec::kSize ? Vec::load(half) : Vec::load(half, n, 1.0f);
}

// x [D] becomes W ((x - mean) (scale f)).
LESS_INLINE void into_space(const uint16_t* mean, const uint16_t* scale, int64_t D, float* x) {
  const Vec factor(hadamard_factor(D));
  for_each(x, D, [=](Vec a, int64_t d, int n) {
    return (a - load_half(mean + d, n)) * (load_half(scale + d, n) * factor);
  });
  butterflies(x, D);
}

// x [D] becomes W (x) (f / scale) + mean; null: without a mean.
LESS_INLINE void out_of_space(const uint16_t* mean, const uint16_t* scale, int64_t D, float* x) {
  butterflies(x, D);
  const Vec factor(hadamard_factor(D));
  for_each(x, D, [=](Vec a, int64_t d, int n) {
    a = a * (factor / load_half(scale + d, n));
    return mean == nullptr ? a : a + load_half(mean + d, n);
  });
}

// x [D] of kv head `head` becomes what the rotation makes of it; a rounded query is not rounded.
LESS_INLINE void rotate_row(const Space& space, Rotation rotation, int64_t head, int64_t D,
                            float* x) {
  const int64_t at = head * D;
  switch (rotation) {
    case Rotation::query:
    case Rotation::rounded_query: {
      const Vec factor(hadamard_factor(D));
      const uint16_t* const scale = space.key_scale + at;
      for_each(x, D,
               [=](Vec a, int64_t d, int n) { return a * (factor / load_half(scale + d, n)); });
      return butterflies(x, D);
    }
    case Rotation::key:
      return into_space(space.key_mean + at, space.key_scale + at, D, x);
    case Rotation::value:
      return into_space(space.value_mean + at, space.value_scale + at, D, x);
    case Rotation::output:
      return out_of_space(space.value_mean + at, space.value_scale + at, D, x);
  }
}

// A key back out of the space, as psi of maps of a kind takes it.
LESS_INLINE void key_out_of_space(const Space& space, MapKind kind, int64_t head, int64_t D,
                                  float* x) {
  const uint16_t* const mean = centred(kind) ? nullptr : space.key_mean + head * D;
  out_of_space(mean, space.key_scale + head * D, D, x);
}

}  // namespace less::cpu::LESS_ISA
