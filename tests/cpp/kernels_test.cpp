// The CPU kernels of every SIMD level that this machine runs, against double loops (naive.h).
//
// Needs no torch and no Python, so that it also runs where there is neither: on a machine that is
// emulated, or on a level whose instructions are. Shapes are odd on purpose: every tail is met.
#include "cpu/kernels.h"

#include <cstdio>
#include <cstring>
#include <random>
#include <string>

#include "cpu/dispatch.h"
#include "naive.h"

namespace less {
namespace {

using naive::Rows;

int failures = 0;
std::string where;  // what is being tested, for messages

void expect(bool right, const std::string& what) {
  if (right) return;
  ++failures;
  std::printf("FAILED %s: %s\n", where.c_str(), what.c_str());
}

void expect_close(double got, double wanted, double tolerance, const char* what, int64_t i) {
  if (std::fabs(got - wanted) <= tolerance * (1.0 + std::fabs(wanted))) return;
  expect(false, std::string(what) + "[" + std::to_string(i) + "] is " + std::to_string(got) +
                    ", wanted " + std::to_string(wanted));
}

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}

  std::vector<float> normal(int64_t n, float scale = 1.0f) {
    std::normal_distribution<float> distribution(0.0f, scale);
    std::vector<float> x(n);
    for (float& value : x) value = distribution(engine_);
    return x;
  }
  std::vector<float> positive(int64_t n) {
    std::uniform_real_distribution<float> distribution(0.1f, 1.0f);
    std::vector<float> x(n);
    for (float& value : x) value = distribution(engine_);
    return x;
  }

 private:
  std::mt19937 engine_;
};

const char* name(DType dtype) {
  constexpr const char* kNames[] = {"f32", "bf16", "fp16", "i8"};
  return kNames[int(dtype)];
}

// -- simd.h ---------------------------------------------------------------------------------------

template <typename In, typename Out>
std::vector<Out> simd(SimdTest what, const std::vector<In>& x) {
  std::vector<Out> y(x.size());
  cpu::simd_test({what, x.data(), y.data()}, 0, int64_t(x.size()));
  return y;
}

template <typename T>
void test_half(SimdTest from, SimdTest to) {
  std::vector<T> halves;
  for (uint32_t bits = 0; bits < 1u << 16; ++bits) halves.push_back({uint16_t(bits)});
  const std::vector<float> wide = simd<T, float>(from, halves);
  for (size_t i = 0; i < halves.size(); ++i) {
    const float wanted = to_float(halves[i]);
    const bool nan = std::isnan(wanted);
    expect(nan ? std::isnan(wide[i]) : float_to_bits(wide[i]) == float_to_bits(wanted),
           "half " + std::to_string(i) + " widens wrongly");
  }
  std::vector<float> floats;
  for (uint64_t bits = 0; bits < 1ull << 32; bits += 9973) floats.push_back(bits_to_float(bits));
  for (uint64_t border = 0; border < 1ull << 32; border += 1 << 12) {
    for (int near = -1; near <= 1; ++near) floats.push_back(bits_to_float(uint32_t(border + near)));
  }
  const std::vector<T> narrow = simd<float, T>(to, floats);
  for (size_t i = 0; i < floats.size(); ++i) {
    const uint16_t wanted = from_float<T>(floats[i]).bits;
    const bool nan = std::isnan(floats[i]);
    expect(nan ? std::isnan(to_float(narrow[i])) : narrow[i].bits == wanted,
           "float " + std::to_string(float_to_bits(floats[i])) + " narrows wrongly");
  }
}

