// out = (phi H + sum e^l v) / (phi z + sum e^l),  l = scale q.k + weight, over the kept slots, the
// low-rank state and, causally, the call's tokens; the state is one more part of the softmax, with
// log-mass log(phi z) and value phi H / phi z, so that every exponent is <= 0.
//
// list_keys_kernel: grid (B K + B): kept slots of a kv head, valid tokens of a row, in order.
// attend_kernel: grid (B K ceil(G T / kRows)), the blocks with the most keys first. A block owns
//   kRows queries, 16 a warp, whose G heads share every tile of keys and values. Tiles of kKeys
//   keys stream through shared memory while the one before is computed with: q k^T by tensor
//   cores, running maximum and sum, weights as operands, their product with v.
// Scores are sums over columns: prompt_scores.cu, from the logarithms of the queries' masses.
// Memory: k and v once per block, 2 D bytes a key, from the second-level cache after the first;
//   shared memory at most 99 kB, which every architecture has.
// Order:  keys ascending, tile by tile; a tile's sum of values is by itself before it is added. One
//   owner per output; what a row has depends on nothing but the row.
#include <cmath>

#include "cuda/attention.h"
#include "cuda/kernels.h"

namespace less::cuda {

constexpr int kListThreads = 128;
constexpr int kStateRows = 16;  // rows of H in shared memory at once

// Indices of [0, n) that keep() holds for, ascending, from the front of the list; the others from
// its end.
template <typename Keep>
LESS_DEVICE void partition(int n, const Keep& keep, int32_t* list, int32_t* count) {
  constexpr int kWarps = kListThreads / 32;
  SMEM_ARRAY(int, kept_of, 2 * kWarps);
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int kept = 0;
  for (int first = 0; first < n; first += kListThreads) {
    const int i = first + thread;
    const bool mine = i < n && keep(i);
    const unsigned ballot = __ballot_sync(0xffffffffu, mine);
    int* of_pass = kept_of + first / kListThreads % 2 * kWarps;
    if (lane == 0) of_pass[warp] = __popc(ballot);
    __syncthreads();
    int before = kept + __popc(ballot & ((1u << lane) - 1u));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += of_pass[w];
      kept += of_pass[w];
    }
    if (i < n) store(list + (mine ? before : n - 1 - (i - before)), int32_t(i));
  }
  if (thread == 0) store(count, int32_t(kept));
}

__global__ void __launch_bounds__(kListThreads)
    list_keys_kernel(const ChunkAttentionParams p, const KeyLists lists) {
  const int64_t rows = p.slots.S == 0 ? 0 : p.B * p.K, x = blockIdx.x;
  if (x < rows) {
    const int32_t* position = p.slots.position + x * p.slots.S;
    partition(
        int(p.slots.S), [position](int s) { return position[s] >= 0; }, lists.slot + x * p.slots.S,
        lists.slots + x);
  } else {
    const int64_t b = x - rows;
    const bool* valid = p.valid + b * p.T;
    partition(
        int(p.T), [valid](int t) { return valid[t]; }, lists.token + b * p.T, lists.tokens + b);
  }
}

cudaError_t list_keys(const ChunkAttentionParams& p, const KeyLists& lists, cudaStream_t stream) {
  const int64_t rows = p.slots.S == 0 ? 0 : p.B * p.K;
  const int64_t blocks = rows + (lists.token == nullptr ? 0 : p.B);
  if (blocks == 0) return cudaSuccess;
  return launch(list_keys_kernel, {dim3(unsigned(blocks)), dim3(kListThreads), 0, stream}, p,
                lists);
}

// -- attention --

