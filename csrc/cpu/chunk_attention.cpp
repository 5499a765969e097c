// out = (phi H + sum e^l v) / (phi z + sum e^l),  l = scale q.k + weight, over the kept slots, the
// low-rank state and, causally, the call's tokens (with a soft-cap, l = softcap tanh(scale q.k /
// softcap) + weight); the state is one more part of the softmax, with
// log-mass log(phi z) and value phi H / phi z, so that every exponent is <= 0.
//
// chunk_attention: range (b, kv head, strip of query blocks). A block is the G query heads of
//   kAttentionBlock / G tokens; its rows lie in the lanes of panels (panel.h). Keys come in tiles:
//   logits, running maximum, e^(l - maximum), its sum and its product with v, tile by tile. Where
//   scores are wanted the e^(l - maximum) of a block's tiles stay until the sums are known, and are
//   then added up over the block's queries, so that no logit is computed twice.
// chunk_scores: range (b, kv head); adds up the strips, and writes every score.
// Memory: a tile of k and v is widened once per block, into the second-level cache; scratch is
//   O(1), with scores O(kAttentionBlock N), never T x T.
// Order: keys ascending (slots, then call), queries ascending; blocks and strips follow from what
//   the row itself holds: neither the thread count nor the rest of the batch changes a bit.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/arena.h"
#include "cpu/codec.h"
#include "cpu/features.h"
#include "cpu/notes.h"
#include "cpu/panel.h"
#include "cpu/softmax.h"
#include "cpu/state.h"

namespace less::cpu::LESS_ISA {
namespace {

constexpr int64_t kKeys = 96;  // keys per tile: a multiple of every kGroup

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a kv head of a row sees, in order: its kept slots, then the call's valid tokens. Nothing
// where the row has no page.
struct Keys {
  std::vector<int32_t> slot;
  std::vector<int32_t> token;
  Head head{};

  void gather(const ChunkAttentionParams& p, int64_t row) {
    slot.clear();
    token.clear();
    const int64_t b = row / p.spec.K;
    unsigned char* const own = page(p.pool, b);
    if (own == nullptr) return;
    head = less::head(p.layout, own, row % p.spec.K);
    for (int64_t s = 0; s < head.slots.S; ++s) {
      if (head.slots.position[s] >= 0) slot.push_back(int32_t(s));
    }
    const bool* valid = p.valid == nullptr ? nullptr : p.valid + b * p.T;
    for (int64_t t = 0; t < p.T; ++t) {
      if (valid == nullptr || valid[t]) token.push_back(int32_t(t));
    }
  }

  int64_t slots() const { return int64_t(slot.size()); }
  int64_t tokens() const { return int64_t(token.size()); }
  int64_t size() const { return slots() + tokens(); }
};

// How a row's queries are cut: into blocks, and those into strips of about the same work.
struct Cut {
  int64_t per_block;  // tokens
  int64_t tokens;
  int64_t slots;

  Cut(const ChunkAttentionParams& p, const Keys& keys)
      : per_block(std::max<int64_t>(1, kAttentionBlock / (p.spec.Q / p.spec.K))),
        tokens(keys.tokens()),
        slots(keys.slots()) {}