void test_simd() {
  test_half<bf16>(SimdTest::from_bf16, SimdTest::to_bf16);
  test_half<fp16>(SimdTest::from_fp16, SimdTest::to_fp16);
  std::vector<int8_t> eights;
  std::vector<float> x;
  for (int i = -128; i < 128; ++i) eights.push_back(int8_t(i));
  for (int i = -1040; i <= 1040; ++i) x.push_back(float(i) / 8.0f);
  const std::vector<float> wide = simd<int8_t, float>(SimdTest::from_i8, eights);
  for (int i = 0; i < 256; ++i) expect(wide[i] == float(i - 128), "an int8 widens wrongly");
  const std::vector<int8_t> narrow = simd<float, int8_t>(SimdTest::to_i8, x);
  for (size_t i = 0; i < x.size(); ++i) {
    expect(narrow[i] == from_float<int8_t>(x[i]), "to_i8 of " + std::to_string(x[i]));
  }
  x.clear();
  for (int i = -8800; i <= 8800; ++i) x.push_back(float(i) / 100.0f);
  const std::vector<float> e = simd<float, float>(SimdTest::exp, x);
  const std::vector<float> g = simd<float, float>(SimdTest::gelu, x);
  const std::vector<float> t = simd<float, float>(SimdTest::tanh, x);
  for (size_t i = 0; i < x.size(); ++i) {
    const double wanted = std::exp(double(x[i]));
    expect(std::fabs(e[i] - wanted) <= 2.4e-7 * wanted + 1.5e-45, "exp " + std::to_string(x[i]));
    const double close = naive::gelu(x[i]);
    expect(std::fabs(g[i] - close) <= 1e-6 + 6e-8 * std::fabs(close), "gelu of some x");
    const double bent = std::tanh(double(x[i]));
    expect(std::fabs(t[i] - bent) <= 2.4e-7 * std::fabs(bent), "tanh " + std::to_string(x[i]));
  }
  float width = 0.0f;
  cpu::simd_test({SimdTest::width, nullptr, &width}, 0, 0);
  x = Random(1).normal(4 * int64_t(width));
  float sums[4];
  cpu::simd_test({SimdTest::sums, x.data(), sums}, 0, int64_t(x.size()));
  for (int row = 0; row < 4; ++row) {
    const float* v = x.data() + row * int(width);
    double total = 0.0;
    float alone = 0.0f, largest = v[0];
    for (int i = 0; i < int(width); ++i) {
      total += v[i];
      largest = std::fmax(largest, v[i]);
    }
    expect_close(sums[row], total, 1e-6, "sums", row);
    cpu::simd_test({SimdTest::sum, v, &alone}, 0, int64_t(width));
    expect(alone == sums[row], "sum differs from sums");
    cpu::simd_test({SimdTest::max, v, &alone}, 0, int64_t(width));
    expect(alone == largest, "max_of");
  }
}

// -- building blocks ------------------------------------------------------------------------------

void test_fold(DType dtype) {
  const int64_t heads = 3, N = 9, R = 5, D = 43;
  Random random(2);
  std::vector<float> H = random.normal(heads * R * D), z = random.positive(heads * R);
  const std::vector<float> psi = random.positive(heads * N * R), H0 = H, z0 = z;
  const Rows v(random.normal(heads * N * D), dtype, D);
  bool keep[heads * N];
  for (int64_t i = 0; i < heads * N; ++i) keep[i] = i % 4 != 1;
  cpu::fold({H.data(), z.data(), psi.data(), v.bytes.data(), keep, dtype, heads, N, R, D}, 0,
            heads);
  for (int64_t row = 0; row < heads * R; ++row) {
    double mass = z0[row];
    std::vector<double> sum(H0.begin() + row * D, H0.begin() + (row + 1) * D);
    for (int64_t n = 0; n < N; ++n) {
      const int64_t token = row / R * N + n;
      const double weight = keep[token] ? psi[token * R + row % R] : 0.0;
      mass += weight;
      for (int64_t d = 0; d < D; ++d) sum[d] += weight * v.row(token)[d];
    }
    expect_close(z[row], mass, 1e-6, "z", row);
    for (int64_t d = 0; d < D; ++d) expect_close(H[row * D + d], sum[d], 1e-6, "H", row * D + d);
  }
}

