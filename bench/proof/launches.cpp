// Prints how the launchers of csrc/cuda would launch their kernels for the shapes of two models:
// one JSON object per launch, nothing runs. Linked with the kernels as the emulator compiles them,
// whose launches end here instead of in its runtime.
#include <dlfcn.h>

#include <cstdio>

#include "cuda/decode_step/plan.h"
#include "cuda/kernels.h"
#include "emulator/runtime.h"

namespace less::emulator {

static const void* kernel;
static const char* what;  // op, model, B, C as JSON

Translated translated(const void* launched) {
  kernel = launched;
  return nullptr;
}

cudaError_t run(const LaunchConfig& config, void (*)(void*), void*) {
  Dl_info symbol{};
  if (!dladdr(kernel, &symbol) || symbol.dli_sname == nullptr) return cudaErrorInvalidValue;
  const dim3 &grid = config.grid, &block = config.block;
  std::printf(
      "{%s, \"kernel\": \"%s\", \"grid\": [%u, %u, %u], \"threads\": %u, \"shared\": %zu, "
      "\"cluster\": %d}\n",
      what, symbol.dli_sname, grid.x, grid.y, grid.z, block.x * block.y * block.z, config.shared,
      config.cluster);
  return cudaSuccess;
}

}  // namespace less::emulator

