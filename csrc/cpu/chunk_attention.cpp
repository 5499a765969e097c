// out = (phi H + sum e^l v) / (phi z + sum e^l),  l = scale q.k + weight, over the kept slots, the
// low-rank state and, causally, the call's tokens; the state is one more part of the softmax, with
// log-mass log(phi z) and value phi H / phi z, so that every exponent is <= 0.
//
// chunk_attention: range (b, kv head, block of query tokens); a block holds the G query heads of
//   kBlock / G tokens, so a key is widened once for all of them. Logits of a block: kBlock x N
//   floats, never T x T. Writes out, share, softmax; and the scores, where one block is all.
// chunk_scores: range (b, kv head, tile of keys); recomputes the logits of the tile from the
//   maxima and sums that chunk_attention left, and adds up what each key received.
// Order: keys ascending (slots, then call), queries ascending; one owner per element: neither the
//   thread count nor the rest of the batch changes a bit.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/attention.h"

namespace less::cpu::LESS_ISA {
namespace {

constexpr int64_t kBlock = kAttentionBlock;

// The keys that a kv head of a row can see, in order: kept slots, then the call's valid tokens.
template <typename T>
struct Keys {
  std::vector<const T*> k;
  std::vector<const T*> v;
  std::vector<int32_t> source;  // slot, or index in the call
  std::vector<int32_t> query;   // the row's valid tokens, as indices in the call
  int64_t slots = 0;            // how many of k, v are slots
  int64_t N = 0;