template <typename Scheme, int kD>
struct AttendShape {
  // Warps that share 16 rows, each with a part of the columns of out: 64 accumulators are enough.
  static constexpr int kSharers = kD > 128 ? 2 : 1;
  static constexpr int kColumns = kD / kSharers;  // of a warp
  static constexpr int kRows = kIsWide<Scheme> && kD > 128 ? 32 : 64;
  static constexpr int kKeys =
      (kIsWide<Scheme> ? 32 : 64) /
      (kD > 128 || (!kIsPlain<Scheme> && !kIsWide<Scheme> && kD > 96) ? 2 : 1);
  static constexpr int kThreads = kRows * 2 * kSharers;
  static constexpr int kStages = kIsPlain<Scheme> ? 2 : 1;  // of keys and values
  // On a multiprocessor at least, which leaves a thread 255 registers; 0: fewer, as the compiler
  // guesses, where its guess spills nothing.
  static constexpr int kBlocks = kIsPlain<Scheme> && kD != 96 ? 0 : 256 / kThreads;
  static constexpr int kKeyTile = Scheme::kParts * kKeys * kD;
  static constexpr int kValueTile = Scheme::kValueParts * kKeys * kD;

  // The first of the warp's 16 rows, of the block's, and of its columns.
  static LESS_DEVICE int row() { return int(threadIdx.x) / (32 * kSharers) * 16; }
  static LESS_DEVICE int column() { return int(threadIdx.x) / 32 % kSharers * kColumns; }
};

// A key's log-weight, in units of log 2, and the scales of its rows.
struct Factors {
  float weight, k, v;
};

template <typename Scheme, int kD>
struct AttendShared {
  using Shape = AttendShape<Scheme, kD>;
  uint16_t* q;    // a tile; at the end, the block's rows of out
  uint16_t* k;    // [kStages] tiles; at the end, rows of H
  uint16_t* v;    // [kStages] tiles; at the end, [kRows, kStateRows] of phi
  float* weight;  // [2, kKeys], as the scales, of the keys of even and of odd tiles
  float* k_scale;
  float* v_scale;

  __host__ __device__ AttendShared(SharedCarver& c)
      : q(c.take<uint16_t>(Scheme::kParts * Shape::kRows * kD)),
        k(c.take<uint16_t>(Shape::kStages * Shape::kKeyTile)),
        v(c.take<uint16_t>(Shape::kStages * Shape::kValueTile)),
        weight(c.take<float>(2 * Shape::kKeys)),
        k_scale(Scheme::kScaled ? c.take<float>(2 * Shape::kKeys) : nullptr),
        v_scale(Scheme::kScaled ? c.take<float>(2 * Shape::kKeys) : nullptr) {}
};

// Tiles on their way to shared memory: of the source that was entered last.
template <typename Scheme, int kD>
class Stream {
  using Shape = AttendShape<Scheme, kD>;

 public:
  LESS_DEVICE void enter(const Source& from) {
    from_ = from;
    first_ = -Shape::kKeys;
  }

  // Begins to load the next tile, by way of shared memory or of registers.
  LESS_DEVICE void fetch(int64_t D, uint16_t* k, uint16_t* v) {
    first_ += Shape::kKeys;
    const auto row = [this](int r) { return this->row(r); };
    if constexpr (kIsPlain<Scheme>) {
      copy_rows<kD, Shape::kKeys, Shape::kThreads>(from_.k, D, row, k);
      if (from_.v != nullptr) copy_rows<kD, Shape::kKeys, Shape::kThreads>(from_.v, D, row, v);
    } else if constexpr (!kIsWide<Scheme>) {
      k_.fetch(from_.k, D, row);
      if (from_.v != nullptr) v_.fetch(from_.v, D, row);
    }
    if (int(threadIdx.x) >= Shape::kKeys) return;
    factors_ = {-kInfinity, 1.0f, 1.0f};
    const int64_t at = row(int(threadIdx.x));
    if (at < 0) return;
    factors_.weight = from_.weight == nullptr ? 0.0f : from_.weight[at] * kLog2E;
    if constexpr (Scheme::kScaled) {
      if (from_.k_scale != nullptr) factors_.k = from_.k_scale[at];
      if (from_.v_scale != nullptr) factors_.v = from_.v_scale[at];
    }
  }

