// The CPU kernels of every SIMD level that this machine runs, against double loops (naive.h).
//
// Needs no torch and no Python, so that it also runs where there is neither: on a machine that is
// emulated, or on a level whose instructions are. Shapes are odd on purpose: every tail is met.
#include "cpu/kernels.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

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

// Runs kernel(begin, end) over n items: at once, or where a sanitizer looks for races as parts of
// several threads.
template <typename Kernel>
void over(int64_t n, const Kernel& kernel) {
#ifdef LESS_TEST_THREADS
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < LESS_TEST_THREADS; ++i) {
    threads.emplace_back(kernel, n * i / LESS_TEST_THREADS, n * (i + 1) / LESS_TEST_THREADS);
  }
  for (std::thread& thread : threads) thread.join();
#else
  kernel(0, n);
#endif
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

// -- rows of heads
// ---------------------------------------------------------------------------------

// A copy of rows [B, heads, T, D]: contiguous, or tokens before heads with a gap of NaN behind
// every row.
struct Arranged {
  std::vector<char> bytes;
  HeadRows rows;
  int64_t B, heads, T, D;

  Arranged(DType dtype, int64_t B_, int64_t heads_, int64_t T_, int64_t D_, bool token_major)
      : bytes(B_ * heads_ * T_ * (D_ + kGap) * bytes_of(dtype), char(0xff)),
        rows(contiguous_rows(bytes.data(), dtype, heads_, T_, D_)),
        B(B_),
        heads(heads_),
        T(T_),
        D(D_) {
    const int64_t apart = D + kGap;
    if (token_major) rows = {bytes.data(), dtype, T * heads * apart, apart, heads * apart};
  }
  Arranged(const std::vector<char>& from, DType dtype, int64_t B_, int64_t heads_, int64_t T_,
           int64_t D_, bool token_major)
      : Arranged(dtype, B_, heads_, T_, D_, token_major) {
    each([&](char* row, int64_t i, int64_t n) { std::memcpy(row, from.data() + i * n, n); });
  }
  Arranged(const Arranged&) = delete;

  static constexpr int64_t kGap = 5;

  // Contiguous.
  std::vector<char> read() {
    std::vector<char> to(B * heads * T * D * bytes_of(rows.dtype));
    each([&](char* row, int64_t i, int64_t n) { std::memcpy(to.data() + i * n, row, n); });
    return to;
  }

 private:
  template <typename F>
  void each(F f) {
    const int64_t size = bytes_of(rows.dtype);
    for (int64_t i = 0; i < B * heads * T; ++i) {
      f(bytes.data() + offset(rows, i / T / heads, i / T % heads, i % T) * size, i, D * size);
    }
  }
};

// -- building blocks ------------------------------------------------------------------------------

void test_fold(DType dtype) {
  const int64_t heads = 3, N = 9, R = 5, D = 43;
  Random random(2);
  std::vector<float> H = random.normal(heads * R * D), z = random.positive(heads * R);
  const std::vector<float> psi = random.positive(heads * N * R), H0 = H, z0 = z;
  const Rows v(random.normal(heads * N * D), dtype, D);
  bool keep[heads * N];
  for (int64_t i = 0; i < heads * N; ++i) keep[i] = i % 4 != 1;
  over(heads, [&](int64_t begin, int64_t end) {
    cpu::fold({H.data(), z.data(), psi.data(), v.bytes.data(), keep, dtype, heads, N, R, D}, begin,
              end);
  });
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
  const int64_t B = 2, heads = 3, T = 4, rows = B * heads * T, D = 43;
  const Rows x(Random(3).normal(rows * D), dtype, D);
  std::vector<float> exact(x.wide.begin(), x.wide.end()), scale(rows);
  std::fill(exact.begin(), exact.begin() + (dtype == DType::f32 ? D : 0), 0.0f);
  const Rows input(exact, dtype, D), wanted(exact, DType::i8, D);
  std::vector<int8_t> eight(rows * D, 99);
  for (bool token_major : {false, true}) {
    const Arranged from(input.bytes, dtype, B, heads, T, D, token_major);
    std::fill(eight.begin(), eight.end(), int8_t(99));
    over(rows, [&](int64_t begin, int64_t end) {
      cpu::quantize({from.rows, eight.data(), scale.data(), DType::i8, B, heads, T, D}, begin, end);
    });
    expect(scale == wanted.scale, "scales differ");
    expect(std::memcmp(eight.data(), wanted.bytes.data(), eight.size()) == 0, "rows differ");
  }
}

// Random weights of `heads` maps, and the struct that points at them.
struct RandomMaps {
  std::vector<float> w1, w2, bias, mix, scale, mix_scale;
  FeatureMaps maps{};

  RandomMaps(Random& random, MapKind kind, bool psi, int64_t heads, int64_t D, int64_t E, int64_t R)
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
  const RandomMaps m(random, kind, psi, heads, D, E, R);
  const Rows x(random.normal(B * heads * T * D), dtype, D);
  std::vector<float> y(B * heads * T * R, NAN), same(B * heads * T * R, NAN);
  const Arranged by_head(x.bytes, dtype, B, heads, T, D, false);
  over(B * heads * T, [&](int64_t begin, int64_t end) {
    cpu::feature_map({m.maps, by_head.rows, y.data(), B, heads, T}, begin, end);
  });
  const Arranged by_token(x.bytes, dtype, B, heads, T, D, true);
  cpu::feature_map({m.maps, by_token.rows, same.data(), B, heads, T}, 0, B * heads * T);
  expect(y == same, "features of token-major rows differ");
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
  RandomMaps phi_maps{random, MapKind::exp, false, Q, D, E, R};
  RandomMaps psi_maps{random, MapKind::exp, true, K, D, E, R};
  Rule rule{6, 2, true, false, 0};
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

// What a call is made of a layer: some of its rows and heads, and how the caller's rows lie.
struct Part {
  int64_t b = 0, B = Layer::B, h = 0, K = Layer::K;
  bool token_major = false;