void test_quantize(DType dtype) {
  const int64_t rows = 7, D = 43;
  const Rows x(Random(3).normal(rows * D), dtype, D);
  std::vector<float> exact(x.wide.begin(), x.wide.end()), scale(rows);
  std::fill(exact.begin(), exact.begin() + (dtype == DType::f32 ? D : 0), 0.0f);
  const Rows input(exact, dtype, D), wanted(exact, DType::i8, D);
  std::vector<int8_t> eight(rows * D, 99);
  cpu::quantize({input.bytes.data(), eight.data(), scale.data(), dtype, DType::i8, rows, D}, 0,
                rows);
  expect(scale == wanted.scale, "scales differ");
  expect(std::memcmp(eight.data(), wanted.bytes.data(), eight.size()) == 0, "rows differ");
}

// Random weights of `heads` maps, and the struct that points at them.
struct Maps {
  std::vector<float> w1, w2, bias, mix, scale, mix_scale;
  FeatureMaps maps{};

  Maps(Random& random, MapKind kind, bool psi, int64_t heads, int64_t D, int64_t E, int64_t R)
      : w1(random.normal(heads * D * E, 0.15f)),
        w2(random.normal(heads * E * R, 0.2f)),
        bias(random.normal(heads * R)),
        mix(random.normal(heads * R * R, 0.3f)),
        scale(random.normal(heads * R)),
        mix_scale(random.normal(heads * R)) {
    maps.w1 = w1.data();
    maps.w2 = w2.data();
    maps.kind = kind;
    maps.w_dtype = DType::f32;
    maps.D = D;
    maps.E = E;
    maps.R = R;
    if (kind == MapKind::exp) {
      maps.bias = bias.data();
    } else if (psi) {
      maps.mix = mix.data();
      maps.scale = scale.data();
      maps.mix_scale = mix_scale.data();
    }
  }
};

void test_feature_map(MapKind kind, bool psi, DType dtype) {
  const int64_t B = 2, heads = 3, T = 3, D = 43, E = 37, R = 5;
  Random random(4);
  const Maps m(random, kind, psi, heads, D, E, R);
  const Rows x(random.normal(B * heads * T * D), dtype, D);
  std::vector<float> y(B * heads * T * R, NAN);
  cpu::feature_map({m.maps, x.bytes.data(), y.data(), dtype, B, heads, T}, 0, B * heads * T);
  for (int64_t row = 0; row < B * heads * T; ++row) {
    const auto wanted = naive::features(m.maps, row / T % heads, x.row(row));
    for (int64_t r = 0; r < R; ++r) expect_close(y[row * R + r], wanted[r], 3e-6, "y", row * R + r);
  }
}

bool same_row(const Rows& a, int64_t i, const Rows& b, int64_t j) {
  const int64_t n = a.row_bytes();
  return std::memcmp(&a.bytes[i * n], &b.bytes[j * n], n) == 0 &&
         (a.scale.empty() || a.scale[i] == b.scale[j]);
}

// -- whole calls ----------------------------------------------------------------------------------

// A layer before a call, as arrays; `held` of its slots hold a token.
struct Layer {
  static constexpr int64_t B = 2, K = 2, G = 3, Q = K * G, D = 43, E = 21, R = 5, S = 37;
  int64_t T, held;
  Random random{5};
  Rows q, k, v, slot_k, slot_v;
  std::vector<int32_t> position;
  std::vector<float> score, weight, H, z, phi;
  std::vector<double> share;
  std::vector<int64_t> seen;
  Maps phi_maps{random, MapKind::exp, false, Q, D, E, R};
  Maps psi_maps{random, MapKind::exp, true, K, D, E, R};
  Rule rule{6, 2, true, false};
  float scale = 0.2f, decay = 0.97f;
  float softcap;