  // What came through registers, to shared memory.
  LESS_DEVICE void place(DType dtype, int64_t D, uint16_t* k, uint16_t* v) const {
    using KeyTag = typename Scheme::KeyTag;
    using ValueTag = typename Scheme::ValueTag;
    if constexpr (kIsWide<Scheme>) {
      const auto row = [this](int r) { return this->row(r); };
      split_rows<KeyTag, Scheme::kParts, kD, Shape::kKeys, Shape::kThreads>(from_.k, dtype, D, row,
                                                                            k);
      if (from_.v == nullptr) return;
      split_rows<ValueTag, Scheme::kValueParts, kD, Shape::kKeys, Shape::kThreads>(from_.v, dtype,
                                                                                   D, row, v);
    } else if constexpr (!kIsPlain<Scheme>) {
      k_.template place<KeyTag>(dtype, k);
      if (from_.v != nullptr) v_.template place<ValueTag>(dtype, v);
    }
  }

  LESS_DEVICE void place_factors(const AttendShared<Scheme, kD>& shared, int tile) const {
    const int key = int(threadIdx.x), at = tile % 2 * Shape::kKeys + key;
    if (key >= Shape::kKeys) return;
    shared.weight[at] = factors_.weight;
    if constexpr (Scheme::kScaled) {
      shared.k_scale[at] = factors_.k;
      shared.v_scale[at] = factors_.v;
    }
  }

 private:
  LESS_DEVICE int64_t row(int r) const {
    const int n = first_ + r;
    return n >= from_.count ? -1 : from_.index == nullptr ? n : from_.index[n];
  }

  struct Nothing {};
  using Through = std::conditional_t<kIsPlain<Scheme> || kIsWide<Scheme>, Nothing,
                                     Bytes<kD, Shape::kKeys, Shape::kThreads>>;

  Source from_;
  int first_;  // of the tile fetched last
  Through k_, v_;
  Factors factors_;
};

// The softmax of a thread's two rows, lane / 4 and lane / 4 + 8 of its warp's 16, as far as it has
// come; logarithms to base 2.
template <int kColumns>
struct Running {
  float top[2];                // largest logit
  float total[2];              // sum of e^(l - top), of this lane's keys
  float out[kColumns / 8][4];  // sum of e^(l - top) v, as a fragment

  LESS_DEVICE Running() {
    top[0] = top[1] = -kInfinity;
    total[0] = total[1] = 0.0f;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0.0f;
  }
};

// s becomes e^(l - top) of a tile, of keys that the rows see: those before seen[0], seen[1].
// Returns what the sums so far shrink by.
template <typename Scheme, int kKeys, int kColumns>
LESS_DEVICE float2 weigh_keys(const Logit& logit, const float* weight, const float* k_scale,
                              bool masked, const int (&seen)[2], float (&s)[kKeys / 8][4],
                              Running<kColumns>& so_far) {
  const int lane = int(threadIdx.x) % 32;
  const auto factor = [&](int n, int j) {
    if constexpr (!Scheme::kScaled) return logit.scale;
    return logit.scale * k_scale[8 * n + lane % 4 * 2 + j % 2];
  };
  const bool capped = logit.cap(s, factor);
  float top[2] = {so_far.top[0], so_far.top[1]};
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int key = 8 * n + lane % 4 * 2 + j % 2;
      s[n][j] = fmaf(s[n][j], capped ? 1.0f : factor(n, j), weight[key]);
      if (masked && key >= seen[j / 2]) s[n][j] = -kInfinity;
      top[j / 2] = fmaxf(top[j / 2], s[n][j]);
    }
  }
  float shrink[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    top[i] = max_of_quad(top[i]);
    const float from = top[i] == -kInfinity ? 0.0f : top[i];
    shrink[i] = exp2_approx(so_far.top[i] - from);
    so_far.top[i] = top[i];
    float total = 0.0f;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int j = 2 * i; j < 2 * i + 2; ++j) {
        s[n][j] = exp2_approx(s[n][j] - from);
        total += s[n][j];
      }
    }
    so_far.total[i] = fmaf(so_far.total[i], shrink[i], total);
  }
  return make_float2(shrink[0], shrink[1]);
}