  int64_t Q() const { return K * Layer::G; }

  // Of x [B, heads, n], heads being all query or all kv heads.
  template <typename T>
  std::vector<T> of(const std::vector<T>& x, int64_t n) const {
    const int64_t heads = int64_t(x.size()) / Layer::B / n, per = heads / Layer::K;
    std::vector<T> cut;
    for (int64_t i = b; i < b + B; ++i) {
      const auto first = x.begin() + (i * heads + h * per) * n;
      cut.insert(cut.end(), first, first + K * per * n);
    }
    return cut;
  }

  FeatureMaps of(const FeatureMaps& m, int64_t per) const {
    const int64_t first = h * per;
    FeatureMaps cut = m;
    cut.w1 = static_cast<const float*>(m.w1) + first * m.D * m.E;
    cut.w2 = static_cast<const float*>(m.w2) + first * m.E * m.R;
    if (m.bias != nullptr) cut.bias = m.bias + first * m.R;
    return cut;
  }
};

// Pages of a part of a layer, with a gap behind each. Whatever is no field is full of 0xff, NaN.
class Pages {
 public:
  static constexpr int64_t kGap = 2 * kPageAlign;

  // slots: of each head, at most Layer::S: its first ones. numbers: the page of each row.
  Pages(const Layer& layer, const Part& part, const std::vector<int64_t>& slots,
        const std::vector<int32_t>& numbers)
      : layout(make_layout(layer.slot_k.dtype, part.K, Layer::D, Layer::R, slots.data())),
        part_(part),
        numbers_(numbers),
        memory_((layout.nbytes + kGap) * kPages + kPageAlign, 0xff) {
    auto* const data = memory_.data();
    pool = {.data = data + (-reinterpret_cast<uintptr_t>(data)) % kPageAlign,
            .stride = layout.nbytes + kGap,
            .N = kPages,
            .pages = numbers_.data(),
            .fresh = nullptr,
            .null_page = kNull};
    fields(layer, [](unsigned char* field, const void* from, int64_t bytes) {
      std::memcpy(field, from, bytes);
    });
  }
  Pages(const Pages&) = delete;

  // The arrays of the layer become what the pages hold.
  void read(Layer& layer) const {
    fields(layer, [](unsigned char* field, const void* to, int64_t bytes) {
      std::memcpy(const_cast<void*>(to), field, bytes);
    });
  }

  // Nothing but fields of the rows' own pages was written.
  void expect_rest_untouched(const Layer& layer) const {
    std::vector<unsigned char> rest = memory_;
    fields(layer, [&](unsigned char* field, const void*, int64_t bytes) {
      std::memset(rest.data() + (field - memory_.data()), 0xff, bytes);
    });
    expect(std::count(rest.begin(), rest.end(), 0xff) == int64_t(rest.size()),
           "bytes outside the fields were written");
  }

  // The page of the b-th row, onto the first page of others.
  void copy_page(int64_t b, Pages& others) const {
    std::memcpy(page(others.pool, 0), page(pool, b), layout.nbytes);
  }

  // The fields of a head of the b-th row.
  std::vector<unsigned char> head_bytes(int64_t b, int64_t h) const {
    const Span span = head_span(layout, page(pool, b), h);
    return {span.data, span.data + span.nbytes};
  }

  static constexpr int32_t kNull = 5, kPages = 7;
  const Layout layout;
  Pool pool;

 private:
  // f(field, where the layer has it, bytes) for every field of every page.
  template <typename F>
  void fields(const Layer& layer, F f) const {
    constexpr int64_t K = Layer::K, S = Layer::S, D = Layer::D, R = Layer::R;
    for (int64_t b = 0; b < part_.B; ++b) {
      unsigned char* const own = page(pool, b);
      if (own == nullptr) continue;
      f(own, &layer.seen[part_.b + b], 8);
      for (int64_t h = 0; h < part_.K; ++h) {
        const int64_t row = (part_.b + b) * K + part_.h + h, s = row * S;
        const auto [slots, state] = head(layout, own, h);
        const auto bytes = [](auto* field) { return reinterpret_cast<unsigned char*>(field); };
        const auto rows = [&](void* field, float* scale, const Rows& from) {
          const int64_t n = from.row_bytes();
          f(bytes(field), &from.bytes[s * n], slots.S * n);
          if (scale != nullptr) f(bytes(scale), &from.scale[s], slots.S * 4);
        };
        rows(slots.k, slots.k_scale, layer.slot_k);
        rows(slots.v, slots.v_scale, layer.slot_v);
        f(bytes(slots.position), &layer.position[s], slots.S * 4);
        f(bytes(slots.weight), &layer.weight[s], slots.S * 4);
        f(bytes(slots.score), &layer.score[s], slots.S * 4);
        f(bytes(state.H), &layer.H[row * R * D], R * D * 4);
        f(bytes(state.z), &layer.z[row * R], R * 4);
        f(bytes(state.share), &layer.share[row], 8);
      }
    }
  }

