// Runs a decode step's blocks of the first head of one batch row or two with clocks, and prints
// what they did.
//
// A line of input is a shape, "Q K D C E R B sinks hot", or an option of the emulator's,
// "name=value". Rows are fp16, or, where there are hot slots, k4v4 with hot rows of int8 and no
// state. For a shape come two lines of JSON: the emulator's profile of one row's blocks, and of two
// rows'; of a batch of one, twice the same. Linked with decode_step's launchers and the translated
// kernels that keep clocks.
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "common/half.h"
#include "cuda/kernels.h"
#include "emulator/control.h"

namespace {

using namespace less;

std::mt19937 random_bits(1);

std::vector<uint16_t> halves(int64_t n, float most) {
  std::uniform_real_distribution<float> uniform(-most, most);
  std::vector<uint16_t> out(size_t(n), 0);
  for (uint16_t& x : out) x = from_float<fp16>(uniform(random_bits)).bits;
  return out;
}

// Every slot of the first head holds a token, and its state many.
void fill(const Layout& layout, unsigned char* page) {
  std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
  const Head own = head(layout, page, 0);
  const int64_t S = own.slots.S, W = own.slots.W;
  const auto put = [](void* to, const std::vector<uint16_t>& x) {
    std::copy(x.begin(), x.end(), static_cast<uint16_t*>(to));
  };
  // Half floats, or any bytes: codes, and numbers of 8 bits.
  for (void* rows : {own.slots.k, own.slots.v}) {
    put(rows, halves((S - W) * row_bytes(layout.k_dtype, layout.D) / 2, 1.0f));
  }
  if (W > 0) {
    for (void* rows : {own.slots.hot_k, own.slots.hot_v}) put(rows, halves(W * layout.D / 2, 1.0f));
    for (float* scales : {own.slots.hot_k_scale, own.slots.hot_v_scale}) {
      std::fill(scales, scales + W, 0.01f);
    }
    for (uint16_t* scales : {own.slots.k_half, own.slots.v_half}) put(scales, halves(S - W, 0.1f));
  }
  for (int64_t i = 0; i < S; ++i) {
    own.slots.position[i] = int32_t(100 + i);
    const float score = uniform(random_bits);
    if (own.slots.half != nullptr) {
      own.slots.half[i] = from_float<fp16>(score).bits;
    } else {
      own.slots.score[i] = score;
    }
    if (own.slots.weight != nullptr) own.slots.weight[i] = 0.0f;
  }
  for (int64_t i = 0; i < layout.R * layout.D; ++i) own.state.H[i] = uniform(random_bits);
  for (int64_t i = 0; i < layout.R; ++i) own.state.z[i] = uniform(random_bits);
  *seen(page) = 100 + S;
}

bool run(std::istringstream& shape) {
  int64_t Q, K, D, C, E, R, B, sinks, hot;
  if (!(shape >> Q >> K >> D >> C >> E >> R >> B >> sinks >> hot)) return false;
  const std::vector<int64_t> slots(size_t(K), C);
  DecodeStepParams p{};
  p.layout = make_layout(DType::fp16, K, D, R, slots.data());
  if (hot > 0) {
    p.layout.weights = false;
    p.layout.k_dtype = p.layout.v_dtype = DType::b4;
    p.layout.call_dtype = DType::i8;
    p.layout.sinks = int32_t(sinks), p.layout.hot = int32_t(hot);
  }
  place_heads(p.layout, slots.data());
  // Two pages for all rows: only the first head of two runs.
  const int64_t stride = (p.layout.nbytes + kPageAlign - 1) / kPageAlign * kPageAlign;
  auto* const pool =
      static_cast<unsigned char*>(std::aligned_alloc(size_t(kPageAlign), size_t(2 * stride)));
  for (int64_t i = 0; i < 2; ++i) fill(p.layout, pool + i * stride);
  std::vector<int32_t> pages(size_t(B), 1);
  pages[0] = 0;
  p.pool = {pool, stride, 2, pages.data(), nullptr, -1};
  p.spec.Q = Q, p.spec.K = K, p.spec.D = D;
  p.spec.scale = 0.088f, p.spec.decay = 0.98f, p.spec.scores = true;
  p.spec.victim = R > 0 ? Victim::fold : Victim::forget;
  p.spec.rule = {C / 2, 0, true, false, 0};
  const auto q = halves(B * Q * D, 1.0f), k = halves(B * K * D, 1.0f);
  auto out = q;
  const auto phi1 = halves(Q * D * E, 0.1f), phi2 = halves(Q * E * R, 0.1f);
  const auto psi1 = halves(K * D * E, 0.1f), psi2 = halves(K * E * R, 0.1f);
  const std::vector<float> bias(size_t(Q * R), 0.1f);
  const auto maps = [&](const std::vector<uint16_t>& w1, const std::vector<uint16_t>& w2) {
    FeatureMaps m{};
    m.kind = MapKind::exp;
    m.w1 = w1.data(), m.w2 = w2.data(), m.bias = bias.data();
    m.w_dtype = DType::fp16;
    m.D = D, m.E = E, m.R = R;
    return m;
  };
  if (R > 0) p.maps = {maps(phi1, phi2), maps(psi1, psi2)};
  p.q = contiguous_rows(q.data(), DType::fp16, Q, 1, D);
  p.out = contiguous_rows(out.data(), DType::fp16, Q, 1, D);
  p.k = p.v = contiguous_rows(k.data(), DType::fp16, K, 1, D);
  p.B = B;
  const int64_t bytes = cuda::decode_step_workspace(p);
  std::vector<uint64_t> workspace(size_t(bytes / 8 + 2), 0);
  p.workspace = workspace.data();
  cudaError_t error = cudaSuccess;
  less_emulator_set("stride", std::to_string(K).c_str());
  for (const char* rows : {"1", B > 1 ? "2" : "1"}) {
    less_emulator_set("rows", rows);
    less_emulator_reset();
    error = cuda::decode_step(p, nullptr);
    if (error != cudaSuccess || less_emulator_error_count() > 0) {
      std::fprintf(stderr, "error %d: %s\n", int(error), less_emulator_errors_json());
      return false;
    }
    std::puts(less_emulator_profile_json());
    std::fflush(stdout);
  }
  std::free(pool);
  return true;
}

}  // namespace

int main() {
  std::string line;
  while (std::getline(std::cin, line)) {
    const size_t equals = line.find('=');
    if (equals == std::string::npos) {
      std::istringstream shape(line);
      if (!run(shape)) return 1;
    } else if (less_emulator_set(line.substr(0, equals).c_str(), &line[equals + 1])) {
      std::fprintf(stderr, "no such option: %s\n", line.c_str());
      return 2;
    }
  }
  return 0;
}