  Layer(DType dtype, int64_t tokens, int64_t held_slots, float cap)
      : T(tokens), held(held_slots), softcap(cap) {
    q = Rows(random.normal(B * Q * T * D), DType::f32, D);
    k = Rows(random.normal(B * K * T * D), dtype, D);
    v = Rows(random.normal(B * K * T * D), dtype, D);
    slot_k = Rows(random.normal(B * K * S * D), dtype, D);
    slot_v = Rows(random.normal(B * K * S * D), dtype, D);
    score = random.positive(B * K * S);
    weight = random.normal(B * K * S, 0.3f);
    H = random.normal(B * K * R * D);
    z = random.positive(B * K * R);
    share.assign(B * K, 0.0);
    seen.assign(B, 100);
    for (int64_t i = 0; i < B * K * S; ++i) {
      // Positions of every head's own order; the last S - held slots are empty.
      const bool empty = i % S >= held;
      position.push_back(empty ? -1 : int32_t((i % S * 7 + i / S) % S * 2));
      if (empty) score[i] = weight[i] = 0.0f;
    }
    for (int64_t row = 0; row < B * Q * T; ++row) {
      const auto y = naive::features(phi_maps.maps, row / T % Q, q.row(row));
      phi.insert(phi.end(), y.begin(), y.end());
    }
  }

  Slots slots() {
    return {slot_k.bytes.data(), slot_v.bytes.data(), slot_k.scales(),
            slot_v.scales(),     position.data(),     score.data(),
            weight.data(),       slot_k.dtype,        S};
  }

  naive::Head head(int64_t row) const {
    naive::Head h;
    const int64_t b = row / K;
    for (int64_t s = 0; s < S; ++s) {
      const int64_t i = row * S + s;
      if (position[i] < 0) continue;
      h.tokens.push_back({slot_k.row(i), slot_v.row(i), weight[i], score[i], position[i], s});
    }
    for (int64_t t = 0; t < T; ++t) {
      const int64_t i = row * T + t;
      h.tokens.push_back({k.row(i), v.row(i), 0.0, 0.0, seen[b] + t, S + t});
    }
    for (int64_t r = 0; r < R; ++r) {
      const float* from = H.data() + (row * R + r) * D;
      h.H.emplace_back(from, from + D);
      h.z.push_back(z[row * R + r]);
    }
    for (int64_t m = 0; m < T * G; ++m) {
      const int64_t at = query(row, m);
      h.q.emplace_back(q.row(at), q.row(at) + D);
      h.phi.emplace_back(phi.begin() + at * R, phi.begin() + (at + 1) * R);
    }
    return h;
  }

  // Row of q, out and phi of a kv head's m-th query, the token's queries together.
  int64_t query(int64_t row, int64_t m) const {
    return ((row / K * Q) + row % K * G + m % G) * T + m / G;
  }

  // This layer, after the call, against what it should have become.
  void expect_as(const Layer& before, int64_t row, const naive::Head& wanted) const {
    int64_t kept = 0;
    for (int64_t s = 0; s < S; ++s) kept += position[row * S + s] >= 0;
    expect(kept == int64_t(wanted.tokens.size()), "tokens were lost");
    for (const naive::Head::Token& t : wanted.tokens) {
      int64_t s = 0;
      while (s < S && position[row * S + s] != t.position) ++s;
      expect(s < S, "a token that stays is gone");
      if (s == S) return;
      expect(t.source >= S || t.source == s, "a token moved");
      expect_close(score[row * S + s], t.score, 2e-6, "score", s);
      const int64_t from = t.source >= S ? row * T + t.source - S : row * S + s;
      expect(same_row(slot_k, row * S + s, t.source >= S ? before.k : before.slot_k, from), "k");
      expect(same_row(slot_v, row * S + s, t.source >= S ? before.v : before.slot_v, from), "v");
    }
    for (int64_t r = 0; r < R; ++r) {
      expect_close(z[row * R + r], wanted.z[r], 5e-6, "z", r);
      for (int64_t d = 0; d < D; ++d) {
        expect_close(H[(row * R + r) * D + d], wanted.H[r][d], 3e-5, "H", r * D + d);
      }
    }
  }

  void expect_out(int64_t row, const naive::Head& wanted, const std::vector<float>& out) const {
    for (int64_t m = 0; m < T * G; ++m) {
      const int64_t at = query(row, m);
      for (int64_t d = 0; d < D; ++d)
        expect_close(out[at * D + d], wanted.out[m][d], 2e-6, "out", m);
    }
  }
};