  const Part part_;
  const std::vector<int32_t> numbers_;
  std::vector<unsigned char> memory_;
};

// What a call wrote beside the pages.
struct Outcome {
  std::vector<float> out;    // [B, Q, T, D]
  std::vector<float> score;  // [B, K, S + T]
  std::vector<float> share;  // [B, Q, T]
};

std::vector<float> floats(const std::vector<char>& bytes) {
  std::vector<float> x(bytes.size() / sizeof(float));
  std::memcpy(x.data(), bytes.data(), bytes.size());
  return x;
}

// NaN where it is one, which == does not know.
bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

LayerSpec spec_of(const Layer& layer, const Part& part, Victim victim) {
  return {.Q = part.Q(),
          .K = part.K,
          .D = Layer::D,
          .scale = layer.scale,
          .softcap = layer.softcap,
          .decay = layer.decay,
          .scores = true,
          .dependent = false,
          .victim = victim,
          .rule = layer.rule};
}

Maps maps_of(const Layer& layer, const Part& part) {
  return {.phi = part.of(layer.phi_maps.maps, Layer::G),
          .psi = part.of(layer.psi_maps.maps, 1),
          .space = {}};
}

// chunk_attention, chunk_scores and compact.
Outcome call(const Layer& layer, const Part& part, Pages& pages, const bool* valid = nullptr) {
  constexpr int64_t G = Layer::G, D = Layer::D, R = Layer::R;
  const int64_t B = part.B, K = part.K, Q = part.Q(), T = layer.T, S = pages.layout.S;
  const int64_t per_block = std::max<int64_t>(1, kAttentionBlock / G);
  const int64_t strips = std::min(kScoreStrips, (T + per_block - 1) / per_block);
  const DType dtype = layer.k.dtype;
  const bool major = part.token_major;
  const Arranged q(part.of(layer.q.bytes, T * D * 4), DType::f32, B, Q, T, D, major);
  const Arranged k(part.of(layer.k.bytes, T * D * bytes_of(dtype)), dtype, B, K, T, D, major);
  const Arranged v(part.of(layer.v.bytes, T * D * bytes_of(dtype)), dtype, B, K, T, D, major);
  Arranged out(DType::f32, B, Q, T, D, major);
  std::vector<float> k_scale, v_scale;
  if (has_scale(dtype)) {
    k_scale = part.of(layer.k.scale, T);
    v_scale = part.of(layer.v.scale, T);
  }
  const std::vector<float> phi = part.of(layer.phi, T * R);
  std::vector<float> received(B * K * strips * (S + T), NAN);
  Outcome outcome{.out = {},
                  .score = std::vector<float>(B * K * (S + T), NAN),
                  .share = std::vector<float>(B * Q * T, NAN)};
  const CallRows rows{.k = k.rows,
                      .v = v.rows,
                      .k_scale = k_scale.empty() ? nullptr : k_scale.data(),
                      .v_scale = v_scale.empty() ? nullptr : v_scale.data()};
  const ChunkAttentionParams attention{.spec = spec_of(layer, part, Victim::fold),
                                       .layout = pages.layout,
                                       .pool = pages.pool,
                                       .q = q.rows,
                                       .call = rows,
                                       .valid = valid,
                                       .phi_q = phi.data(),
                                       .shifted = false,
                                       .out = out.rows,
                                       .score = outcome.score.data(),
                                       .share = outcome.share.data(),
                                       .received = received.data(),
                                       .workspace = nullptr,
                                       .strips = strips,
                                       .B = B,
                                       .T = T};
  over(B * K * strips,
       [&](int64_t begin, int64_t end) { cpu::chunk_attention(attention, begin, end); });
  over(B * K, [&](int64_t begin, int64_t end) { cpu::chunk_scores(attention, begin, end); });
  const CompactParams compact{.spec = attention.spec,
                              .layout = pages.layout,
                              .pool = pages.pool,
                              .maps = maps_of(layer, part),
                              .call = rows,
                              .valid = valid,
                              .score = outcome.score.data(),
                              .rank = nullptr,
                              .workspace = nullptr,
                              .B = B,
                              .T = T};
  over(B * K, [&](int64_t begin, int64_t end) { cpu::compact(compact, begin, end); });
  outcome.out = floats(out.read());
  return outcome;
}

Outcome step(const Layer& layer, const Part& part, Pages& pages, Victim victim,
             const bool* valid = nullptr) {
  constexpr int64_t D = Layer::D;
  const int64_t B = part.B, K = part.K, Q = part.Q();
  const bool major = part.token_major;
  // The step rounds the token to the slots' dtype by itself: int8 rows go in as they came out.
  const auto wide = [&](const Rows& rows) {
    const std::vector<float> x(rows.wide.begin(), rows.wide.end());
    return part.of(Rows(x, DType::f32, D).bytes, D * 4);
  };
  const Arranged q(part.of(layer.q.bytes, D * 4), DType::f32, B, Q, 1, D, major);
  const Arranged k(wide(layer.k), DType::f32, B, K, 1, D, major);
  const Arranged v(wide(layer.v), DType::f32, B, K, 1, D, major);
  Arranged out(DType::f32, B, Q, 1, D, major);
  const DecodeStepParams params{.spec = spec_of(layer, part, victim),
                                .layout = pages.layout,
                                .pool = pages.pool,
                                .maps = maps_of(layer, part),
                                .q = q.rows,
                                .k = k.rows,
                                .v = v.rows,
                                .out = out.rows,
                                .valid = valid,
                                .workspace = nullptr,
                                .B = B};
  over(B * K, [&](int64_t begin, int64_t end) { cpu::decode_step(params, begin, end); });
  return {.out = floats(out.read()), .score = {}, .share = {}};
}

const std::vector<int64_t> kEqual(Layer::K, Layer::S);
const std::vector<int32_t> kShuffled = {4, 1};

void test_call(DType dtype, int64_t T, int64_t held, float softcap) {
  const Layer before(dtype, T, held, softcap);
  constexpr int64_t K = Layer::K, S = Layer::S, G = Layer::G;
  Pages pages(before, {}, kEqual, kShuffled);
  const Outcome got = call(before, {}, pages);
  Layer after = before;
  pages.read(after);
  pages.expect_rest_untouched(after);
  for (int64_t row = 0; row < Layer::B * K; ++row) {
    naive::Head wanted = before.head(row);
    wanted.attend(T, G, before.scale, before.softcap, before.decay);
    wanted.compact(S, before.seen[row / K] + T, before.rule, [&](const double* key) {
      return naive::features(before.psi_maps.maps, row % K, key);
    });
    before.expect_out(row, wanted, got.out);
    for (int64_t m = 0; m < T * G; ++m) {
      expect_close(got.share[before.query(row, m)], wanted.share[m], 2e-6, "share", m);
    }
    after.expect_as(before, row, wanted);
  }
}

void test_decode_step(DType dtype, int64_t held, Victim victim, const Rule& rule,
                      float softcap = 0.0f) {
  Layer before(dtype, 1, held, softcap);
  before.rule = rule;
  constexpr int64_t K = Layer::K, S = Layer::S, G = Layer::G;
  Pages pages(before, {}, kEqual, kShuffled);
  const Outcome got = step(before, {}, pages, victim);
  Layer after = before;
  pages.read(after);
  pages.expect_rest_untouched(after);
  for (int64_t row = 0; row < Layer::B * K; ++row) {
    naive::Head wanted = before.head(row);
    wanted.attend(1, G, before.scale, before.softcap, before.decay);
    before.expect_out(row, wanted, got.out);
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

// -- pages: the same bits however they and the caller's rows lie
// ------------------------------------

// One op of a layer: a call of several tokens, with or without padding, or a step.
struct Op {
  const char* name;
  int64_t T;
  Outcome (*run)(const Layer&, const Part&, Pages&);
};

Outcome padded_call(const Layer& layer, const Part& part, Pages& pages) {
  const std::unique_ptr<bool[]> valid(new bool[part.B * layer.T]);
  for (int64_t i = 0; i < part.B * layer.T; ++i) valid[i] = i % layer.T != 3;
  return call(layer, part, pages, valid.get());
}

Outcome whole_call(const Layer& layer, const Part& part, Pages& pages) {
  return call(layer, part, pages);
}

Outcome folding_step(const Layer& layer, const Part& part, Pages& pages) {
  return step(layer, part, pages, Victim::fold);
}

const Op kOps[] = {
    {"padded call", 30, padded_call}, {"call", 30, whole_call}, {"step", 1, folding_step}};

// `got`, of all rows and heads, holds the bits of `alone`, of a part of them with the same slots.
void expect_part(const Layer& layer, const Part& part, const Outcome& got, const Pages& pages,
                 const Outcome& alone, const Pages& pages_alone, const char* what) {
  const int64_t T = layer.T;
  expect(same_bits(part.of(got.out, T * Layer::D), alone.out), std::string(what) + ": out");
  if (!alone.share.empty()) {
    expect(same_bits(part.of(got.share, T), alone.share), std::string(what) + ": share");
  }
  const int64_t S = pages.layout.S, fewer = pages_alone.layout.S;
  for (int64_t b = 0; b < part.B; ++b) {
    for (int64_t h = 0; h < part.K; ++h) {
      if (page(pages_alone.pool, b) == nullptr) continue;
      expect(pages.head_bytes(part.b + b, part.h + h) == pages_alone.head_bytes(b, h),
             std::string(what) + ": the head's fields");
      const auto mass = [](const Pages& of, int64_t row, int64_t kv) {
        return *head(of.layout, page(of.pool, row), kv).state.share;
      };
      expect(mass(pages, part.b + b, part.h + h) == mass(pages_alone, b, h),
             std::string(what) + ": the state's mass");
      if (alone.score.empty()) continue;
      const float* whole = &got.score[((part.b + b) * Layer::K + part.h + h) * (S + T)];
      const float* own = &alone.score[(b * part.K + h) * (fewer + T)];
      const int64_t slots = pages.layout.slots[part.h + h];
      expect(std::memcmp(whole, own, slots * 4) == 0, std::string(what) + ": scores of slots");
      expect(std::memcmp(whole + S, own + fewer, T * 4) == 0, std::string(what) + ": scores");
      for (int64_t s = slots; s < S; ++s) {
        expect(whole[s] == 0.0f, std::string(what) + ": a slot that is not there has a score");
      }
    }
  }
}

void test_shuffled_pages_hold_the_bits_of_separate_pools(const Op& op, const Layer& layer) {
  Pages all(layer, {}, kEqual, kShuffled);
  const Outcome got = op.run(layer, {}, all);
  for (int64_t b = 0; b < Layer::B; ++b) {
    const Part part{.b = b, .B = 1};
    Pages own(layer, part, kEqual, {0});
    const Outcome alone = op.run(layer, part, own);
    expect_part(layer, part, got, all, alone, own, "a pool of its own");
  }
}

void test_ragged_heads_hold_the_bits_of_one_layer_each(const Op& op, const Layer& layer) {
  for (const std::vector<int64_t>& slots : {std::vector<int64_t>{Layer::S, 11}, {1, Layer::S}}) {
    Pages all(layer, {}, slots, kShuffled);
    const Outcome got = op.run(layer, {}, all);
    all.expect_rest_untouched(layer);
    for (int64_t h = 0; h < Layer::K; ++h) {
      const Part part{.h = h, .K = 1};
      Pages own(layer, part, {slots[h]}, kShuffled);
      const Outcome alone = op.run(layer, part, own);
      expect_part(layer, part, got, all, alone, own, "a layer of its own");
    }
  }
}

void test_token_major_rows_give_the_same_bits(const Op& op, const Layer& layer) {
  Pages pages(layer, {}, kEqual, kShuffled), same(layer, {}, kEqual, kShuffled);
  const Outcome by_head = op.run(layer, {}, pages);
  const Outcome by_token = op.run(layer, {.token_major = true}, same);
  expect_part(layer, {}, by_head, pages, by_token, same, "token-major");
}

void test_a_row_without_a_page_reads_and_writes_nothing(const Op& op, const Layer& layer) {
  Pages all(layer, {}, kEqual, {0, 1});
  const Outcome with = op.run(layer, {}, all);
  for (int32_t none : {-1, Pages::kPages, Pages::kNull}) {
    for (int64_t other : {0, 1}) {
      std::vector<int32_t> numbers = {none, none};
      numbers[other] = 3;
      Pages pages(layer, {}, kEqual, numbers);
      Outcome got = op.run(layer, {}, pages);
      pages.expect_rest_untouched(layer);
      const Part absent{.b = 1 - other, .B = 1}, present{.b = other, .B = 1};
      const auto zero = [&](const std::vector<float>& x, int64_t n) {
        const std::vector<float> cut = absent.of(x, n);
        return std::all_of(cut.begin(), cut.end(), [](float a) { return a == 0.0f; });
      };
      expect(zero(got.out, layer.T * Layer::D), "out without a page is not 0");
      if (!got.score.empty()) {
        expect(zero(got.score, Layer::S + layer.T), "a score without a page is not 0");
        expect(zero(got.share, layer.T), "a share without a page is not 0");
      }
      Outcome alone{.out = present.of(got.out, layer.T * Layer::D), .score = {}, .share = {}};
      if (!got.score.empty()) {
        alone.score = present.of(got.score, Layer::S + layer.T);
        alone.share = present.of(got.share, layer.T);
      }
      Pages own(layer, present, kEqual, {3});
      pages.copy_page(other, own);
      expect_part(layer, present, with, all, alone, own, "beside a row without a page");
    }
  }
}

void test_pages(DType dtype) {
  for (const Op& op : kOps) {
    for (int64_t held : {Layer::S, int64_t(8)}) {
      const Layer layer(dtype, op.T, held, 0.0f);
      const std::string before = where;
      where += std::string(" ") + op.name + " held=" + std::to_string(held);
      test_shuffled_pages_hold_the_bits_of_separate_pools(op, layer);
      test_ragged_heads_hold_the_bits_of_one_layer_each(op, layer);
      test_token_major_rows_give_the_same_bits(op, layer);
      test_a_row_without_a_page_reads_and_writes_nothing(op, layer);
      where = before;
    }
  }
}

// A page that begins is that of an empty sequence, whatever it holds.
void test_clear_page() {
  const Layer layer(DType::i8, 1, Layer::S, 0.0f);
  const std::vector<int64_t> slots = {Layer::S, 11};
  Pages pages(layer, {}, slots, {2, 0});
  unsigned char* const own = page(pages.pool, 0);
  std::memset(own, 0xff, pages.layout.nbytes);
  clear_page(pages.layout, own);
  expect(*seen(own) == 0, "seen is not 0");
  for (int64_t h = 0; h < Layer::K; ++h) {
    const auto [kept, state] = head(pages.layout, own, h);
    expect(kept.S == slots[h], "slots");
    for (int64_t s = 0; s < kept.S; ++s) {
      expect(kept.position[s] == -1 && kept.score[s] == 0.0f && kept.weight[s] == 0.0f &&
                 kept.k_scale[s] == 0.0f && kept.v_scale[s] == 0.0f,
             "a slot is not empty");
    }
    for (int64_t i = 0; i < Layer::R * Layer::D; ++i) expect(state.H[i] == 0.0f, "H is not 0");
    expect(*state.share == 0.0, "share is not 0");
  }
}

// -- packed rows
// -------------------------------------------------------------------------------------

void test_rotate(int64_t D) {
  const int64_t B = 2, K = 2, heads = 4, T = 3;
  Random random(6);
  const std::vector<float> x = random.normal(B * heads * T * D);
  std::vector<float> mean = random.normal(K * D), scale = random.normal(K * D);
  std::vector<uint16_t> half_mean, half_scale;
  for (const auto& [floats, halves] : {std::pair{&mean, &half_mean}, {&scale, &half_scale}}) {
    for (float& number : *floats) {
      halves->push_back(from_float<fp16>(number).bits);
      number = to_float(fp16{halves->back()});
    }
  }
  const Space space{half_mean.data(), half_scale.data(), half_mean.data(), half_scale.data()};
  const float f = hadamard_factor(D);
  const bool valid[B * T] = {true, true, false, true, false, true};
  for (Rotation rotation : {Rotation::query, Rotation::key, Rotation::value, Rotation::output}) {
    std::vector<float> y(x.size(), NAN);
    cpu::rotate({.space = space,
                 .x = contiguous_rows(x.data(), DType::f32, heads, T, D),
                 .y = y.data(),
                 .valid = valid,
                 .rotation = rotation,
                 .B = B,
                 .heads = heads,
                 .K = K,
                 .T = T,
                 .D = D},
                0, B * heads * T);
    for (int64_t n = 0; n < B * heads * T; ++n) {
      const int64_t at = n / T % heads / (heads / K) * D;
      const bool out = rotation == Rotation::output, query = rotation == Rotation::query;
      std::vector<float> wanted(x.begin() + n * D, x.begin() + (n + 1) * D);
      for (int64_t d = 0; d < D && !out; ++d) {
        wanted[d] = query ? wanted[d] * (f / scale[at + d])
                          : (wanted[d] - mean[at + d]) * (scale[at + d] * f);
      }
      for (int64_t length = 1; length < hadamard_block(D); length *= 2) {
        for (int64_t i = 0; i < D; ++i) {
          if ((i & length) != 0) continue;
          const float a = wanted[i], b = wanted[i + length];
          wanted[i] = a + b;
          wanted[i + length] = a - b;
        }
      }
      for (int64_t d = 0; d < D && out; ++d) {
        const float scaled = wanted[d] * (f / scale[at + d]);
        wanted[d] = scaled + mean[at + d];
      }
      if (!valid[n / T / heads * T + n % T]) wanted.assign(D, 0.0f);
      expect(std::memcmp(&y[n * D], wanted.data(), D * sizeof(float)) == 0,
             "rotation " + std::to_string(int(rotation)) + " of D=" + std::to_string(D));
    }
  }
}

// Tokens leave a window of one: compact encodes all but the last. Then a query attends to them.
void test_packed(DType k_dtype, DType v_dtype, int64_t D) {
  const int64_t T = 23, S = T + 2, hot = S - 1 - T;
  Layout layout{};
  layout.K = 1;
  layout.D = int32_t(D);
  layout.hot = int32_t(hot);
  layout.k_dtype = k_dtype;
  layout.v_dtype = v_dtype;
  layout.call_dtype = DType::f32;
  place_heads(layout, &S);
  std::vector<float> memory(layout.nbytes / 4 + kPageAlign);
  auto* const data = reinterpret_cast<unsigned char*>(memory.data());
  const Pool pool{data + (-reinterpret_cast<uintptr_t>(data)) % kPageAlign,
                  layout.nbytes,
                  1,
                  nullptr,
                  nullptr,
                  -1};
  clear_page(layout, pool.data);
  Random random(7);
  std::vector<float> k = random.normal(T * D), v = random.normal(T * D), q = random.normal(D);
  for (int64_t t = 0; t < 6;
       ++t) {  // large, small, zero, one number, too large for a scale, too small
    for (int64_t d = 0; d < D; ++d) {
      const float sizes[] = {1e4f, 1e-4f, 0.0f, d == 3 ? 1.0f : 0.0f, 1e15f, 1e-44f};
      v[t * D + d] *= sizes[t];
    }
  }
  const std::vector<float> score(S + T, 0.0f);
  LayerSpec spec{.Q = 1,
                 .K = 1,
                 .D = D,
                 .scale = 0.1f,
                 .softcap = 0.0f,
                 .decay = 1.0f,
                 .scores = false,
                 .dependent = false,
                 .victim = Victim::forget,
                 .rule = {0, 0, true, false, 0}};
  const CallRows call{contiguous_rows(k.data(), DType::f32, 1, T, D),
                      contiguous_rows(v.data(), DType::f32, 1, T, D), nullptr, nullptr};
  cpu::compact({.spec = spec,
                .layout = layout,
                .pool = pool,
                .maps = {},
                .call = call,
                .valid = nullptr,
                .score = score.data(),
                .rank = nullptr,
                .workspace = nullptr,
                .B = 1,
                .T = T},
               0, 1);
  *seen(pool.data) = T;
  const Slots slots = head(layout, pool.data, 0).slots;
  std::vector<double> wide_k(T * D), wide_v(T * D);
  const auto expect_row = [&](DType dtype, const void* rows, const uint16_t* half, int64_t t,
                              const std::vector<float>& x, std::vector<double>& wide) {
    std::vector<uint8_t> row(row_bytes(dtype, D));
    const uint16_t wanted = naive::encode(dtype, &x[t * D], D, row.data());
    const auto* const got = static_cast<const uint8_t*>(rows) + t * row_bytes(dtype, D);
    expect(half[t] == wanted, "the scale of row " + std::to_string(t));
    expect(std::memcmp(got, row.data(), row.size()) == 0, "codes of row " + std::to_string(t));
    for (int64_t d = 0; d < D; ++d) {
      wide[t * D + d] = naive::decode(dtype, row.data(), wanted, D, d);
    }
  };
  for (int64_t t = 0; t + hot < T; ++t) {
    expect(slots.position[hot + t] == t, "a token lies elsewhere");
    expect_row(v_dtype, slots.v, slots.v_half, t, v, wide_v);
    if (packed(k_dtype)) {
      expect_row(k_dtype, slots.k, slots.k_half, t, k, wide_k);
    } else {
      const Rows rows(std::vector<float>(&k[t * D], &k[t * D] + D), k_dtype, D);
      std::copy(rows.wide.begin(), rows.wide.end(), wide_k.begin() + t * D);
    }
  }
  for (int64_t i = (T - hot) * D; i < T * D; ++i) {
    wide_k[i] = k[i];
    wide_v[i] = v[i];
  }
  slots.position[hot + 4] = -1;  // its numbers would drown the others'
  std::vector<float> out(D, NAN), new_score(S + 1, NAN);
  float share = NAN;
  const CallRows token{contiguous_rows(k.data(), DType::f32, 1, 1, D),
                       contiguous_rows(k.data(), DType::f32, 1, 1, D), nullptr, nullptr};
  const ChunkAttentionParams attend{.spec = spec,
                                    .layout = layout,
                                    .pool = pool,
                                    .q = contiguous_rows(q.data(), DType::f32, 1, 1, D),
                                    .call = token,
                                    .valid = nullptr,
                                    .phi_q = nullptr,
                                    .shifted = false,
                                    .out = contiguous_rows(out.data(), DType::f32, 1, 1, D),
                                    .score = new_score.data(),
                                    .share = &share,
                                    .received = nullptr,
                                    .workspace = nullptr,
                                    .strips = 1,
                                    .B = 1,
                                    .T = 1};
  cpu::chunk_attention(attend, 0, 1);
  std::vector<double> wanted(D, 0.0);
  double total = 0.0, largest = 0.0;
  for (int64_t n = 0; n <= T; ++n) {  // the token itself is the last
    if (n == 4) continue;
    double l = 0.0;
    for (int64_t d = 0; d < D; ++d) l += 0.1 * q[d] * (n < T ? wide_k[n * D + d] : k[d]);
    total += std::exp(l);
    for (int64_t d = 0; d < D; ++d) {
      wanted[d] += std::exp(l) * (n < T ? wide_v[n * D + d] : k[d]);
    }
  }
  for (int64_t d = 0; d < D; ++d) largest = std::fmax(largest, std::fabs(wanted[d] / total));
  for (int64_t d = 0; d < D; ++d) {
    expect_close(out[d] / largest, wanted[d] / total / largest, 2e-6, "out", d);
  }
}

// -- victim merge
// ------------------------------------------------------------------------------------

// A row of a format, and the numbers that it stands for.
struct StoredRow {
  std::vector<char> bytes;
  float scale = 0.0f;
  uint16_t half = 0;
  std::vector<float> wide;

  StoredRow(DType dtype, const std::vector<float>& x) : wide(x.size()) {
    const int64_t D = int64_t(x.size());
    if (packed(dtype)) {
      bytes.resize(row_bytes(dtype, D));
      auto* const row = reinterpret_cast<uint8_t*>(bytes.data());
      half = naive::encode(dtype, x.data(), D, row);
      for (int64_t d = 0; d < D; ++d) wide[d] = float(naive::decode(dtype, row, half, D, d));
      return;
    }
    const Rows row(x, dtype, D);
    bytes = row.bytes;
    if (dtype == DType::i8) scale = row.scale[0];
    for (int64_t d = 0; d < D; ++d) {
      wide[d] = dtype == DType::i8 ? scale * float(int8_t(bytes[d])) : float(row.wide[d]);
    }
  }

  void put(void* rows, float* scales, uint16_t* halves, int64_t n) const {
    std::memcpy(static_cast<char*>(rows) + n * int64_t(bytes.size()), bytes.data(), bytes.size());
    if (scales != nullptr) scales[n] = scale;
    if (halves != nullptr) halves[n] = half;
  }
  bool lies_in(const void* rows, const float* scales, const uint16_t* halves, int64_t n) const {
    const char* const at = static_cast<const char*>(rows) + n * int64_t(bytes.size());
    return std::memcmp(at, bytes.data(), bytes.size()) == 0 &&
           (scales == nullptr || scales[n] == scale) && (halves == nullptr || halves[n] == half);
  }
};

struct Merging {
  StoredRow k, v;
  int32_t position;
  float score, weight;
  int64_t slot;  // -1: it joins
};

// Of `tokens` the S best stay; each of the others becomes part of the nearest that does.
std::vector<Merging> merged(std::vector<Merging> tokens, int64_t S, const Rule& rule, int64_t n,
                            DType k_dtype, DType v_dtype) {
  const auto rank = [&](const Merging& t) {
    return t.position >= n - rule.recent || t.position < rule.sinks ? INFINITY : t.score;
  };
  std::sort(tokens.begin(), tokens.end(), [&](const Merging& a, const Merging& b) {
    return rank(a) != rank(b) ? rank(a) > rank(b) : a.position > b.position;
  });
  const auto older = [](const Merging& a, const Merging& b) { return a.position < b.position; };
  const int64_t kept = std::min(S, int64_t(tokens.size()));
  std::vector<Merging> leave(tokens.begin() + kept, tokens.end()), stay = tokens;
  stay.erase(stay.begin() + kept, stay.end());
  std::sort(leave.begin(), leave.end(), older);
  std::sort(stay.begin(), stay.end(), older);
  std::vector<Merging> after = stay;
  std::vector<std::vector<float>> k, v;
  std::vector<float> mass;
  std::vector<bool> changed(stay.size());
  for (const Merging& t : stay) {
    k.push_back(t.k.wide);
    v.push_back(t.v.wide);
    mass.push_back(t.score + 1e-6f);
  }
  for (const Merging& i : leave) {
    double least = INFINITY;
    int64_t j = -1;
    for (size_t s = 0; s < stay.size(); ++s) {
      if (rank(stay[s]) == INFINITY) continue;
      double far = 0.0;
      for (size_t d = 0; d < i.k.wide.size(); ++d) {
        far += std::pow(double(i.k.wide[d]) - stay[s].k.wide[d], 2.0);
      }
      const double a = i.score + 1e-6, b = stay[s].score + 1e-6, cost = a * b / (a + b) * far;
      if (cost < least) {
        least = cost;
        j = int64_t(s);
      }
    }
    if (j < 0) continue;
    const float own = i.score + 1e-6f, part = own / (own + mass[j]);
    for (size_t d = 0; d < k[j].size(); ++d) {
      k[j][d] += part * (i.k.wide[d] - k[j][d]);
      v[j][d] += part * (i.v.wide[d] - v[j][d]);
    }
    mass[j] += own;
    after[j].score += i.score;
    after[j].weight = std::log(std::exp(after[j].weight) + std::exp(i.weight));
    after[j].position = std::max(after[j].position, i.position);
    changed[j] = true;
  }
  for (size_t j = 0; j < after.size(); ++j) {
    if (!changed[j]) continue;
    after[j].k = StoredRow(k_dtype, k[j]);
    after[j].v = StoredRow(v_dtype, v[j]);
  }
  return after;
}

// A step, or a call of T > 1 tokens, into full slots. Two slots have one key, and the other of them
// the lowest score.
void test_merge(DType k_dtype, DType v_dtype, int64_t D, int64_t T, int64_t recent) {
  const bool few = packed(v_dtype);
  const int64_t hot = few ? 1 : 0, cold = 37, S = cold + hot, seen_before = 100;
  const DType call_dtype = few ? DType::f32 : k_dtype;
  Layout layout{};
  layout.K = 1;
  layout.D = int32_t(D);
  layout.hot = int32_t(hot);
  layout.k_dtype = k_dtype;
  layout.v_dtype = v_dtype;
  layout.call_dtype = call_dtype;
  layout.weights = true;
  place_heads(layout, &S);
  std::vector<float> memory(layout.nbytes / 4 + kPageAlign);
  auto* const data = reinterpret_cast<unsigned char*>(memory.data());
  const Pool pool{data + (-reinterpret_cast<uintptr_t>(data)) % kPageAlign,
                  layout.nbytes,
                  1,
                  nullptr,
                  nullptr,
                  -1};
  clear_page(layout, pool.data);
  *seen(pool.data) = seen_before;
  const Slots slots = head(layout, pool.data, 0).slots;
  Random random(8);
  std::vector<Merging> tokens;
  std::vector<float> score = random.positive(S + T), weight = random.positive(cold);
  for (int64_t n = 0; few && n < cold; ++n) weight[n] = std::log(float(1 + n % 4));
  const auto noted = [few](float x) { return few ? to_float(from_float<fp16>(x)) : x; };
  for (float& s : score) s = noted(s);
  score[hot + 9] = noted(0.001f);
  if (T == 1) score[S] = 0.0f;  // as a step without scores has it
  for (int64_t n = 0; n < cold; ++n) {
    const std::vector<float> k = random.normal(D), v = random.normal(D);
    const auto position = int32_t(n * 7 % cold * 2);
    tokens.push_back({StoredRow(k_dtype, k), StoredRow(v_dtype, v), position, score[hot + n],
                      weight[n], hot + n});
    if (n == 9) tokens[9].k = tokens[5].k;
    tokens[n].k.put(slots.k, slots.k_scale, slots.k_half, n);
    tokens[n].v.put(slots.v, slots.v_scale, slots.v_half, n);
    slots.position[hot + n] = position;
    if (few) {
      slots.half[hot + n] = from_float<fp16>(score[hot + n]).bits;
      slots.count[hot + n] = uint16_t(1 + n % 4);
    } else {
      slots.score[hot + n] = score[hot + n];
      slots.weight[hot + n] = weight[n];
    }
  }
  const auto join = [&](const float* k, const float* v, int64_t position, float s) {
    tokens.push_back({StoredRow(k_dtype, {k, k + D}), StoredRow(v_dtype, {v, v + D}),
                      int32_t(position), s, 0.0f, -1});
  };
  if (few) {
    const std::vector<float> k = random.normal(D), v = random.normal(D);
    std::memcpy(slots.hot_k, k.data(), D * sizeof(float));
    std::memcpy(slots.hot_v, v.data(), D * sizeof(float));
    slots.position[0] = int32_t(seen_before - 1);
    slots.half[0] = from_float<fp16>(score[0]).bits;
    slots.count[0] = 1;
    join(k.data(), v.data(), seen_before - 1, score[0]);
  }
  std::vector<float> new_k = random.normal(T * D), new_v = random.normal(T * D), q(D), out(D);
  for (int64_t t = 0; t + hot < T; ++t) {  // the last one may be hot
    join(&new_k[t * D], &new_v[t * D], seen_before + t, score[S + t]);
  }
  const Rule rule{recent, 2, true, false, 0};
  const std::vector<Merging> wanted = merged(tokens, cold, rule, seen_before + T, k_dtype, v_dtype);
  const LayerSpec spec{.Q = 1,
                       .K = 1,
                       .D = D,
                       .scale = 0.1f,
                       .softcap = 0.0f,
                       .decay = 1.0f,
                       .scores = false,
                       .dependent = false,
                       .victim = Victim::merge,
                       .rule = rule};
  if (T == 1) {
    DecodeStepParams step{};
    step.spec = spec;
    step.layout = layout;
    step.pool = pool;
    step.q = contiguous_rows(q.data(), DType::f32, 1, 1, D);
    step.k = contiguous_rows(new_k.data(), DType::f32, 1, 1, D);
    step.v = contiguous_rows(new_v.data(), DType::f32, 1, 1, D);
    step.out = contiguous_rows(out.data(), DType::f32, 1, 1, D);
    step.B = 1;
    cpu::decode_step(step, 0, 1);
  } else {
    const Rows k(new_k, call_dtype, D), v(new_v, call_dtype, D);
    CompactParams call{};
    call.spec = spec;
    call.layout = layout;
    call.pool = pool;
    call.call = {contiguous_rows(k.bytes.data(), call_dtype, 1, T, D),
                 contiguous_rows(v.bytes.data(), call_dtype, 1, T, D),
                 k.scale.empty() ? nullptr : k.scale.data(),
                 v.scale.empty() ? nullptr : v.scale.data()};
    call.score = score.data();
    call.B = 1;
    call.T = T;
    cpu::compact(call, 0, 1);
  }
  std::vector<int64_t> free;
  for (int64_t s = hot; s < S; ++s) {
    const auto stays = [s](const Merging& t) { return t.slot == s; };
    if (std::none_of(wanted.begin(), wanted.end(), stays)) free.push_back(s);
  }
  size_t next = 0;
  for (const Merging& t : wanted) {  // in ascending position as they came
    const int64_t s = t.slot >= 0 ? t.slot : free[next++];
    const std::string which = "slot " + std::to_string(s);
    expect(slots.position[s] == t.position, which + "'s position");
    expect((few ? to_float(fp16{slots.half[s]}) : slots.score[s]) == noted(t.score),
           which + "'s score");
    expect_close(few ? std::log(double(slots.count[s])) : slots.weight[s], t.weight, 1e-6, "weight",
                 s);
    expect(t.k.lies_in(slots.k, slots.k_scale, slots.k_half, s - hot), which + "'s key");
    expect(t.v.lies_in(slots.v, slots.v_scale, slots.v_half, s - hot), which + "'s value");
  }
}

void test_level(const std::string& level) {
  cpu::set_level(level);
  where = level + " simd";
  test_simd();
  where = level + " clear_page";
  test_clear_page();
  for (int64_t D : {1, 6, 43, 64, 72, 80, 96, 128, 256, 512}) {
    where = level + " rotate";
    test_rotate(D);
  }
  for (int64_t D : {8, 64, 72, 80, 128, 1040}) {
    where = level + " packed D=" + std::to_string(D);
    for (DType dtype : {DType::b4, DType::b3, DType::b2}) test_packed(dtype, dtype, D);
    test_packed(DType::i8, DType::b4, D);
    test_packed(DType::b3, DType::b2, D);
  }
  for (int64_t D : {8, 43, 64, 72, 96, 128, 1040}) {
    where = level + " merge D=" + std::to_string(D);
    for (int64_t recent : {0, 6}) {
      for (int64_t T : {1, 2, 70}) {
        for (DType dtype : {DType::f32, DType::bf16, DType::fp16, DType::i8}) {
          test_merge(dtype, dtype, D, T, recent);
        }
        if (D % 8 != 0) continue;
        for (DType dtype : {DType::b4, DType::b3, DType::b2}) {
          test_merge(dtype, dtype, D, T, recent);
        }
        test_merge(DType::i8, DType::b4, D, T, recent);
      }
    }
  }
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
    where = level + " pages " + name(dtype);
    test_pages(dtype);
    for (int64_t held : {Layer::S, Layer::S - 3, int64_t(0)}) {
      where = level + " decode_step " + name(dtype) + " held=" + std::to_string(held);
      test_decode_step(dtype, held, Victim::none, {6, 2, true, false, 0});
      test_decode_step(dtype, held, Victim::forget, {6, 2, true, false, 0});
      test_decode_step(dtype, held, Victim::fold, {6, 2, true, true, 0});
      test_decode_step(dtype, held, Victim::fold, {Layer::S - 2, 2, false, false, 0});
      where += " softcap";
      test_decode_step(dtype, held, Victim::fold, {6, 2, true, true, 0}, 1.5f);
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