  void gather(const ChunkAttentionParams& p, int64_t b, int64_t head) {
    k.clear();
    v.clear();
    source.clear();
    query.clear();
    const int64_t row = b * p.K + head;
    const T* slot_k = static_cast<const T*>(p.slots.k) + row * p.slots.S * p.D;
    const T* slot_v = static_cast<const T*>(p.slots.v) + row * p.slots.S * p.D;
    for (int64_t s = 0; s < p.slots.S; ++s) {
      if (p.slots.position[row * p.slots.S + s] < 0) continue;
      k.push_back(slot_k + s * p.D);
      v.push_back(slot_v + s * p.D);
      source.push_back(int32_t(s));
    }
    slots = int64_t(k.size());
    const T* new_k = static_cast<const T*>(p.k) + row * p.T * p.D;
    const T* new_v = static_cast<const T*>(p.v) + row * p.T * p.D;
    for (int64_t t = 0; t < p.T; ++t) {
      if (p.valid != nullptr && !p.valid[b * p.T + t]) continue;
      k.push_back(new_k + t * p.D);
      v.push_back(new_v + t * p.D);
      source.push_back(int32_t(t));
      query.push_back(int32_t(t));
    }
    N = int64_t(k.size());
  }
};

struct Work {
  std::vector<float> q;      // [kBlock, width]
  std::vector<float> logit;  // [kBlock, N]
  std::vector<float> out;    // [kBlock, width]
  std::vector<float> sum;    // [N]
};

int64_t tokens_per_block(const ChunkAttentionParams& p) {
  return std::max<int64_t>(1, kBlock / (p.Q / p.K));
}

// Rows of a block: token-major, so that the rows of one token are consecutive: m = i * G + g.
void load_queries(const ChunkAttentionParams& p, const int32_t* token, int64_t tokens, int64_t b,
                  int64_t head, int64_t width, std::vector<float>& q) {
  const int64_t G = p.Q / p.K;
  q.assign(tokens * G * width, 0.0f);
  for (int64_t i = 0; i < tokens; ++i) {
    for (int64_t g = 0; g < G; ++g) {
      const int64_t at = ((b * p.Q + head * G + g) * p.T + token[i]) * p.D;
      widen(p.q, p.q_dtype, at, p.D, q.data() + (i * G + g) * width);
    }
  }
}

// logit[m][n] for keys n0 .. n0 + count of the list; -inf where a query comes before its key.
template <typename T>
void block_logits(const ChunkAttentionParams& p, const Keys<T>& keys, int64_t n0, int64_t count,
                  int64_t first, int64_t tokens, const float* slot_weight, const float* q,
                  int64_t width, Tile<T>& tile, float* logit, int64_t stride) {
  const int64_t G = p.Q / p.K;
  dots(q, tokens * G, width, keys.k.data() + n0, count, p.scale, tile, logit, stride);
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t visible = keys.slots + first + i + 1;  // of the whole list, for this token
    for (int64_t g = 0; g < G; ++g) {
      float* l = logit + (i * G + g) * stride;
      for (int64_t n = n0; n < std::min(n0 + count, keys.slots); ++n) {
        l[n - n0] += slot_weight[keys.source[n]];
      }
      for (int64_t n = std::max(visible, n0); n < n0 + count; ++n) l[n - n0] = -kInfinity;
    }
  }
}

// What the state adds to one query: merges it into out and returns its part of the mass.
float merge_state(const ChunkAttentionParams& p, int64_t row, const float* phi, float top,
                  float total, float* out) {
  const float* z = p.z + row * p.R;
  float low = 0.0f;
  for (int64_t r = 0; r < p.R; ++r) low += phi[r] * z[r];
  if (!(low > 0.0f)) return 0.0f;
  const float log_low = std::log(low);
  const float both = std::max(top, log_low);
  const float kept_mass = std::exp(top - both) * total;
  const float low_mass = std::exp(log_low - both);
  const float inverse = 1.0f / (kept_mass + low_mass);
  const float kept_part = kept_mass * inverse;  // out is already divided by total
  const float low_part = low_mass * inverse / low;
  const float* H = p.H + row * p.R * p.D;
  for (int64_t d = 0; d < p.D; d += Vec::kSize) {
    const int n = int(std::min<int64_t>(Vec::kSize, p.D - d));
    Vec a(0.0f);
    for (int64_t r = 0; r < p.R; ++r) {
      const float* h = H + r * p.D + d;
      a = fma(Vec(phi[r]), n == Vec::kSize ? Vec::load(h) : Vec::load(h, n), a);
    }
    fma(a, Vec(low_part), Vec::load(out + d) * Vec(kept_part)).store(out + d);
  }
  return low_mass * inverse;
}

// received[n] += sum over the block's rows of fade * e^(l - top) / total; logit holds e^(l - top).
void add_columns(const float* logit, int64_t stride, int64_t rows, int64_t N, const float* factor,
                 float* received) {
  for (int64_t m = 0; m < rows; ++m) {
    const Vec f(factor[m]);
    const float* p = logit + m * stride;
    for_each(received, N, [f, p](Vec a, int64_t i, int n) {
      return fma(f, n == Vec::kSize ? Vec::load(p + i) : Vec::load(p + i, n), a);
    });
  }
}

float power(float base, int64_t exponent) {
  return base == 1.0f ? 1.0f : float(std::pow(double(base), double(exponent)));
}

// Scores of keys n0 .. n0 + count from what they received.
template <typename T>
void write_scores(const ChunkAttentionParams& p, const Keys<T>& keys, int64_t row, int64_t n0,
                  int64_t count, const float* received) {
  const float kept = power(p.decay, int64_t(keys.query.size()));
  for (int64_t n = n0; n < n0 + count; ++n) {
    const int64_t i = keys.source[n];
    if (n < keys.slots) {
      p.slot_score[row * p.slots.S + i] =
          p.slots.score[row * p.slots.S + i] * kept + received[n - n0];
    } else {
      p.chunk_score[row * p.T + i] = received[n - n0];
    }
  }
}

template <typename T>
void attend_block(const ChunkAttentionParams& p, const Keys<T>& keys, int64_t b, int64_t head,
                  int64_t block, Tile<T>& tile, Work& work) {
  const int64_t G = p.Q / p.K, row = b * p.K + head, width = padded(p.D);
  const int64_t per_block = tokens_per_block(p);
  const int64_t count = int64_t(keys.query.size());
  const int64_t first = block * per_block;
  if (first >= count) return;
  const int64_t tokens = std::min(per_block, count - first);
  const int32_t* token = keys.query.data() + first;
  const int64_t N = keys.slots + first + tokens;  // no later key is visible to this block
  const int64_t rows = tokens * G;
  load_queries(p, token, tokens, b, head, width, work.q);
  work.logit.resize(rows * N);
  work.out.assign(rows * width, 0.0f);
  block_logits(p, keys, 0, N, first, tokens, p.slots.weight + row * p.slots.S, work.q.data(), width,
               tile, work.logit.data(), N);

  float top[kBlock], total[kBlock], factor[kBlock];
  std::vector<float> more;
  float *tops = top, *totals = total, *factors = factor;
  if (rows > kBlock) {  // groups wider than a block: one token at a time
    more.resize(3 * rows);
    tops = more.data();
    totals = tops + rows;
    factors = totals + rows;
  }
  for (int64_t m = 0; m < rows; ++m) {
    float* l = work.logit.data() + m * N;
    tops[m] = largest_of(l, N);
    totals[m] = exp_and_sum(l, N, tops[m]);
    factors[m] = power(p.decay, count - 1 - (first + m / G)) / totals[m];
  }
  weighted_sum(work.logit.data(), rows, N, keys.v.data(), N, tile, work.out.data(), width);
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t query = b * p.Q + head * G + m % G;
    const int64_t at = query * p.T + token[m / G];
    float* out = work.out.data() + m * width;
    const Vec inverse(1.0f / totals[m]);
    for (int64_t d = 0; d < width; d += Vec::kSize) (Vec::load(out + d) * inverse).store(out + d);
    p.share[at] = p.phi_q == nullptr
                      ? 0.0f
                      : merge_state(p, row, p.phi_q + at * p.R, tops[m], totals[m], out);
    narrow(out, p.D, p.q_dtype, at * p.D, p.out);
    p.softmax[2 * at] = tops[m];
    p.softmax[2 * at + 1] = 1.0f / totals[m];
  }
  if (p.scores && count <= per_block) {
    work.sum.assign(N, 0.0f);
    add_columns(work.logit.data(), N, rows, N, factors, work.sum.data());
    write_scores(p, keys, row, 0, N, work.sum.data());
  }
}