void test_call(DType dtype, int64_t T, int64_t held, float softcap) {
  const Layer before(dtype, T, held, softcap);
  Layer after = before;
  constexpr int64_t B = Layer::B, K = Layer::K, Q = Layer::Q, G = Layer::G, D = Layer::D,
                    R = Layer::R, S = Layer::S;
  const int64_t per_block = std::max<int64_t>(1, kAttentionBlock / G);
  const int64_t strips = std::min(kScoreStrips, (T + per_block - 1) / per_block);
  std::vector<float> out(B * Q * T * D, NAN), slot_score(B * K * S, NAN);
  std::vector<float> chunk_score(B * K * T, NAN), share(B * Q * T, NAN);
  std::vector<float> received(B * K * strips * (S + T), NAN);
  const ChunkAttentionParams attention{.q = after.q.bytes.data(),
                                       .k = after.k.bytes.data(),
                                       .v = after.v.bytes.data(),
                                       .k_scale = after.k.scales(),
                                       .v_scale = after.v.scales(),
                                       .valid = nullptr,
                                       .slots = after.slots(),
                                       .phi_q = after.phi.data(),
                                       .H = after.H.data(),
                                       .z = after.z.data(),
                                       .out = out.data(),
                                       .slot_score = slot_score.data(),
                                       .chunk_score = chunk_score.data(),
                                       .share = share.data(),
                                       .received = received.data(),
                                       .workspace = nullptr,
                                       .q_dtype = DType::f32,
                                       .scores = true,
                                       .scale = after.scale,
                                       .softcap = after.softcap,
                                       .decay = after.decay,
                                       .strips = strips,
                                       .B = B,
                                       .Q = Q,
                                       .K = K,
                                       .T = T,
                                       .D = D,
                                       .R = R};
  cpu::chunk_attention(attention, 0, B * K * strips);
  cpu::chunk_scores(attention, 0, B * K);
  const CompactParams compact{.k = after.k.bytes.data(),
                              .v = after.v.bytes.data(),
                              .k_scale = after.k.scales(),
                              .v_scale = after.v.scales(),
                              .chunk_score = chunk_score.data(),
                              .slot_score = slot_score.data(),
                              .valid = nullptr,
                              .rank = nullptr,
                              .slots = after.slots(),
                              .seen = after.seen.data(),
                              .H = after.H.data(),
                              .z = after.z.data(),
                              .workspace = nullptr,
                              .psi = after.psi_maps.maps,
                              .rule = after.rule,
                              .B = B,
                              .K = K,
                              .T = T,
                              .D = D,
                              .R = R};
  cpu::compact(compact, 0, B * K);
  for (int64_t row = 0; row < B * K; ++row) {
    naive::Head wanted = before.head(row);
    wanted.attend(T, G, before.scale, before.softcap, before.decay);
    wanted.compact(S, before.seen[row / K] + T, before.rule, [&](const double* key) {
      return naive::features(before.psi_maps.maps, row % K, key);
    });
    before.expect_out(row, wanted, out);
    for (int64_t m = 0; m < T * G; ++m) {
      expect_close(share[before.query(row, m)], wanted.share[m], 2e-6, "share", m);
    }
    after.expect_as(before, row, wanted);
  }
}