  int64_t blocks() const { return ceil_div(tokens, per_block); }
  int64_t strips() const { return std::min(kScoreStrips, blocks()); }
  // Keys seen by the first n blocks, added up; block i ends at token (i + 1) per_block.
  int64_t work(int64_t n) const { return n * slots + per_block * (n * (n + 1) / 2); }
  int64_t first_block(int64_t strip) const {
    int64_t n = 0;
    while (work(n) * strips() < strip * work(blocks())) ++n;
    return n;
  }
  // Keys that the first n blocks see.
  int64_t seen(int64_t n) const { return slots + std::min(n * per_block, tokens); }
};

// Up to kKeys rows: all slots, or all of the call.
struct Tile {
  int64_t first;        // of the row's keys
  int64_t count;        // 0: none
  const float* k;       // [count, D]
  const float* v;       // [count, D]
  const float* weight;  // [count], null: 0
};

// Rows index[i] - first, i < count, as floats: where they lie, or decoded into scratch.
const float* tile_rows(const Stored& rows, const int32_t* index, int64_t first, int64_t count,
                       int64_t D, float* scratch) {
  if (rows.dtype == DType::f32) {
    const bool dense =
        index[count - 1] - index[0] == count - 1 && rows.stride == row_bytes(DType::f32, D);
    if (dense || count == 1) {
      return reinterpret_cast<const float*>(rows.rows + (index[0] - first) * rows.stride);
    }
  }
  decode_rows(rows, count, [=](int64_t i) { return index[i] - first; }, D, scratch);
  return scratch;
}

// The same of slots, in ascending order: those below W are hot.
const float* tile_rows(const SlotRows& rows, const int32_t* index, int64_t count, int64_t D,
                       float* scratch) {
  const int64_t hot = std::lower_bound(index, index + count, rows.W) - index;
  if (hot == 0) return tile_rows(rows.cold, index, rows.W, count, D, scratch);
  if (hot == count) return tile_rows(rows.hot, index, 0, count, D, scratch);
  const auto row = [=](int64_t i) { return index[i]; };
  decode_rows(rows.hot, hot, row, D, scratch);
  const auto cold = [=, W = rows.W](int64_t i) { return index[hot + i] - W; };
  decode_rows(rows.cold, count - hot, cold, D, scratch + hot * D);
  return scratch;
}

// A panel's queries against a tile's keys.
struct PanelStep {
  const float* q;        // [D][kLanes]
  const float* visible;  // [kLanes]     keys that each query sees, of the tile; null: all
  const Tile& tile;
  int64_t keys;  // of the tile, that some query sees
  int64_t D;
  float scale;
  float softcap;
  float* p;      // [keys][kLanes]  e^(l - top); written
  float* top;    // [kLanes]        largest logit so far
  float* total;  // [kLanes]        sum of e^(l - top)
  float* out;    // [D][kLanes]     sum of e^(l - top) v
};

template <int kVecs, bool kCapped>
void attend_panel(const PanelStep& s) {
  constexpr int kV = Vec::kSize;
  Vec top[kVecs], shrink[kVecs], total[kVecs];
  for (int j = 0; j < kVecs; ++j) top[j] = Vec::load(s.top + j * kV);
  for_groups<kGroup<kVecs>>(s.keys, [&](auto group, int64_t n) {
    Vec l[group][kVecs];
    chained_products<group, kVecs>(s.tile.k + n * s.D, s.q, s.D, l);
    for (int i = 0; i < group; ++i) {
      const Vec weight(s.tile.weight == nullptr ? 0.0f : s.tile.weight[n + i]);
      for (int j = 0; j < kVecs; ++j) {
        if constexpr (kCapped) {
          l[i][j] = soft_cap(l[i][j] * Vec(s.scale), s.softcap) + weight;
        } else {
          l[i][j] = fma(l[i][j], Vec(s.scale), weight);
        }
      }
    }
    if (s.visible != nullptr) {
      for (int j = 0; j < kVecs; ++j) {
        const Vec visible = Vec::load(s.visible + j * kV);
        for (int i = 0; i < group; ++i) {
          l[i][j] = select(Vec(float(n + i)) < visible, l[i][j], Vec(-kInfinity));
        }
      }
    }
    for (int i = 0; i < group; ++i) {
      for (int j = 0; j < kVecs; ++j) {
        top[j] = max(top[j], l[i][j]);
        l[i][j].store(s.p + (n + i) * kLanes + j * kV);
      }
    }
  });
  for (int j = 0; j < kVecs; ++j) {
    shrink[j] = exp(Vec::load(s.top + j * kV) - top[j]);
    total[j] = Vec(0.0f);
  }
  for (int64_t n = 0; n < s.keys; ++n) {
    for (int j = 0; j < kVecs; ++j) {
      const Vec e = exp(Vec::load(s.p + n * kLanes + j * kV) - top[j]);
      e.store(s.p + n * kLanes + j * kV);
      total[j] = total[j] + e;
    }
  }
  for (int j = 0; j < kVecs; ++j) {
    top[j].store(s.top + j * kV);
    fma(Vec::load(s.total + j * kV), shrink[j], total[j]).store(s.total + j * kV);
  }
  for_groups<kGroup<kVecs>>(s.D, [&](auto group, int64_t d) {
    float* out = s.out + d * kLanes;
    Vec a[group][kVecs];
    zero(a);
    add_product<group, kVecs>(s.tile.v + d, 1, s.D, s.p, kLanes, s.keys, a);
    for (int i = 0; i < group; ++i) {
      for (int j = 0; j < kVecs; ++j) {
        float* o = out + i * kLanes + j * kV;
        fma(Vec::load(o), shrink[j], a[i][j]).store(o);
      }
    }
  });
}

template <bool kCapped>
void attend_panel(int vecs, const PanelStep& step) {
  if (vecs == 1) return attend_panel<1, kCapped>(step);
  attend_panel<kPanelVecs, kCapped>(step);
}

// The strips of one thread: what is in flight for a block, and scratch.
class Attention {
 public:
  explicit Attention(const ChunkAttentionParams& p)
      : p_(p),
        G_(p.spec.Q / p.spec.K),
        D_(p.spec.D),
        rows_(std::max(kAttentionBlock, G_)),
        panels_(ceil_div(rows_, kLanes)),
        tiles_(p.spec.scores ? ceil_div(p.layout.S, kKeys) + ceil_div(p.T, kKeys) : 1),
        arena_(Arena::size(kKeys * D_) * 2 + Arena::size(panels_ * D_ * kLanes) * 2 +
               Arena::size(tiles_ * panels_ * kKeys * kLanes) +
               Arena::size(tiles_ * panels_ * kLanes) + Arena::size(panels_ * kLanes) * 3 +
               Arena::size(kKeys) + Arena::size(kLanes) + Arena::size(D_ + Vec::kSize)),
        k_(arena_.take(kKeys * D_)),
        v_(arena_.take(kKeys * D_)),
        q_(arena_.take(panels_ * D_ * kLanes)),
        out_(arena_.take(panels_ * D_ * kLanes)),
        p_kept_(arena_.take(tiles_ * panels_ * kKeys * kLanes)),
        tile_top_(arena_.take(tiles_ * panels_ * kLanes)),
        top_(arena_.take(panels_ * kLanes)),
        total_(arena_.take(panels_ * kLanes)),
        factor_(arena_.take(panels_ * kLanes)),
        weight_(arena_.take(kKeys)),
        visible_(arena_.take(kLanes)),
        row_out_(arena_.take(D_ + Vec::kSize)) {
    std::fill(row_out_, row_out_ + D_ + Vec::kSize, 0.0f);
  }