// Everything that no query of a block writes: padding, empty slots, and scores that stay.
void write_rest(const ChunkAttentionParams& p, int64_t b, int64_t head) {
  const int64_t G = p.Q / p.K, row = b * p.K + head;
  bool any = p.valid == nullptr;
  for (int64_t t = 0; t < p.T; ++t) {
    if (p.valid == nullptr || p.valid[b * p.T + t]) {
      any = true;
      if (!p.scores) p.chunk_score[row * p.T + t] = 0.0f;
      continue;
    }
    p.chunk_score[row * p.T + t] = 0.0f;
    for (int64_t g = 0; g < G; ++g) {
      const int64_t at = (b * p.Q + head * G + g) * p.T + t;
      const int64_t bytes = p.q_dtype == DType::f32 ? 4 : 2;
      std::memset(static_cast<char*>(p.out) + at * p.D * bytes, 0, p.D * bytes);
      p.share[at] = 0.0f;
    }
  }
  for (int64_t s = 0; s < p.slots.S; ++s) {
    const int64_t i = row * p.slots.S + s;
    if (p.slots.position[i] < 0) {
      p.slot_score[i] = 0.0f;
    } else if (!p.scores || !any) {
      p.slot_score[i] = p.slots.score[i];
    }
  }
}

template <typename T>
void attend(const ChunkAttentionParams& p, int64_t begin, int64_t end) {
  Keys<T> keys;
  Tile<T> tile(p.D);
  Work work;
  const int64_t blocks = (p.T + tokens_per_block(p) - 1) / tokens_per_block(p);
  int64_t gathered = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / blocks, b = row / p.K, head = row % p.K;
    if (gathered != row) keys.gather(p, b, head);
    gathered = row;
    if (item % blocks == 0) write_rest(p, b, head);
    attend_block(p, keys, b, head, item % blocks, tile, work);
  }
}

template <typename T>
void score(const ChunkAttentionParams& p, int64_t begin, int64_t end) {
  Keys<T> keys;
  Tile<T> tile(p.D);
  Work work;
  const int64_t G = p.Q / p.K, width = padded(p.D), per_block = tokens_per_block(p);
  const int64_t tiles = (p.slots.S + p.T + kScoreTile - 1) / kScoreTile;
  std::vector<float> factor(std::max(kBlock, G));
  int64_t gathered = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / tiles, b = row / p.K, head = row % p.K;
    if (gathered != row) keys.gather(p, b, head);
    gathered = row;
    const int64_t n0 = item % tiles * kScoreTile;
    const int64_t queries = int64_t(keys.query.size());
    if (queries <= per_block || n0 >= keys.N) continue;
    const int64_t count = std::min(kScoreTile, keys.N - n0);
    work.sum.assign(kScoreTile, 0.0f);
    // The first query that sees the tile's first key opens the first block that matters.
    const int64_t start = std::max<int64_t>(0, n0 - keys.slots) / per_block * per_block;
    for (int64_t first = start; first < queries; first += per_block) {
      const int64_t tokens = std::min(per_block, queries - first);
      const int32_t* token = keys.query.data() + first;
      load_queries(p, token, tokens, b, head, width, work.q);
      work.logit.resize(tokens * G * kScoreTile);
      block_logits(p, keys, n0, count, first, tokens, p.slots.weight + row * p.slots.S,
                   work.q.data(), width, tile, work.logit.data(), kScoreTile);
      for (int64_t m = 0; m < tokens * G; ++m) {
        const int64_t at = (b * p.Q + head * G + m % G) * p.T + token[m / G];
        exp_and_sum(work.logit.data() + m * kScoreTile, count, p.softmax[2 * at]);
        factor[m] = power(p.decay, queries - 1 - (first + m / G)) * p.softmax[2 * at + 1];
      }
      add_columns(work.logit.data(), kScoreTile, tokens * G, count, factor.data(), work.sum.data());
    }
    write_scores(p, keys, row, n0, count, work.sum.data());
  }
}

}  // namespace

void chunk_attention(const ChunkAttentionParams& p, int64_t begin, int64_t end) {
  switch (p.slots.dtype) {
    case DType::f32:
      return attend<float>(p, begin, end);
    case DType::bf16:
      return attend<bf16>(p, begin, end);
    case DType::fp16:
      return attend<fp16>(p, begin, end);
    case DType::i8:
      return;  // no op lets it in
  }
}

void chunk_scores(const ChunkAttentionParams& p, int64_t begin, int64_t end) {
  switch (p.slots.dtype) {
    case DType::f32:
      return score<float>(p, begin, end);
    case DType::bf16:
      return score<bf16>(p, begin, end);
    case DType::fp16:
      return score<fp16>(p, begin, end);
    case DType::i8:
      return;  // no op lets it in
  }
}

}  // namespace less::cpu::LESS_ISA