void test_decode_step(DType dtype, int64_t held, Victim victim, const Rule& rule,
                      float softcap = 0.0f) {
  Layer before(dtype, 1, held, softcap);
  before.rule = rule;
  Layer after = before;
  constexpr int64_t B = Layer::B, K = Layer::K, Q = Layer::Q, G = Layer::G, D = Layer::D,
                    R = Layer::R, S = Layer::S;
  std::vector<float> out(B * Q * D, NAN), k(B * K * D), v(B * K * D);
  // The step rounds the token to the slots' dtype by itself: int8 rows go in as they came out.
  for (int64_t i = 0; i < B * K * D; ++i) {
    k[i] = float(before.k.wide[i]);
    v[i] = float(before.v.wide[i]);
  }
  const DecodeStepParams step{.q = after.q.bytes.data(),
                              .k = k.data(),
                              .v = v.data(),
                              .valid = nullptr,
                              .seen = after.seen.data(),
                              .slots = after.slots(),
                              .H = after.H.data(),
                              .z = after.z.data(),
                              .share = after.share.data(),
                              .workspace = nullptr,
                              .phi = after.phi_maps.maps,
                              .psi = after.psi_maps.maps,
                              .out = out.data(),
                              .rule = rule,
                              .victim = victim,
                              .q_dtype = DType::f32,
                              .kv_dtype = DType::f32,
                              .scores = true,
                              .dependent = false,
                              .scale = after.scale,
                              .softcap = after.softcap,
                              .decay = after.decay,
                              .B = B,
                              .Q = Q,
                              .K = K,
                              .D = D,
                              .R = R};
  cpu::decode_step(step, 0, B * K);
  for (int64_t row = 0; row < B * K; ++row) {
    naive::Head wanted = before.head(row);
    wanted.attend(1, G, before.scale, before.softcap, before.decay);
    before.expect_out(row, wanted, out);
    double share = 0.0;
    for (double part : wanted.share) share += part;
    expect_close(after.share[row], share, 5e-6, "share", row);
    if (victim == Victim::none) {
      expect(after.position == before.position && after.score == before.score, "slots changed");
      expect(after.slot_k.bytes == before.slot_k.bytes, "keys changed");
      expect(after.H == before.H, "the state changed");
      continue;
    }
    wanted.compact(S, before.seen[row / K] + 1, rule, [&](const double* key) {
      std::vector<double> psi = naive::features(before.psi_maps.maps, row % K, key);
      if (victim == Victim::forget) psi.assign(psi.size(), 0.0);
      return psi;
    });
    after.expect_as(before, row, wanted);
  }
}

void test_level(const std::string& level) {
  cpu::set_level(level);
  where = level + " simd";
  test_simd();
  for (DType dtype : {DType::f32, DType::bf16, DType::fp16}) {
    where = level + " fold " + name(dtype);
    test_fold(dtype);
    where = level + " quantize " + name(dtype);
    test_quantize(dtype);
    where = level + " feature_map " + name(dtype);
    test_feature_map(MapKind::exp, false, dtype);
    test_feature_map(MapKind::paper, false, dtype);
    test_feature_map(MapKind::paper, true, dtype);
  }
  for (DType dtype : {DType::f32, DType::bf16, DType::fp16, DType::i8}) {
    for (int64_t T : {1, 5, 70}) {
      for (int64_t held : {Layer::S, Layer::S - 3, int64_t(0)}) {
        where = level + " call " + name(dtype) + " T=" + std::to_string(T) +
                " held=" + std::to_string(held);
        test_call(dtype, T, held, 0.0f);
        where += " softcap";
        test_call(dtype, T, held, 1.5f);
      }
    }
    for (int64_t held : {Layer::S, Layer::S - 3, int64_t(0)}) {
      where = level + " decode_step " + name(dtype) + " held=" + std::to_string(held);
      test_decode_step(dtype, held, Victim::none, {6, 2, true, false});
      test_decode_step(dtype, held, Victim::forget, {6, 2, true, false});
      test_decode_step(dtype, held, Victim::fold, {6, 2, true, true});
      test_decode_step(dtype, held, Victim::fold, {Layer::S - 2, 2, false, false});
      where += " softcap";
      test_decode_step(dtype, held, Victim::fold, {6, 2, true, true}, 1.5f);
    }
  }
}

}  // namespace
}  // namespace less

int main() {
  for (const std::string& level : less::cpu::supported_levels()) {
    const int before = less::failures;
    less::test_level(level);
    std::printf("%-8s %s\n", level.c_str(), less::failures == before ? "passed" : "FAILED");
  }
  return less::failures == 0 ? 0 : 1;
}
