// The end of a block of chunk_attention.cu: what it holds of its queries' softmax becomes out, lse
// and share; and, where the keys of a few queries are cut into splits, how the splits meet before.
#pragma once

#include "cuda/chunk_attention/tiles.h"

namespace less::cuda {

// Splits of a kv head's keys that meet in the workspace: each leaves there what it has, a warp's
// fragments by lane, and the last to do so adds up all, in order.
template <typename Scheme, int kD>
class Meeting {
  using Shape = AttendShape<Scheme, kD>;
  static constexpr int kColumns = Shape::kColumns;
  static constexpr int kFragments = kColumns / 8 + 1;  // of out, and of top and total

 public:
  static constexpr int64_t kPart = kFragments * 32 * 4;  // floats of a warp

  // last: one number of shared memory, which the tiles need no longer once all have met.
  LESS_DEVICE Meeting(const Splits& splits, const KvHead& head, int* last)
      : splits_(splits),
        last_(last),
        row_(head.row),
        there_(Shape::row() < head.tokens * head.G),
        lane_(int(threadIdx.x) % 32) {}

  // Whether this block is the last, which then has the sums of all. Called by the whole block.
  LESS_DEVICE bool join(int split, Running<kColumns>& sums) const {
    if (there_) leave(split, sums);
    // One thread's fences speak for the block: the barriers order the others before and after them.
    __syncthreads();
    if (threadIdx.x == 0) {
      int* const arrived = splits_.arrived + row_;
      fence_gpu();
      *last_ = atomic_add(arrived, 1) == splits_.count - 1;
      fence_gpu();
      if (*last_ != 0) store(arrived, 0);
    }
    __syncthreads();
    if (*last_ == 0) return false;
    if (there_) add_up(sums);
    return true;
  }

 private:
  LESS_DEVICE float* part(int split) const {
    const int warp = int(threadIdx.x) / 32;
    const int64_t at = (int64_t{row_} * splits_.count + split) * splits_.warps + warp;
    return splits_.parts + at * kPart + lane_ * 4;
  }

  // Where tops are, and 64 numbers further on totals.
  LESS_DEVICE float* part_rest(int split) const {
    return part(split) + (kFragments - 1) * 32 * 4 - lane_ * 2;
  }

  static LESS_DEVICE void put(float* at, const float (&x)[4]) {
    store16(at, make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                           __float_as_uint(x[3])));
  }

  LESS_DEVICE void leave(int split, const Running<kColumns>& sums) const {
    float* const at = part(split);
#pragma unroll
    for (int n = 0; n < kFragments - 1; ++n) put(at + n * 32 * 4, sums.out[n]);
    float* const rest = part_rest(split);
    store8(rest, make_uint2(__float_as_uint(sums.top[0]), __float_as_uint(sums.top[1])));
    store8(rest + 32 * 2,
           make_uint2(__float_as_uint(sums.total[0]), __float_as_uint(sums.total[1])));
  }

  LESS_DEVICE void add_up(Running<kColumns>& sums) const {
    sums = Running<kColumns>();
#pragma unroll 1
    for (int split = 0; split < splits_.count; ++split) {
      const uint2 top = load8(part_rest(split));  // narrow: two numbers of a lane, side by side
      sums.top[0] = fmaxf(sums.top[0], __uint_as_float(top.x));
      sums.top[1] = fmaxf(sums.top[1], __uint_as_float(top.y));
    }
#pragma unroll 1
    for (int split = 0; split < splits_.count; ++split) {
      const float* const at = part(split);
      // narrow: two numbers of a lane, side by side
      const uint2 top = load8(part_rest(split)), total = load8(part_rest(split) + 32 * 2);
      const float x[2] = {__uint_as_float(top.x), __uint_as_float(top.y)};
      const float sum[2] = {__uint_as_float(total.x), __uint_as_float(total.y)};
      float factor[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        factor[i] = sums.top[i] == -kInfinity ? 0.0f : exp2_approx(x[i] - sums.top[i]);
        sums.total[i] = fmaf(sum[i], factor[i], sums.total[i]);
      }
#pragma unroll
      for (int n = 0; n < kFragments - 1; ++n) {
        float v[4];
        widen16<float>(load16(at + n * 32 * 4), v);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums.out[n][j] = fmaf(v[j], factor[j / 2], sums.out[n][j]);
      }
    }
  }