  void run(int64_t row, int64_t strip) {
    if (row != row_) keys_.gather(p_, row);
    row_ = row;
    b_ = row / p_.spec.K;
    kv_ = row % p_.spec.K;
    if (strip == 0) write_padding();
    const Cut cut(p_, keys_);
    if (strip >= cut.strips()) return;
    const int64_t begin = cut.first_block(strip), end = cut.first_block(strip + 1);
    float* received = nullptr;
    if (p_.spec.scores) {
      received = p_.received + (row * p_.strips + strip) * (p_.layout.S + p_.T);
      std::fill(received, received + cut.seen(end), 0.0f);
    }
    for (int64_t block = begin; block < end; ++block) {
      first_ = block * cut.per_block;
      tokens_ = std::min(cut.per_block, cut.tokens - first_);
      attend(cut.seen(block + 1), received);
    }
  }

 private:
  int64_t lanes() const { return tokens_ * G_; }
  int64_t panels() const { return ceil_div(lanes(), kLanes); }
  // Vectors of a panel that hold queries.
  int vecs(int64_t panel) const { return lanes() - panel * kLanes <= Vec::kSize ? 1 : kPanelVecs; }
  // Keys, of all, that lane m sees; lanes are token-major, m = i G + g.
  int64_t seen(int64_t m) const { return keys_.slots() + first_ + m / G_ + 1; }
  // Keys of a tile that a panel sees.
  int64_t seen(int64_t panel, const Tile& tile) const {
    const int64_t most = seen(std::min(lanes(), (panel + 1) * kLanes) - 1);
    return std::clamp<int64_t>(most - tile.first, 0, tile.count);
  }

  void attend(int64_t N, float* received) {
    load_queries();
    for (int64_t first = 0, t = 0; first < N; ++t) {
      const Tile tile = load_tile(first, N);
      const int64_t kept = p_.spec.scores ? t : 0;
      for (int64_t panel = 0; panel < panels(); ++panel) attend_tile(panel, tile, kept);
      if (p_.spec.scores)
        std::copy(top_, top_ + panels() * kLanes, tile_top_ + t * panels_ * kLanes);
      first += tile.count;
    }
    write_outputs();
    if (received != nullptr) add_columns(N, received);
  }

  void load_queries() {
    std::fill(q_, q_ + panels() * D_ * kLanes, 0.0f);
    std::fill(out_, out_ + panels() * D_ * kLanes, 0.0f);
    std::fill(top_, top_ + panels() * kLanes, -FLT_MAX);
    std::fill(total_, total_ + panels() * kLanes, 0.0f);
    for (int64_t m = 0; m < lanes(); ++m) {
      const int64_t at = offset(p_.q, b_, kv_ * G_ + m % G_, keys_.token[first_ + m / G_]);
      widen(p_.q.data, p_.q.dtype, at, D_, row_out_);
      put_lane(row_out_, D_, m % kLanes, q_ + m / kLanes * D_ * kLanes);
    }
  }

