// The method once more, in double loops over whole arrays: what the kernels are held against.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/codec.h"
#include "common/half.h"
#include "params.h"

namespace less::naive {

inline double gelu(double x) { return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0))); }

// Rows of numbers as a kernel reads them, and the same numbers widened.
struct Rows {
  DType dtype = DType::f32;
  int64_t D = 0;
  std::vector<char> bytes;
  std::vector<float> scale;  // of each row, i8 alone
  std::vector<double> wide;

  Rows() = default;
  Rows(const std::vector<float>& x, DType type, int64_t row) : dtype(type), D(row) {
    const int64_t n = int64_t(x.size());
    wide.resize(n);
    switch (type) {
      case DType::f32:
        fill<float>(x);
        return;
      case DType::bf16:
        fill<bf16>(x);
        return;
      case DType::fp16:
        fill<fp16>(x);
        return;
      case DType::i8:
        break;
      case DType::fp8:  // on a GPU alone
      case DType::b4:   // encode()
      case DType::b3:
      case DType::b2:
        return;
    }
    bytes.resize(n);
    scale.resize(n / D);
    for (int64_t i = 0; i < n; ++i) {
      float& s = scale[i / D];
      if (i % D == 0) {
        float largest = 0.0f;
        for (int64_t d = i; d < i + D; ++d) largest = std::fmax(largest, std::fabs(x[d]));
        s = largest / 127.0f;
      }
      const int8_t eight = s > 0.0f ? from_float<int8_t>(x[i] / s) : int8_t(0);
      bytes[i] = char(eight);
      wide[i] = double(s) * eight;
    }
  }

  int64_t row_bytes() const { return int64_t(bytes.size()) / (int64_t(wide.size()) / D); }
  const double* row(int64_t i) const { return wide.data() + i * D; }
  float* scales() { return scale.empty() ? nullptr : scale.data(); }

 private:
  template <typename T>
  void fill(const std::vector<float>& x) {
    bytes.resize(x.size() * sizeof(T));
    T* to = reinterpret_cast<T*>(bytes.data());
    for (size_t i = 0; i < x.size(); ++i) {
      to[i] = from_float<T>(x[i]);
      wide[i] = to_float(to[i]);
    }
  }
};