// out = out shrink + s v, s being a tile's e^(l - top), v's columns those from `column` on.
template <typename Scheme, int kKeys, int kD, int kColumns>
LESS_DEVICE void add_values(const float (&s)[kKeys / 8][4], const float* v_scale, const uint16_t* v,
                            int column, float2 shrink, float (&out)[kColumns / 8][4]) {
  using Tag = typename Scheme::ValueTag;
  constexpr int kParts = Scheme::kWeightParts;
  const int lane = int(threadIdx.x) % 32;
  static_assert(kColumns == kD || kColumns % 64 == 0, "permuted pieces are one warp's");
  const Pieces<kD> of_v(v + column, lane % 16, lane / 16);
  uint32_t left[kKeys / 16][kParts][4];
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
    float a = 1.0f, b = 1.0f;
    if constexpr (Scheme::kScaled) {
      a = v_scale[8 * n + lane % 4 * 2];
      b = v_scale[8 * n + lane % 4 * 2 + 1];
    }
    uint32_t upper[kParts], lower[kParts];
    split<Tag>(s[n][0] * a, s[n][1] * b, upper);
    split<Tag>(s[n][2] * a, s[n][3] * b, lower);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      left[n / 2][part][n % 2 * 2] = upper[part];
      left[n / 2][part][n % 2 * 2 + 1] = lower[part];
    }
  }
#pragma unroll
  for (int d = 0; d < kColumns / 16; ++d) {
    float sum[2][4] = {};
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
      for (int part = 0; part < Scheme::kValueParts; ++part) {
        uint32_t right[4];
        ldmatrix_x4_trans(right, of_v.at(part * (kKeys / 16) + n, d));
        const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
#pragma unroll
        for (int other = 0; other < kParts - part; ++other) {
          mma_m16n8k16(sum[0], left[n][other], first, Tag{});
          mma_m16n8k16(sum[1], left[n][other], second, Tag{});
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& o = out[2 * d + half][j];
        o = fmaf(o, j < 2 ? shrink.x : shrink.y, sum[half][j]);
      }
    }
  }
}

// What is left to do for a thread's rows once all keys are seen.
template <typename Scheme, int kD>
class Finish {
  using Shape = AttendShape<Scheme, kD>;
  using Shared = AttendShared<Scheme, kD>;
  static constexpr int kColumns = Shape::kColumns;