  // Where the tile of key `first` begins and ends: no tile holds slots and tokens of the call.
  Tile cut_tile(int64_t first, int64_t N) const {
    const int64_t slots = keys_.slots(), end = first < slots ? slots : N;
    return {first, std::min(kKeys, end - first), nullptr, nullptr, nullptr};
  }

  Tile load_tile(int64_t first, int64_t N) {
    Tile tile = cut_tile(first, N);
    const int64_t slots = keys_.slots();
    if (first < slots) {
      const Slots& kept = keys_.head.slots;
      const int32_t* index = keys_.slot.data() + first;
      tile.k = tile_rows(key_rows(p_.layout, kept), index, tile.count, D_, k_);
      tile.v = tile_rows(value_rows(p_.layout, kept), index, tile.count, D_, v_);
      if (has_weights(kept)) {
        for (int64_t n = 0; n < tile.count; ++n) weight_[n] = log_weight_at(kept, index[n]);
        tile.weight = weight_;
      }
    } else {
      const int32_t* index = keys_.token.data() + (first - slots);
      const int64_t K = p_.spec.K, T = p_.T;
      const Stored k = call_rows(p_.call.k, p_.call.k_scale, b_, kv_, K, T);
      const Stored v = call_rows(p_.call.v, p_.call.v_scale, b_, kv_, K, T);
      tile.k = tile_rows(k, index, 0, tile.count, D_, k_);
      tile.v = tile_rows(v, index, 0, tile.count, D_, v_);
    }
    return tile;
  }

  void attend_tile(int64_t panel, const Tile& tile, int64_t kept) {
    const int64_t keys = seen(panel, tile);
    if (keys == 0) return;
    const bool masked = seen(panel * kLanes) - tile.first < keys;
    if (masked) {
      for (int64_t m = 0; m < kLanes; ++m) {
        visible_[m] = float(seen(panel * kLanes + m) - tile.first);
      }
    }
    const PanelStep step{
        .q = q_ + panel * D_ * kLanes,
        .visible = masked ? visible_ : nullptr,
        .tile = tile,
        .keys = keys,
        .D = D_,
        .scale = p_.spec.scale,
        .softcap = p_.spec.softcap,
        .p = p_kept_ + (kept * panels_ + panel) * kKeys * kLanes,
        .top = top_ + panel * kLanes,
        .total = total_ + panel * kLanes,
        .out = out_ + panel * D_ * kLanes,
    };
    if (p_.spec.softcap != 0.0f) return attend_panel<true>(vecs(panel), step);
    attend_panel<false>(vecs(panel), step);
  }

  // out and share of the block's queries; and factor: what a query's weight counts in a score.
  void write_outputs() {
    const State& state = keys_.head.state;
    const int64_t R = p_.layout.R;
    std::fill(factor_, factor_ + panels() * kLanes, 0.0f);
    float fade = 1.0f;
    for (int64_t m = 0; m < lanes(); ++m) {
      const int64_t i = first_ + m / G_;
      if (m % G_ == 0) fade = power(p_.spec.decay, keys_.tokens() - 1 - i);
      const int64_t query = kv_ * G_ + m % G_, token = keys_.token[i];
      const int64_t at = (b_ * p_.spec.Q + query) * p_.T + token;
      const float inverse = 1.0f / total_[m];
      factor_[m] = fade * inverse;
      take_lane(out_ + m / kLanes * D_ * kLanes, D_, m % kLanes, row_out_);
      for_each(row_out_, D_, [inverse](Vec x, int64_t, int) { return x * Vec(inverse); });
      float share = 0.0f;
      if (p_.phi_q != nullptr) {
        const float* const phi = p_.phi_q + at * (R + p_.shifted);
        const float top = p_.shifted ? top_[m] + phi[R] : top_[m];
        share = merge_state(phi, state.H, state.z, R, D_, top, total_[m], row_out_);
      }
      p_.share[at] = share;
      narrow(row_out_, D_, p_.out.dtype, offset(p_.out, b_, query, token), p_.out.data);
    }
  }