namespace {

using namespace less;

struct Model {
  const char* name;
  int64_t Q, K, D;
};
constexpr Model kModels[] = {{"Llama-2-7B", 32, 32, 128}, {"Llama-3-8B", 32, 8, 128}};
constexpr int64_t kBatches[] = {1, 8, 64};
struct Setting {
  int64_t C, E;
  MapKind kind;
};
constexpr Setting kSettings[] = {{205, 64, MapKind::exp},  // 5 % of 4,096 tokens
                                 {205, 512, MapKind::paper},
                                 {1024, 64, MapKind::exp}};
constexpr int64_t R = 8;
constexpr int64_t kChunk = 512;
using Tile = cuda::DecodeTile<__half, 128>;

// A pointer that launchers may look at but not through.
template <typename T>
T* somewhere() {
  return reinterpret_cast<T*>(uintptr_t{1} << 20);
}

Slots slots_of(const Setting& s) {
  Slots slots{};
  slots.k = slots.v = somewhere<void>();
  slots.position = somewhere<int32_t>();
  slots.score = slots.weight = somewhere<float>();
  slots.dtype = DType::fp16;
  slots.S = s.C;
  return slots;
}

FeatureMaps maps_of(const Model& m, const Setting& s, bool psi) {
  FeatureMaps maps{};
  maps.w1 = maps.w2 = somewhere<void>();
  const bool paper = s.kind == MapKind::paper;
  if (!paper) maps.bias = somewhere<float>();
  if (paper && psi) maps.mix = maps.scale = maps.mix_scale = somewhere<float>();
  maps.kind = s.kind;
  maps.w_dtype = DType::fp16;
  maps.D = m.D;
  maps.E = s.E;
  maps.R = R;
  return maps;
}

cudaError_t decode(const Model& m, const Setting& s, int64_t B) {
  DecodeStepParams p{};
  p.q = p.k = p.v = somewhere<void>();
  p.out = p.workspace = somewhere<void>();
  p.seen = somewhere<int64_t>();
  p.slots = slots_of(s);
  p.H = p.z = somewhere<float>();
  p.share = somewhere<double>();
  p.phi = maps_of(m, s, false);
  p.psi = maps_of(m, s, true);
  p.rule = {s.C / 2, 0, true, false};
  p.victim = Victim::fold;
  p.q_dtype = p.kv_dtype = DType::fp16;
  p.scores = true;
  p.scale = 0.088f;
  p.decay = 1.0f;
  p.B = B, p.Q = m.Q, p.K = m.K, p.D = m.D, p.R = R;
  return cuda::decode_step(p, nullptr);
}

cudaError_t chunk(const Model& m, const Setting& s, int64_t B) {
  ChunkAttentionParams p{};
  p.q = p.k = p.v = somewhere<void>();
  p.slots = slots_of(s);
  p.phi_q = p.H = p.z = somewhere<float>();
  p.out = p.workspace = somewhere<void>();
  p.slot_score = p.chunk_score = p.share = p.received = somewhere<float>();
  p.q_dtype = DType::fp16;
  p.scores = true;
  p.scale = 0.088f;
  p.decay = 1.0f;
  p.strips = 1;
  p.B = B, p.Q = m.Q, p.K = m.K, p.T = kChunk, p.D = m.D, p.R = R;
  return cuda::chunk_attention(p, nullptr);
}

cudaError_t prompt(const Model& m, const Setting&, int64_t B) {
  PromptScoresParams p{};
  p.q = p.k = somewhere<void>();
  p.lse = p.score = somewhere<float>();
  p.workspace = somewhere<void>();
  p.q_dtype = p.k_dtype = DType::fp16;
  p.scale = 0.088f;
  p.decay = 1.0f;
  p.B = B, p.Q = m.Q, p.K = m.K, p.T = kChunk, p.D = m.D;
  return cuda::prompt_scores(p, nullptr);
}

cudaError_t compact(const Model& m, const Setting& s, int64_t B) {
  CompactParams p{};
  p.k = p.v = somewhere<void>();
  p.chunk_score = p.slot_score = somewhere<float>();
  p.slots = slots_of(s);
  p.seen = somewhere<int64_t>();
  p.H = p.z = somewhere<float>();
  p.workspace = somewhere<void>();
  p.psi = maps_of(m, s, true);
  p.rule = {s.C / 2, 0, true, false};
  p.B = B, p.K = m.K, p.T = kChunk, p.D = m.D, p.R = R;
  return cuda::compact(p, nullptr);
}

cudaError_t features(const Model& m, const Setting& s, int64_t B) {
  FeatureMapParams p{};
  p.maps = maps_of(m, s, false);
  p.x = somewhere<void>();
  p.y = somewhere<float>();
  p.x_dtype = DType::fp16;
  p.B = B, p.heads = m.Q, p.T = kChunk;
  return cuda::feature_map(p, nullptr);
}

cudaError_t fold(const Model& m, const Setting&, int64_t B) {
  FoldParams p{};
  p.H = p.z = somewhere<float>();
  p.psi_k = somewhere<float>();
  p.v = somewhere<void>();
  p.v_dtype = DType::fp16;
  p.heads = B * m.K, p.N = 1, p.R = R, p.D = m.D;
  return cuda::fold(p, nullptr);
}

cudaError_t quantize(const Model& m, const Setting&, int64_t B) {
  QuantizeParams p{};
  p.x = somewhere<void>();
  p.eight = somewhere<int8_t>();
  p.scale = somewhere<float>();
  p.x_dtype = DType::fp16;
  p.dtype = DType::i8;
  p.rows = B * m.K * kChunk, p.D = m.D;
  return cuda::quantize(p, nullptr);
}

struct Op {
  const char* name;
  cudaError_t (*launch)(const Model&, const Setting&, int64_t);
  bool setting;  // whether it matters
};
constexpr Op kOps[] = {{"decode_step", decode, true},    {"chunk_attention", chunk, true},
                       {"prompt_scores", prompt, false}, {"compact", compact, true},
                       {"feature_map", features, true},  {"fold", fold, false},
                       {"quantize", quantize, false}};

bool print(const Op& op, const Model& m, const Setting& s, int64_t B) {
  const bool ring = op.launch == decode;
  char text[250];
  std::snprintf(text, sizeof text,
                "\"op\": \"%s\", \"model\": \"%s\", \"Q\": %d, \"K\": %d, \"D\": %d, \"B\": %d, "
                "\"C\": %d, \"E\": %d, \"R\": %d, \"map\": \"%s\", \"stages\": %d, \"rows\": %d",
                op.name, m.name, int(m.Q), int(m.K), int(m.D), int(B), int(s.C), int(s.E), int(R),
                s.kind == MapKind::exp ? "exp" : "paper", ring ? Tile::kStages : 0,
                ring ? Tile::kRows : 0);
  emulator::what = text;
  const cudaError_t error = op.launch(m, s, B);
  if (error != cudaSuccess) std::fprintf(stderr, "{%s}: error %d\n", text, int(error));
  return error == cudaSuccess;
}

}  // namespace

int main() {
  for (const Op& op : kOps) {
    for (const Model& m : kModels) {
      for (const Setting& s : kSettings) {
        if (!op.setting && &s != kSettings) continue;
        for (int64_t B : kBatches) {
          if (!print(op, m, s, B)) return 1;
        }
      }
    }
  }
  return 0;
}