 public:
  LESS_DEVICE Finish(const ChunkAttentionParams& p, const KeyLists& lists, const Head& head,
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
      there_[i] = m < p.T * head.G;
      counts_[i] = m < head.tokens * head.G;
      query_[i] = there_[i] ? head.query_at(p, lists, m) : 0;
    }
  }

  // Divides by the mass, and merges the state. Called by the whole block, which has left the tiles.
  LESS_DEVICE void run(Running<kColumns>& sums, float* lse, const Shared& shared) const {
    float factor[2], low[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float total = sum_of_quad(sums.total[i]), top = sums.top[i] * kLn2;
      const bool tells = there_[i] && lane_ % 4 == 0 && column_ == 0;
      if (lse != nullptr && tells) {
        store(lse + query_[i], counts_[i] ? top + logf(total) : 0.0f);
      }
      const float share = merge(i, top, total, factor[i], low[i]);
      if (p_.v != nullptr && tells) store(p_.share + query_[i], share);
    }
    if (p_.v == nullptr) return;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& out = sums.out[n][j];
        out = counts_[j / 2] ? out * factor[j / 2] : 0.0f;
      }
    }
    if (p_.phi_q != nullptr) add_state(low, shared, sums.out);
    write(sums.out, shared.q);
  }

 private:
  // The state as one more part of row i's softmax: factor of the kept tokens' sum, low of phi H.
  // Returns the state's share of the mass.
  LESS_DEVICE float merge(int i, float top, float total, float& factor, float& low) const {
    factor = total == 0.0f ? 0.0f : 1.0f / total;
    low = 0.0f;
    float mass = 0.0f;
    if (p_.phi_q != nullptr && counts_[i]) {
      const float* phi = p_.phi_q + query_[i] * p_.R;
      const float* z = p_.z + head_.row * p_.R;
#pragma unroll 1
      for (int r = lane_ % 4; r < p_.R; r += 4) mass = fmaf(phi[r], z[r], mass);
    }
    mass = sum_of_quad(mass);
    if (!(mass > 0.0f)) return 0.0f;
    const float log_mass = logf(mass), both = fmaxf(top, log_mass);
    const float kept = exp2_approx((top - both) * kLog2E);
    const float taken = exp2_approx((log_mass - both) * kLog2E);
    const float inverse = 1.0f / fmaf(kept, total, taken);
    factor = kept * inverse;
    low = taken * inverse / mass;
    return taken * inverse;
  }

  // out += low phi H, a few rows of H at a time.
  LESS_DEVICE void add_state(const float (&low)[2], const Shared& shared,
                             float (&out)[kColumns / 8][4]) const {
    float* H = reinterpret_cast<float*>(shared.k);    // [kStateRows, kD]
    float* phi = reinterpret_cast<float*>(shared.v);  // [kRows, kStateRows]
    for (int first = 0; first < p_.R; first += kStateRows) {
      __syncthreads();
      load_state(first, H);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll 1
        for (int r = lane_ % 4; r < kStateRows && column_ == 0; r += 4) {
          const bool there = counts_[i] && first + r < p_.R;
          phi[(row_ + 8 * i) * kStateRows + r] =
              there ? low[i] * p_.phi_q[query_[i] * p_.R + first + r] : 0.0f;
        }
      }
      __syncthreads();
      const int rows = min(kStateRows, int(p_.R) - first);
#pragma unroll 1
      for (int r = 0; r < rows; ++r) {
        const float a = phi[row_ * kStateRows + r], b = phi[(row_ + 8) * kStateRows + r];
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

  LESS_DEVICE void load_state(int first, float* H) const {
    const float* from = p_.H + head_.row * p_.R * p_.D;
#pragma unroll 1
    for (int x = int(threadIdx.x); x < kStateRows * kD / 4; x += Shape::kThreads) {
      const int r = x / (kD / 4), d = x % (kD / 4) * 4;
      const bool there = first + r < p_.R && d < p_.D;
      store16_shared(H + r * kD + d,
                     there ? load16(from + int64_t(first + r) * p_.D + d) : make_uint4(0, 0, 0, 0));
    }
  }

  // The warp's rows of out, by way of its part of shared memory, as whole 16-byte pieces.
  LESS_DEVICE void write(const float (&out)[kColumns / 8][4], uint16_t* staging) const {
    if constexpr (kIsWide<Scheme>) {
      if (p_.q_dtype == DType::f32) return write_floats(out, reinterpret_cast<float*>(staging));
      if (p_.q_dtype == DType::fp16) return write_halves<HalfTag>(out, staging);
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

  LESS_DEVICE void write_floats(const float (&out)[kColumns / 8][4], float* staging) const {
    const auto at = [=](int row, int piece) {
      return staging + row * kD + (piece ^ (row & 7)) * 4;
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
    constexpr int kLanes = kPermuted<kD>;
    __syncwarp();
#pragma unroll 1
    for (int r = lane_ / kLanes; r < 16; r += 32 / kLanes) {
      const int m = first_ + Shape::row() + r;
      if (m >= p_.T * head_.G) break;
      const int64_t to = head_.query_at(p_, lists_, m) * p_.D;
#pragma unroll
      for (int j = 0; j < kColumns / kOf; j += kLanes) {
        const int piece = column_ / kOf + j + lane_ % kLanes;
        if (piece * kOf >= p_.D) break;
        store16(static_cast<unsigned char*>(p_.out) + (to + piece * kOf) * (16 / kOf),
                load16_shared(at(Shape::row() + r, piece)));
      }
    }
  }

  const ChunkAttentionParams& p_;
  const KeyLists& lists_;
  const Head& head_;
  const int first_;  // of the block's queries
  const int lane_;
  const int column_;  // the first of the warp's
  const int row_;     // of the block's queries, as the one 8 further on
  bool there_[2];     // row_, row_ + 8: a query, maybe of padding
  bool counts_[2];    // of a valid token
  int64_t query_[2];  // in [B, Q, T]
};

template <typename Scheme, int kD>
__global__ void __launch_bounds__(AttendShape<Scheme, kD>::kThreads,
                                  AttendShape<Scheme, kD>::kBlocks)
    attend_kernel(const ChunkAttentionParams p, const KeyLists lists, float* lse, int blocks) {
  using Shape = AttendShape<Scheme, kD>;
  constexpr int kKeys = Shape::kKeys;
  DYN_SMEM(memory);
  SharedCarver carver{memory};
  const AttendShared<Scheme, kD> shared(carver);
  const Head head(p, lists, int(blockIdx.x) / blocks);
  const int first = (blocks - 1 - int(blockIdx.x) % blocks) * Shape::kRows;
  const int row = Shape::row(), lane = int(threadIdx.x) % 32;

  // Tokens that the block's last query sees; the tiles of slots come before those of tokens.
  const int last = min(first + Shape::kRows, head.tokens * head.G) - 1;
  const int tokens = last < first ? 0 : last / head.G + 1;
  const int slot_tiles = last < first ? 0 : (head.slots + kKeys - 1) / kKeys;
  const int tiles = slot_tiles + (tokens + kKeys - 1) / kKeys;
  const int token[2] = {(first + row + lane / 4) / head.G, (first + row + lane / 4 + 8) / head.G};

  const auto query = [&](int r) -> int64_t {
    const int m = first + r;
    return m < head.tokens * head.G ? head.query_at(p, lists, m) : -1;
  };
  if constexpr (kIsWide<Scheme>) {
    split_rows<typename Scheme::KeyTag, Scheme::kParts, kD, Shape::kRows, Shape::kThreads>(
        p.q, p.q_dtype, p.D, query, shared.q);
  } else {
    copy_rows<kD, Shape::kRows, Shape::kThreads>(p.q, p.D, query, shared.q);
  }

  Stream<Scheme, kD> stream;
  const auto fetch = [&](int tile) {
    const int stage = tile % Shape::kStages;
    if (tile == slot_tiles) stream.enter(source_of(p, lists, head, false, tokens));
    stream.fetch(p.D, shared.k + stage * Shape::kKeyTile, shared.v + stage * Shape::kValueTile);
  };
  if (tiles > 0) {
    if (slot_tiles > 0) stream.enter(source_of(p, lists, head, true, head.slots));
    fetch(0);
    stream.place_factors(shared, 0);
  }
  copy_async_commit();

  const Logit logit(p);
  Running<Shape::kColumns> sums;
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % Shape::kStages;
    const uint16_t* k = shared.k + stage * Shape::kKeyTile;
    const uint16_t* v = shared.v + stage * Shape::kValueTile;
    if constexpr (kIsPlain<Scheme>) {
      if (tile + 1 < tiles) fetch(tile + 1);
      copy_async_commit();
      copy_async_wait<1>();
    } else {
      stream.place(p.slots.dtype, p.D, shared.k, shared.v);
      copy_async_wait<0>();
    }
    __syncthreads();
    if constexpr (!kIsPlain<Scheme>) {
      if (tile + 1 < tiles) fetch(tile + 1);
    }
    float s[kKeys / 8][4];
    dot_products<typename Scheme::KeyTag, Scheme::kParts, kD, Shape::kRows, kKeys>(shared.q, row, k,
                                                                                   s);
    const int begin = (tile - slot_tiles) * kKeys;  // of the call's keys
    const bool masked = tile >= slot_tiles && (begin + kKeys - 1) * head.G > first + row;
    const int seen[2] = {token[0] + 1 - begin, token[1] + 1 - begin};
    const int factors = tile % 2 * kKeys;
    const float2 shrink = weigh_keys<Scheme, kKeys>(
        logit, shared.weight + factors, shared.k_scale + factors, masked, seen, s, sums);
    if (p.v != nullptr) {
      add_values<Scheme, kKeys, kD, Shape::kColumns>(s, shared.v_scale + factors, v,
                                                     Shape::column(), shrink, sums.out);
    }
    if (tile + 1 < tiles) stream.place_factors(shared, tile + 1);
    __syncthreads();
  }
  copy_async_wait<0>();
  __syncthreads();  // where there was no tile, queries may have been on their way until now
  Finish<Scheme, kD>(p, lists, head, first).run(sums, lse, shared);
}

namespace {

struct Attend {
  const ChunkAttentionParams& p;
  const KeyLists& lists;
  float* lse;
  cudaStream_t stream;

  template <typename Scheme, int kD>
  cudaError_t launch() const {
    using Shape = AttendShape<Scheme, kD>;
    SharedCarver carver{nullptr};
    const AttendShared<Scheme, kD> shared(carver);
    const int64_t blocks = (p.Q / p.K * p.T + Shape::kRows - 1) / Shape::kRows;
    const Launch how{dim3(unsigned(blocks * p.B * p.K)), dim3(Shape::kThreads), carver.used,
                     stream};
    return cuda::launch(attend_kernel<Scheme, kD>, how, p, lists, lse, int(blocks));
  }
};

// The workspace, cut. A call without padding has no use for token.
struct Workspace {
  KeyLists lists;
  float* lse;  // [B, Q, T]
  int64_t bytes;

  explicit Workspace(const ChunkAttentionParams& p) {
    Carver carver{p.workspace};
    lists.slot = carver.take<int32_t>(p.B * p.K * p.slots.S);
    lists.slots = carver.take<int32_t>(p.B * p.K);
    lists.token = carver.take<int32_t>(p.B * p.T);
    lists.tokens = carver.take<int32_t>(p.B);
    lse = carver.take<float>(p.B * p.Q * p.T);
    bytes = carver.used;
    if (p.valid == nullptr) lists.token = lists.tokens = nullptr;
  }
};

}  // namespace

cudaError_t attend(const ChunkAttentionParams& p, const KeyLists& lists, float* lse,
                   cudaStream_t stream) {
  return dispatch(p.q_dtype, p.slots.dtype, p.D, Attend{p, lists, lse, stream});
}

int64_t chunk_attention_workspace(const ChunkAttentionParams& p) { return Workspace(p).bytes; }

cudaError_t chunk_attention(const ChunkAttentionParams& p, cudaStream_t stream) {
  if (p.B * p.K * (p.T + p.slots.S) == 0) return cudaSuccess;
  const Workspace workspace(p);
  cudaError_t error = list_keys(p, workspace.lists, stream);
  if (error == cudaSuccess && p.T > 0) {
    error = attend(p, workspace.lists, p.scores ? workspace.lse : nullptr, stream);
  }
  if (error == cudaSuccess) error = sum_columns(p, workspace.lists, workspace.lse, stream);
  return error;
}

}  // namespace less::cuda