  // received[n] += sum over the block's queries of factor e^(l - top), from what is kept of tiles.
  void add_columns(int64_t N, float* received) {
    for (int64_t first = 0, t = 0; first < N; ++t) {
      const Tile tile = cut_tile(first, N);
      float* factor = tile_top_ + t * panels_ * kLanes;
      for (int64_t m = 0; m < panels() * kLanes; m += Vec::kSize) {
        const Vec since = exp(Vec::load(factor + m) - Vec::load(top_ + m));
        (since * Vec::load(factor_ + m)).store(factor + m);
      }
      const float* p = p_kept_ + t * panels_ * kKeys * kLanes;
      int64_t from = 0;  // the first panel that sees key n
      for (int64_t n = 0; n < tile.count; ++n) {
        while (seen(from, tile) <= n) ++from;
        Vec sum_of_key(0.0f);
        for (int64_t panel = from; panel < panels(); ++panel) {
          for (int j = 0; j < vecs(panel); ++j) {
            const int64_t lane = j * Vec::kSize;
            sum_of_key = fma(Vec::load(factor + panel * kLanes + lane),
                             Vec::load(p + (panel * kKeys + n) * kLanes + lane), sum_of_key);
          }
        }
        received[first + n] += sum(sum_of_key);
      }
      first += tile.count;
    }
  }

  // 0 for the tokens that the head does not see.
  void write_padding() {
    if (keys_.tokens() == p_.T) return;
    auto seen = keys_.token.begin();
    for (int64_t t = 0; t < p_.T; ++t) {
      if (seen != keys_.token.end() && *seen == t) {
        ++seen;
        continue;
      }
      for (int64_t query = kv_ * G_; query < (kv_ + 1) * G_; ++query) {
        clear_row(p_.out, b_, query, t, D_);
        p_.share[(b_ * p_.spec.Q + query) * p_.T + t] = 0.0f;
      }
    }
  }

  const ChunkAttentionParams& p_;
  const int64_t G_;
  const int64_t D_;
  const int64_t rows_;    // of a block, at most
  const int64_t panels_;  // of a block, at most
  const int64_t tiles_;   // whose e^(l - top) are kept
  Arena arena_;
  float* const k_;         // [kKeys, D]
  float* const v_;         // [kKeys, D]
  float* const q_;         // [panels][D][kLanes]
  float* const out_;       // [panels][D][kLanes]
  float* const p_kept_;    // [tiles][panels][kKeys][kLanes]
  float* const tile_top_;  // [tiles][panels][kLanes]  what each tile's p_kept_ is relative to
  float* const top_;       // [panels][kLanes]
  float* const total_;     // [panels][kLanes]
  float* const factor_;    // [panels][kLanes]
  float* const weight_;    // [kKeys]
  float* const visible_;   // [kLanes]
  float* const row_out_;   // [D], padded to whole vectors
  Keys keys_;
  int64_t row_ = -1;  // b * K + kv head
  int64_t b_ = 0;
  int64_t kv_ = 0;
  int64_t first_ = 0;   // of the block's tokens
  int64_t tokens_ = 0;  // of the block
};

}  // namespace

void chunk_attention(const ChunkAttentionParams& p, int64_t begin, int64_t end) {
  Attention attention(p);
  for (int64_t item = begin; item < end; ++item) attention.run(item / p.strips, item % p.strips);
}

void chunk_scores(const ChunkAttentionParams& p, int64_t begin, int64_t end) {
  const int64_t S = p.layout.S;
  Keys keys;
  for (int64_t row = begin; row < end; ++row) {
    float* slot_score = p.score + row * (S + p.T);
    float* call_score = slot_score + S;
    keys.gather(p, row);
    std::fill(slot_score, call_score + p.T, 0.0f);
    const Slots& slots = keys.head.slots;
    const float kept = p.spec.scores ? power(p.spec.decay, keys.tokens()) : 1.0f;
    for (int32_t s : keys.slot) slot_score[s] = score_at(slots, s) * kept;
    if (!p.spec.scores) continue;
    const Cut cut(p, keys);
    for (int64_t strip = 0; strip < cut.strips(); ++strip) {
      const float* received = p.received + (row * p.strips + strip) * (S + p.T);
      const int64_t N = cut.seen(cut.first_block(strip + 1));
      for (int64_t n = 0; n < keys.slots(); ++n) slot_score[keys.slot[n]] += received[n];
      for (int64_t n = keys.slots(); n < N; ++n) {
        call_score[keys.token[n - keys.slots()]] += received[n];
      }
    }
  }
}

}  // namespace less::cpu::LESS_ISA