// The codec's sum, in its order.
inline float ordered_sum(const std::vector<float>& x) {
  std::vector<float> lane(x.begin(), x.begin() + std::min<size_t>(x.size(), kCodecLanes));
  lane.resize(kCodecLanes, 0.0f);
  for (size_t i = kCodecLanes; i < x.size(); ++i) lane[i % kCodecLanes] += x[i];
  for (int half = kCodecLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// A packed row of x [D], and its scale.
inline uint16_t encode(DType dtype, const float* x, int64_t D, uint8_t* row) {
  const Levels& levels = levels_of(dtype);
  std::vector<float> terms(D), squares(D);
  float largest = 0.0f;
  for (int64_t d = 0; d < D; ++d) largest = std::max(largest, std::fabs(x[d]));
  largest *= clip_of(dtype, D);
  std::vector<int> code(D, 0);
  for (int64_t d = 0; d < D; ++d) {
    for (int i = 0; i + 1 < levels.count; ++i) code[d] += x[d] > largest * levels.threshold[i];
    terms[d] = x[d] * levels.value[code[d]];
    squares[d] = levels.value[code[d]] * levels.value[code[d]];
  }
  for (int64_t i = 0; i < row_bytes(dtype, D); ++i) {
    row[i] = packed_byte(dtype, D, i, [&](int64_t d) { return code[d]; });
  }
  const float scale = ordered_sum(terms) / ordered_sum(squares);
  return from_float<fp16>(scale > kLargestHalf ? kLargestHalf : scale).bits;
}

inline double decode(DType dtype, const uint8_t* row, uint16_t half, int64_t D, int64_t d) {
  const int code = code_at(dtype, row, D, d);
  return double(to_float(fp16{half})) * levels_of(dtype).value[code];
}

// A head's map at x [D], all weights float.
inline std::vector<double> features(const FeatureMaps& m, int64_t head, const double* x) {
  const float* w1 = static_cast<const float*>(m.w1) + head * m.D * m.E;
  const float* w2 = static_cast<const float*>(m.w2) + head * m.E * m.R;
  std::vector<double> hidden(m.E, 0.0), y(m.R, 0.0);
  for (int64_t d = 0; d < m.D; ++d) {
    for (int64_t e = 0; e < m.E; ++e) hidden[e] += x[d] * w1[d * m.E + e];
  }
  for (int64_t e = 0; e < m.E; ++e) {
    for (int64_t r = 0; r < m.R; ++r) y[r] += gelu(hidden[e]) * w2[e * m.R + r];
  }
  if (m.kind == MapKind::exp) {
    for (int64_t r = 0; r < m.R; ++r) {
      const double bias = m.bias == nullptr ? 0.0 : m.bias[head * m.R + r];
      y[r] = std::exp(std::fmin(15.0, std::fmax(-15.0, y[r] + bias)));
    }
    return y;
  }
  for (double& value : y) value = gelu(value);
  if (m.mix != nullptr) {
    std::vector<double> h = y;
    for (int64_t r = 0; r < m.R; ++r) h[r] *= std::fabs(m.scale[head * m.R + r]);
    for (int64_t r = 0; r < m.R; ++r) {
      double mixed = 0.0;
      for (int64_t i = 0; i < m.R; ++i) mixed += h[i] * m.mix[(head * m.R + i) * m.R + r];
      y[r] = h[r] + mixed * m.mix_scale[head * m.R + r];
    }
  }
  for (double& value : y) value = std::fabs(value);
  return y;
}

// One kv head of one row through a call of T tokens: attend, score, then choose who stays.
struct Head {
  struct Token {
    const double* k;
    const double* v;
    double weight, score;
    int64_t position;
    int64_t source;  // slot, or S + index in the call
    double rank = 0.0;
  };

  std::vector<Token> tokens;             // slots, then the call
  std::vector<std::vector<double>> out;  // [T * G][D]
  std::vector<double> share;             // [T * G]
  std::vector<std::vector<double>> H;    // [R][D]
  std::vector<double> z;                 // [R]
  std::vector<std::vector<double>> q;    // [T * G][D]
  std::vector<std::vector<double>> phi;  // [T * G][R]
  std::vector<Token> left;               // who leaves, oldest first

  // The last T of tokens are the call's.
  void attend(int64_t T, int64_t G, double scale, double softcap, double decay) {
    const int64_t N = int64_t(tokens.size()), D = int64_t(q[0].size());
    for (Token& t : tokens) t.score *= std::pow(decay, double(T));
    out.assign(T * G, std::vector<double>(D, 0.0));
    share.assign(T * G, 0.0);
    for (int64_t m = 0; m < T * G; ++m) {
      const int64_t visible = N - T + m / G + 1;
      std::vector<double> e(visible);
      double largest = -INFINITY, total = 0.0;
      for (int64_t n = 0; n < visible; ++n) {
        e[n] = 0.0;
        for (int64_t d = 0; d < D; ++d) e[n] += scale * q[m][d] * tokens[n].k[d];
        if (softcap != 0.0) e[n] = softcap * std::tanh(e[n] / softcap);
        e[n] += tokens[n].weight;
        largest = std::fmax(largest, e[n]);
      }
      for (double& value : e) total += value = std::exp(value - largest);
      double low = 0.0;
      for (size_t r = 0; r < z.size(); ++r) low += phi[m][r] * z[r] * std::exp(-largest);
      const double faded = std::pow(decay, double(T - 1 - m / G));
      for (int64_t n = 0; n < visible; ++n) {
        tokens[n].score += faded * e[n] / total;
        for (int64_t d = 0; d < D; ++d) out[m][d] += e[n] * tokens[n].v[d] / (total + low);
      }
      for (size_t r = 0; r < z.size(); ++r) {
        for (int64_t d = 0; d < D; ++d) {
          out[m][d] += phi[m][r] * H[r][d] * std::exp(-largest) / (total + low);
        }
      }
      share[m] = low / (total + low);
    }
  }

  // Of `tokens` the S best stay; n: tokens seen. Who leaves is folded by psi of its key.
  template <typename Psi>
  void compact(int64_t S, int64_t n, const Rule& rule, Psi psi) {
    for (Token& t : tokens) {
      t.rank = !rule.by_score ? -INFINITY : rule.per_age ? t.score / (n - t.position) : t.score;
      if (t.position >= n - rule.recent || t.position < rule.sinks) t.rank = INFINITY;
    }
    while (int64_t(tokens.size()) > S) {
      size_t lowest = 0;
      for (size_t i = 1; i < tokens.size(); ++i) {
        const Token &a = tokens[i], &b = tokens[lowest];
        if (a.rank < b.rank || (a.rank == b.rank && a.position < b.position)) lowest = i;
      }
      const Token leaver = tokens[lowest];
      tokens.erase(tokens.begin() + int64_t(lowest));
      left.push_back(leaver);
      if (z.empty()) continue;
      const std::vector<double> y = psi(leaver.k);
      for (size_t r = 0; r < z.size(); ++r) {
        z[r] += y[r];
        for (size_t d = 0; d < H[r].size(); ++d) H[r][d] += y[r] * leaver.v[d];
      }
    }
  }
};

}  // namespace less::naive