  const Splits& splits_;
  int* const last_;
  const int row_;
  const bool there_;  // the warp has queries
  const int lane_;
};

// What is left to do for a thread's rows once all keys are seen.
template <typename Scheme, int kD>
class Finish {
  using Shape = AttendShape<Scheme, kD>;
  using Shared = AttendShared<Scheme, kD>;
  static constexpr int kColumns = Shape::kColumns;

 public:
  LESS_DEVICE Finish(const ChunkAttentionParams& p, const KeyLists& lists, const KvHead& head,
                     int first)
      : p_(p),
        lists_(lists),
        head_(head),
        first_(first),
        lane_(int(threadIdx.x) % 32),
        column_(Shape::column()),
        row_(Shape::row() + lane_ / 4) {
    for (int i = 0; i < 2; ++i) {
      const int m = first + row_ + 8 * i;
      counts_[i] = m < head.tokens * head.G;
    }
  }

  // Divides by the mass, and merges the state. Called by the whole block, which has left the tiles.
  LESS_DEVICE void run(Running<kColumns>& sums, float* lse, const Shared& shared) const {
    float* const H = reinterpret_cast<float*>(shared.k);    // [kStateRows, kD]
    float* const phi = reinterpret_cast<float*>(shared.v);  // [kRows, kStateRows], by phi_at
    float factor[2], low[2], mass[2] = {0.0f, 0.0f};
    if (has_state()) {
      sum_masses(H, phi, mass);
    } else {
      __syncthreads();  // were read until now
    }
    float* const masses = shared.weight;  // [kRows], by number_at
    float* const shares = masses + Shape::kNumbers / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float total = sum_of_quad(sums.total[i]), top = sums.top[i] * kLn2;
      const float share = merge(top, total, mass[i], factor[i], low[i]);
      if (lane_ % 4 != 0 || column_ != 0) continue;
      masses[number_at(row_ + 8 * i)] = counts_[i] ? top + logf(total) : 0.0f;
      shares[number_at(row_ + 8 * i)] = counts_[i] ? share : 0.0f;
    }
    __syncthreads();
    if (lse != nullptr) write_numbers(masses, lse);
    if (p_.call.v.data == nullptr) return;
    write_numbers(shares, p_.share);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums.out[n][j] *= factor[j / 2];
    }
    if (has_state()) add_state(low, H, phi, sums.out);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!counts_[j / 2]) sums.out[n][j] = 0.0f;
      }
    }
    write(sums.out, shared.q);
  }

 private:
  LESS_DEVICE bool has_state() const { return p_.phi_q != nullptr && head_.page != nullptr; }
  LESS_DEVICE State state() const { return less::head(p_.layout, head_.page, head_.h).state; }

  // The state as one more part of a row's softmax: factor of the kept tokens' sum, low of phi H.
  // Returns the state's share of the mass. NaN in the mass is NaN in all three.
  LESS_DEVICE float merge(float top, float total, float mass, float& factor, float& low) const {
    factor = total == 0.0f ? 0.0f : 1.0f / total;
    low = 0.0f;
    if (mass <= 0.0f) return 0.0f;
    const float log_mass = logf(mass), both = fmaxf(top, log_mass);
    const float kept = exp2_approx((top - both) * kLog2E);
    const float taken = exp2_approx((log_mass - both) * kLog2E);
    const float inverse = 1.0f / fmaf(kept, total, taken);
    factor = kept * inverse;
    low = taken * inverse / mass;
    return taken * inverse;
  }

  // One number of each of the block's queries to [B, Q, T]: head by head, for those of a head lie
  // side by side.
  LESS_DEVICE void write_numbers(const float* from, float* to) const {
    const int begin = first_ / head_.G, end = (first_ + Shape::kRows - 1) / head_.G + 1;
    const int tokens = end - begin, all = tokens * head_.G;
#pragma unroll 1
    for (int x = int(threadIdx.x); x < all; x += Shape::kThreads) {
      const int m = (begin + x % tokens) * head_.G + x / tokens, row = m - first_;
      if (row < 0 || row >= Shape::kRows) continue;
      if (m >= p_.T * head_.G) continue;
      // narrow: a lane a query, side by side
      store(to + head_.query_at(p_, lists_, m), from[number_at(row)]);
    }
  }

  // Where a row's number is: 32 that are written together, of one head or a few, are in different
  // banks where G is a power of 2.
  LESS_DEVICE int number_at(int row) const { return row + row / 32 * (min(head_.G, 32) / 2); }

  // mass = phi z of the thread's rows. Leaves the first rows of H, and their phi, in shared memory.
  LESS_DEVICE void sum_masses(float* H, float* phi, float (&mass)[2]) const {
    const float* const z = state().z;
    for (int first = max(p_.layout.R - 1, 0) / kStateRows * kStateRows; first >= 0;
         first -= kStateRows) {
      stage_state(first, H, phi);
      const int rows = min(kStateRows, p_.layout.R - first);
#pragma unroll 1
      for (int r = lane_ % 4; r < rows; r += 4) {
        // narrow: a number of a feature, the same for eight lanes
        mass[0] = fmaf(phi[phi_at(row_, r)], z[first + r], mass[0]);
        // narrow: a number of a feature, the same for eight lanes
        mass[1] = fmaf(phi[phi_at(row_ + 8, r)], z[first + r], mass[1]);
      }
    }
    mass[0] = sum_of_quad(mass[0]);
    mass[1] = sum_of_quad(mass[1]);
  }

  // out += low phi H, a few rows of H at a time, after sum_masses.
  LESS_DEVICE void add_state(const float (&low)[2], float* H, float* phi,
                             float (&out)[kColumns / 8][4]) const {
    for (int first = 0; first < p_.layout.R; first += kStateRows) {
      if (first > 0) stage_state(first, H, phi);
      const int rows = min(kStateRows, p_.layout.R - first);
#pragma unroll 1
      for (int r = 0; r < rows; ++r) {
        const float a = low[0] * phi[phi_at(row_, r)], b = low[1] * phi[phi_at(row_ + 8, r)];
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          const float* at = H + r * kD + column_ + 8 * n + lane_ % 4 * 2;
          const float x = at[0], y = at[1];
          out[n][0] = fmaf(a, x, out[n][0]);
          out[n][1] = fmaf(a, y, out[n][1]);
          out[n][2] = fmaf(b, x, out[n][2]);
          out[n][3] = fmaf(b, y, out[n][3]);
        }
      }
    }
  }

  // Rows [first, first + kStateRows) of H, and what phi the block's queries have of them.
  LESS_DEVICE void stage_state(int first, float* H, float* phi) const {
    __syncthreads();
    const float* from = state().H;
#pragma unroll 1
    for (int x = int(threadIdx.x); x < kStateRows * kD / 4; x += Shape::kThreads) {
      const int r = x / (kD / 4), d = x % (kD / 4) * 4;
      const bool there = first + r < p_.layout.R && d < p_.spec.D;
      store16_shared(H + r * kD + d,
                     there ? load16(from + (first + r) * p_.spec.D + d) : make_uint4(0, 0, 0, 0));
    }
    const int rows = min(kStateRows, p_.layout.R - first);
#pragma unroll 1
    for (int x = int(threadIdx.x); x < Shape::kRows * kStateRows; x += Shape::kThreads) {
      const int row = x / kStateRows, r = x % kStateRows, m = first_ + row;
      if (r >= rows) continue;
      phi[phi_at(row, r)] = m < head_.tokens * head_.G
                                // narrow: R features of a query, R any number, side by side
                                ? p_.phi_q[head_.query_at(p_, lists_, m) * p_.layout.R + first + r]
                                : 0.0f;
    }
    __syncthreads();
  }

  // Where a row's phi is: two rows that lie together, and one number of eight rows, are in
  // different banks.
  static LESS_DEVICE int phi_at(int row, int r) {
    return row * kStateRows + ((r / 4) ^ (row / 2 % 4)) * 4 + r % 4;
  }

  // The warp's rows of out, by way of its part of shared memory, as whole 16-byte pieces.
  LESS_DEVICE void write(const float (&out)[kColumns / 8][4], uint16_t* staging) const {
    if constexpr (kIsWide<Scheme>) {
      if (p_.q.dtype == DType::f32) return write_floats(out, reinterpret_cast<float*>(staging));
      if (p_.q.dtype == DType::fp16) return write_halves<HalfTag>(out, staging);
      write_halves<BFloatTag>(out, staging);
    } else {
      write_halves<typename Scheme::KeyTag>(out, staging);
    }
  }

  template <typename Tag>
  LESS_DEVICE void write_halves(const float (&out)[kColumns / 8][4], uint16_t* staging) const {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint16_t* at = staging + tile_at<kD>(row_ + 8 * i, column_ / 8 + n) + lane_ % 4 * 2;
        *reinterpret_cast<uint32_t*>(at) = pack<Tag>(out[n][2 * i], out[n][2 * i + 1]);
      }
    }
    write_pieces<8>([=](int row, int piece) { return staging + tile_at<kD>(row, piece); });
  }

  // Pairs of four rows, and eight pieces of a row, are in different banks.
  LESS_DEVICE void write_floats(const float (&out)[kColumns / 8][4], float* staging) const {
    const auto at = [=](int row, int piece) {
      return staging + row * kD + (piece ^ (row & 3) * 2) * 4;
    };
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* pair = at(row_ + 8 * i, column_ / 4 + 2 * n + lane_ % 4 / 2) + lane_ % 2 * 2;
        store8_shared(
            pair, make_uint2(__float_as_uint(out[n][2 * i]), __float_as_uint(out[n][2 * i + 1])));
      }
    }
    write_pieces<4>(at);
  }

  // kOf: numbers in a piece. Eight lanes, or four, write pieces of a row that lie side by side.
  template <int kOf, typename At>
  LESS_DEVICE void write_pieces(const At& at) const {
    constexpr int kLanes = kOf == 4 ? 8 : kPermuted<kD>;
    __syncwarp();
#pragma unroll 1
    for (int r = lane_ / kLanes; r < 16; r += 32 / kLanes) {
      const int m = first_ + Shape::row() + r;
      if (m >= p_.T * head_.G) break;
      const int64_t to = head_.query_row(p_.out, p_, lists_, m);
#pragma unroll
      for (int j = 0; j < kColumns / kOf; j += kLanes) {
        const int piece = column_ / kOf + j + lane_ % kLanes;
        if (piece * kOf >= p_.spec.D) break;
        store16(static_cast<unsigned char*>(p_.out.data) + (to + piece * kOf) * (16 / kOf),
                load16_shared(at(Shape::row() + r, piece)));
      }
    }
  }

  const ChunkAttentionParams& p_;
  const KeyLists& lists_;
  const KvHead& head_;
  const int first_;  // of the block's queries
  const int lane_;
  const int column_;  // the first of the warp's
  const int row_;     // of the block's queries, as the one 8 further on
  bool counts_[2];    // row_, row_ + 8: of a valid token
};

}  // namespace less::cuda
