// One layer of one text: what a bounded cache would have answered, token by token.
//
//   out[h,t] = softmax(scale q[h,t] . rows + log-weights) rows     over what is held at step t
//
// With a low-rank state the part phi[h,t] z joins that softmax, its value phi[h,t] H / phi[h,t] z.
// Features stand in the coordinates of the rows: where these lie in a space whose key mean m was
// taken off, the logits lack scale q.m, and so must log(phi z).
//
// A row is held as the numbers that its format stands for, so every format costs the same time, and
// nothing is packed. A token comes in as a hot row; it turns cold when `hot` later ones have come,
// and competes for the cold slots then. Who leaves is forgotten, or its mean with the row that
// costs least takes that row's slot. Heads are independent of each other.
//
// Memory: keys lie one dim after the other, [D][columns], so that a dim of the query meets 16
// columns in one vector; values lie row by row.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

// How the numbers of a row are rounded. Filled by native.py, field by field.
struct Quantizer {
  int32_t kind;        // Kind
  int32_t levels;      // kTable: how many
  int32_t group;       // kTable: numbers per scale; divides D
  int32_t by_max;      // kTable: rows are cut by their largest number, else by their rms
  int32_t fit;         // kTable: Fit
  float unit;          // kTable: the part of that which a level of 1 stands for
  const float* level;  // kTable: [levels], ascending
};

struct Simulation {
  int32_t Q, K, T, D;
  int32_t sinks;       // first tokens that stay hot for good
  int32_t hot;         // last tokens that are hot; 0: a token turns cold as it comes
  int32_t protect;     // the policy: first tokens that do not leave
  int32_t half_score;  // scores are held in fp16
  int32_t merge;       // who leaves joins another row
  int32_t R;           // rank of the low-rank state; 0: there is none
  float decay, scale;
  Quantizer hot_rows, cold_k, cold_v;
  const int32_t* cold;    // [K] cold slots
  const int32_t* recent;  // [K] the policy: last tokens that do not leave
  const float* q;         // [Q, T, D]
  const float* k;         // [K, T, D]
  const float* v;         // [K, T, D]
  const float* phi;       // [Q, T, R] features of the queries
  const float* psi;       // [K, T, R] features of the keys
  float* out;             // [Q, T, D]
  double* error;          // [2]: sums of squares that encoding cold rows left of keys and of values
  double* power;          // [2]: sums of squares of those rows
};

namespace {

enum Kind { kExact, kHalf, kBrain, kInt8, kTable };
enum Fit { kNone, kSquare, kProduct };
constexpr int kLanes = 16;
constexpr int kQueries = 4;  // query heads that share one pass over the rows
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLeastWeight = 1e-6f;  // what a merge adds to scores, so that none weighs nothing

typedef float Lanes __attribute__((vector_size(4 * kLanes)));

inline float half(float x) { return static_cast<float>(static_cast<_Float16>(x)); }

inline float half_scale(float x) { return x > 65504.f ? 65504.f : half(x); }

inline float brain(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Sums of a row in the order that every backend keeps: 16 lanes, then lanes pairwise. Products are
// rounded before they are added: the build's -ffp-contract=off, and fused() where that is wanted.
template <class Term>
float ordered_sum(int n, Term term) {
  float lane[kLanes] = {};
  for (int d = 0; d < n; ++d) lane[d % kLanes] += term(d);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
  }
  return lane[0];
}

void round_group(const Quantizer& f, const float* x, int n, float* y) {
  float unit = 0;
  if (f.by_max) {
    for (int d = 0; d < n; ++d) unit = std::max(unit, std::fabs(x[d]));
  } else {
    unit = std::sqrt(ordered_sum(n, [&](int d) { return x[d] * x[d]; }) / static_cast<float>(n));
  }
  if (!(unit > 0)) {
    std::fill(y, y + n, unit);  // 0, or NaN
    return;
  }
  unit *= f.unit;
  float threshold[256];
  for (int i = 0; i + 1 < f.levels; ++i) {
    threshold[i] = 0.5f * (f.level[i] + f.level[i + 1]) * unit;
  }
  for (int d = 0; d < n; ++d) {
    int code = 0;
    for (int i = 0; i + 1 < f.levels; ++i) code += x[d] > threshold[i];
    y[d] = f.level[code];
  }
  float scale = unit;
  if (f.fit != kNone) {
    const float match = ordered_sum(n, [&](int d) { return x[d] * y[d]; });
    const bool square = f.fit == kSquare;
    const float norm =
        ordered_sum(n, [&](int d) { return (square ? y[d] : x[d]) * (square ? y[d] : x[d]); });
    scale = square ? (norm > 0 ? match / norm : 0.f) : (match > 0 ? norm / match : 0.f);
  }
  scale = half_scale(scale);
  for (int d = 0; d < n; ++d) y[d] *= scale;
}

void round_row(const Quantizer& f, const float* x, int D, float* y) {
  if (f.kind == kExact) {
    std::copy(x, x + D, y);
  } else if (f.kind == kHalf) {
    for (int d = 0; d < D; ++d) y[d] = half(x[d]);
  } else if (f.kind == kBrain) {
    for (int d = 0; d < D; ++d) y[d] = brain(x[d]);
  } else if (f.kind == kInt8) {
    float largest = 0;
    for (int d = 0; d < D; ++d) largest = std::max(largest, std::fabs(x[d]));
    const float scale = largest / 127.f;
    for (int d = 0; d < D; ++d) y[d] = scale > 0 ? std::nearbyint(x[d] / scale) * scale : scale;
  } else {
    for (int d = 0; d < D; d += f.group) round_group(f, x + d, std::min(f.group, D - d), y + d);
  }
}

inline Lanes fused(Lanes a, float b, Lanes c) {
  for (int j = 0; j < kLanes; ++j) c[j] = __builtin_fmaf(a[j], b, c[j]);
  return c;
}

// e^x for x <= 0, to 2 in 10^7.
inline float exp_of(float x) {
  x = std::max(x, -87.f);
  const float n = std::rint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Aligned = std::unique_ptr<float[], Free>;

Aligned aligned(size_t numbers) {
  void* p = std::aligned_alloc(64, (numbers * sizeof(float) + 63) / 64 * 64);
  std::memset(p, 0, numbers * sizeof(float));
  return Aligned(static_cast<float*>(p));
}

// What a query head's softmax makes of the rows: the largest logit, and the masses' sum.
struct Part {
  float top, total;
};

int rounded_up(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The rows of one kv head. Columns 0 .. count-1 are held, in no order.
class Head {
 public:
  Head(const Simulation& s, int head)
      : s_(s),
        head_(head),
        cold_slots_(s.cold[head]),
        recent_(s.recent[head]),
        room_(rounded_up(std::min<int64_t>(s.T, int64_t{s.sinks} + s.hot + s.cold[head] + 1))),
        width_(rounded_up(s.D)),
        keys_(aligned(static_cast<size_t>(room_) * s.D)),
        values_(aligned(static_cast<size_t>(room_) * width_)),
        mass_(aligned(static_cast<size_t>(room_) * kQueries)),
        received_(aligned(room_)),
        score_(aligned(room_)),
        weight_(aligned(room_)),
        distance_(aligned(room_)),
        z_(s.R),
        H_(aligned(static_cast<size_t>(s.R) * width_)),
        position_(room_),
        is_cold_(room_),
        column_(s.T),
        row_(s.D) {}

  void run() {
    for (int t = 0; t < s_.T; ++t) {
      add(t);
      std::fill(&received_[0], &received_[0] + room_, 0.f);
      const int G = s_.Q / s_.K;
      for (int g = 0; g < G; g += kQueries) {
        switch (std::min(kQueries, G - g)) {
          case 1:
            attend<1>(head_ * G + g, t);
            break;
          case 2:
            attend<2>(head_ * G + g, t);
            break;
          case 3:
            attend<3>(head_ * G + g, t);
            break;
          default:
            attend<4>(head_ * G + g, t);
        }
      }
      for (int i = 0; i < count_; ++i) {
        score_[i] = score_[i] * s_.decay + received_[i];
        if (s_.half_score) score_[i] = half(score_[i]);
      }
      const int leaver = t - s_.hot;
      if (leaver < s_.sinks) continue;
      cool(column_[leaver]);
      if (cold_ > cold_slots_) evict(t + 1);
    }
  }

 private:
  const float* key(int t) const { return s_.k + (static_cast<int64_t>(head_) * s_.T + t) * s_.D; }
  const float* value(int t) const { return s_.v + (static_cast<int64_t>(head_) * s_.T + t) * s_.D; }

  void set_key(int i, const float* x) {
    for (int d = 0; d < s_.D; ++d) keys_[static_cast<int64_t>(d) * room_ + i] = x[d];
  }

  void get_key(int i, float* x) const {
    for (int d = 0; d < s_.D; ++d) x[d] = keys_[static_cast<int64_t>(d) * room_ + i];
  }

  float* value_of(int i) { return &values_[static_cast<int64_t>(i) * width_]; }

  void add(int t) {
    const int i = count_++;
    const bool once_hot = s_.sinks + s_.hot > 0;
    round_row(once_hot ? s_.hot_rows : s_.cold_k, key(t), s_.D, row_.data());
    set_key(i, row_.data());
    round_row(once_hot ? s_.hot_rows : s_.cold_v, value(t), s_.D, value_of(i));
    score_[i] = weight_[i] = 0;
    position_[i] = t;
    is_cold_[i] = false;
    column_[t] = i;
  }

  void cool(int i) {
    is_cold_[i] = true;
    ++cold_;
    if (s_.sinks + s_.hot == 0) {  // it came in this way
      return;
    }
    std::vector<float> x(s_.D);
    get_key(i, x.data());
    round_row(s_.cold_k, x.data(), s_.D, row_.data());
    count_error(0, x.data(), row_.data());
    set_key(i, row_.data());
    std::copy(value_of(i), value_of(i) + s_.D, x.data());
    round_row(s_.cold_v, x.data(), s_.D, value_of(i));
    count_error(1, x.data(), value_of(i));
  }

  void count_error(int which, const float* x, const float* y) {
    for (int d = 0; d < s_.D; ++d) {
      s_.error[which] += static_cast<double>(x[d] - y[d]) * (x[d] - y[d]);
      s_.power[which] += static_cast<double>(x[d]) * x[d];
    }
  }

  float rank(int i, int seen) const {
    const int p = position_[i];
    return p >= seen - recent_ || p < s_.protect ? kInfinity : score_[i];
  }

  // The cold row of lowest rank leaves; of equals the older.
  void evict(int seen) {
    int lowest = -1;
    float least = 0;
    for (int i = 0; i < count_; ++i) {
      if (!is_cold_[i]) continue;
      const float mine = rank(i, seen);
      if (lowest < 0 || mine < least || (mine == least && position_[i] < position_[lowest])) {
        lowest = i;
        least = mine;
      }
    }
    if (s_.merge) {
      const int j = target(lowest, seen);
      if (j >= 0) merge(lowest, j);
    }
    if (s_.R > 0) fold(lowest);
    drop(lowest);
  }

  float joining_weight(int i) const { return score_[i] + kLeastWeight; }

  // Column that row i joins at the least cost; of equals the older; -1: all others are protected.
  int target(int i, int seen) {
    get_key(i, row_.data());
    for (int j = 0; j < rounded_up(count_); j += kLanes) {
      Lanes sum = {};
      const float* base = &keys_[j];
      for (int d = 0; d < s_.D; ++d, base += room_) {
        const Lanes apart = *reinterpret_cast<const Lanes*>(base) - row_[d];
        sum += apart * apart;
      }
      std::memcpy(&distance_[j], &sum, sizeof(Lanes));
    }
    const float a = joining_weight(i);
    int nearest = -1;
    float least = 0;
    for (int j = 0; j < count_; ++j) {
      if (j == i || !is_cold_[j] || rank(j, seen) == kInfinity) continue;
      const float b = joining_weight(j), cost = a * b / (a + b) * distance_[j];
      if (std::isnan(cost)) continue;
      if (nearest < 0 || cost < least || (cost == least && position_[j] < position_[nearest])) {
        nearest = j;
        least = cost;
      }
    }
    return nearest;
  }

  void merge(int i, int j) {
    const float a = joining_weight(i) / (joining_weight(i) + joining_weight(j));
    std::vector<float> x(s_.D), y(s_.D);
    get_key(i, x.data());
    get_key(j, y.data());
    for (int d = 0; d < s_.D; ++d) y[d] += a * (x[d] - y[d]);
    round_row(s_.cold_k, y.data(), s_.D, row_.data());
    set_key(j, row_.data());
    const float* v = value_of(i);
    std::copy(value_of(j), value_of(j) + s_.D, y.data());
    for (int d = 0; d < s_.D; ++d) y[d] += a * (v[d] - y[d]);
    round_row(s_.cold_v, y.data(), s_.D, value_of(j));
    weight_[j] = std::log(std::exp(weight_[j]) + std::exp(weight_[i]));
    score_[j] += score_[i];
    if (s_.half_score) score_[j] = half(score_[j]);
    position_[j] = std::max(position_[j], position_[i]);
  }

  // A row is one token here: merging and folding exclude each other.
  void fold(int i) {
    const float* psi = s_.psi + (static_cast<int64_t>(head_) * s_.T + position_[i]) * s_.R;
    const float* v = value_of(i);
    for (int r = 0; r < s_.R; ++r) {
      z_[r] += psi[r];
      for (int d = 0; d < s_.D; ++d) H_[static_cast<int64_t>(r) * width_ + d] += psi[r] * v[d];
    }
  }

  void drop(int i) {
    const int last = --count_;
    --cold_;
    if (i == last) return;
    get_key(last, row_.data());
    set_key(i, row_.data());
    std::copy(value_of(last), value_of(last) + s_.D, value_of(i));
    score_[i] = score_[last];
    weight_[i] = weight_[last];
    position_[i] = position_[last];
    is_cold_[i] = is_cold_[last];
    if (!is_cold_[i]) column_[position_[i]] = i;
  }

  // Turns products into masses and adds what each row receives to `received_`.
  Part soften(float* mass) {
    const int columns = rounded_up(count_);
    for (int i = 0; i < count_; ++i) mass[i] = mass[i] * s_.scale + weight_[i];
    std::fill(mass + count_, mass + columns, -kInfinity);
    Lanes tops = -kInfinity + Lanes{};
    for (int i = 0; i < columns; i += kLanes) {
      const Lanes x = *reinterpret_cast<const Lanes*>(mass + i);
      tops = x > tops ? x : tops;
    }
    float top = -kInfinity;
    for (int j = 0; j < kLanes; ++j) top = std::max(top, tops[j]);
    for (int i = 0; i < count_; ++i) mass[i] = exp_of(mass[i] - top);
    std::fill(mass + count_, mass + columns, 0.f);
    Lanes totals = {};
    for (int i = 0; i < columns; i += kLanes) totals += *reinterpret_cast<const Lanes*>(mass + i);
    double total = 0;
    for (int j = 0; j < kLanes; ++j) total += totals[j];
    const float inverse = static_cast<float>(1 / total);
    for (int i = 0; i < count_; ++i) received_[i] += mass[i] * inverse;
    return {top, static_cast<float>(total)};
  }

  // N query heads from `first` on, which share the rows.
  template <int N>
  void attend(int first, int t) {
    const int columns = rounded_up(count_);
    const float* query[N];
    for (int g = 0; g < N; ++g)
      query[g] = s_.q + (static_cast<int64_t>(first + g) * s_.T + t) * s_.D;
    for (int i = 0; i < columns; i += kLanes) {
      Lanes sum[N] = {};
      const float* base = &keys_[i];
      for (int d = 0; d < s_.D; ++d, base += room_) {
        const Lanes row = *reinterpret_cast<const Lanes*>(base);
        for (int g = 0; g < N; ++g) sum[g] = fused(row, query[g][d], sum[g]);
      }
      for (int g = 0; g < N; ++g) std::memcpy(&mass_[g * room_ + i], &sum[g], sizeof(Lanes));
    }
    Part part[N];
    for (int g = 0; g < N; ++g) part[g] = soften(&mass_[static_cast<int64_t>(g) * room_]);
    for (int d = 0; d < width_; d += kLanes) {
      Lanes sum[N] = {};
      const float* base = &values_[d];
      for (int i = 0; i < count_; ++i, base += width_) {
        const Lanes row = *reinterpret_cast<const Lanes*>(base);
        for (int g = 0; g < N; ++g) sum[g] = fused(row, mass_[g * room_ + i], sum[g]);
      }
      for (int g = 0; g < N; ++g) {
        float* out = out_of(first + g, t);
        const float inverse = 1 / part[g].total;
        for (int j = 0; j < std::min(kLanes, s_.D - d); ++j) out[d + j] = sum[g][j] * inverse;
      }
    }
    for (int g = 0; s_.R > 0 && g < N; ++g) add_state(first + g, t, part[g]);
  }

  float* out_of(int query, int t) const {
    return s_.out + (static_cast<int64_t>(query) * s_.T + t) * s_.D;
  }

  // Merges the state's part into an output that is that of the rows.
  void add_state(int query, int t, const Part& rows) {
    const float* phi = s_.phi + (static_cast<int64_t>(query) * s_.T + t) * s_.R;
    float low = 0;
    for (int r = 0; r < s_.R; ++r) low += phi[r] * z_[r];
    if (!(low > 0)) return;
    const float log_low = std::log(low), top = std::max(rows.top, log_low);
    const float held = rows.total * std::exp(rows.top - top), folded = std::exp(log_low - top);
    float* out = out_of(query, t);
    for (int d = 0; d < s_.D; ++d) {
      float value = 0;
      for (int r = 0; r < s_.R; ++r) value += phi[r] * H_[static_cast<int64_t>(r) * width_ + d];
      out[d] = (held * out[d] + folded * value / low) / (held + folded);
    }
  }

  const Simulation& s_;
  const int head_, cold_slots_, recent_, room_, width_;
  const Aligned keys_, values_, mass_, received_, score_, weight_, distance_;
  std::vector<float> z_;
  const Aligned H_;  // [R, width]
  std::vector<int> position_;
  std::vector<char> is_cold_;
  std::vector<int> column_;  // of a hot token, by its position
  std::vector<float> row_;
  int count_ = 0, cold_ = 0;
};

}  // namespace

extern "C" void simulate(const Simulation* s) {
  for (int h = 0; h < s->K; ++h) Head(*s, h).run();
}

extern "C" void round_rows(const Quantizer* f, const float* x, int64_t rows, int32_t D, float* y) {
  for (int64_t i = 0; i < rows; ++i) round_row(*f, x + i * D, D, y + i * D);
}
