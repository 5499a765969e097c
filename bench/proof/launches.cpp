// Prints how the launchers of csrc/cuda would launch their kernels for the shapes of two models:
// one JSON object per launch, nothing runs. Linked with the kernels as the emulator compiles them,
// whose launches end here instead of in its runtime.
#include <dlfcn.h>

#include <cstdio>
#include <vector>

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

Layout layout_of(const Model& m, const Setting& s) {
  const std::vector<int64_t> slots(size_t(m.K), s.C);
  return make_layout(DType::fp16, m.K, m.D, R, slots.data());
}

Pool pool_of(const Layout& layout, int64_t B) {
  return {somewhere<unsigned char>(), layout.nbytes, B, nullptr, nullptr, -1};
}

HeadRows rows_of(const Model& m, int64_t heads, int64_t T) {
  return contiguous_rows(somewhere<void>(), DType::fp16, heads, T, m.D);
}

LayerSpec spec_of(const Model& m, const Setting& s) {
  LayerSpec spec{};
  spec.Q = m.Q, spec.K = m.K, spec.D = m.D;
  spec.scale = 0.088f;
  spec.decay = 1.0f;
  spec.scores = true;
  spec.victim = Victim::fold;
  spec.rule = {s.C / 2, 0, true, false, 0};
  return spec;
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

Maps both_maps(const Model& m, const Setting& s) {
  return {maps_of(m, s, false), maps_of(m, s, true)};
}

cudaError_t decode(const Model& m, const Setting& s, int64_t B) {
  DecodeStepParams p{};
  p.spec = spec_of(m, s);
  p.layout = layout_of(m, s);
  p.pool = pool_of(p.layout, B);
  p.maps = both_maps(m, s);
  p.q = p.out = rows_of(m, m.Q, 1);
  p.k = p.v = rows_of(m, m.K, 1);
  p.workspace = somewhere<void>();
  p.B = B;
  return cuda::decode_step(p, nullptr);
}

cudaError_t chunk(const Model& m, const Setting& s, int64_t B) {
  ChunkAttentionParams p{};
  p.spec = spec_of(m, s);
  p.layout = layout_of(m, s);
  p.pool = pool_of(p.layout, B);
  p.q = p.out = rows_of(m, m.Q, kChunk);
  p.call.k = p.call.v = rows_of(m, m.K, kChunk);
  p.phi_q = somewhere<float>();
  p.score = p.share = p.received = somewhere<float>();
  p.workspace = somewhere<void>();
  p.strips = 1;
  p.B = B, p.T = kChunk;
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
  p.spec = spec_of(m, s);
  p.layout = layout_of(m, s);
  p.pool = pool_of(p.layout, B);
  p.maps = both_maps(m, s);
  p.call.k = p.call.v = rows_of(m, m.K, kChunk);
  p.score = somewhere<float>();
  p.workspace = somewhere<void>();
  p.B = B, p.T = kChunk;
  return cuda::compact(p, nullptr);
}

cudaError_t features(const Model& m, const Setting& s, int64_t B) {
  FeatureMapParams p{};
  p.maps = maps_of(m, s, false);
  p.x = rows_of(m, m.Q, kChunk);
  p.y = somewhere<float>();
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
  p.x = rows_of(m, m.K, kChunk);
  p.eight = somewhere<int8_t>();
  p.scale = somewhere<float>();
  p.dtype = DType::i8;
  p.B = B, p.heads = m.K, p.T = kChunk, p.D = m.D;
  return cuda::quantize(p, nullptr);
}

cudaError_t reset(const Model& m, const Setting& s, int64_t B) {
  ResetParams p{};
  p.layout = layout_of(m, s);
  p.pool = pool_of(p.layout, B);
  p.pool.fresh = somewhere<int32_t>();
  p.B = B;
  return cuda::reset_pages(p, nullptr);
}

struct Op {
  const char* name;
  cudaError_t (*launch)(const Model&, const Setting&, int64_t);
  bool setting;  // whether it matters
};
constexpr Op kOps[] = {{"decode_step", decode, true},    {"chunk_attention", chunk, true},
                       {"prompt_scores", prompt, false}, {"compact", compact, true},
                       {"feature_map", features, true},  {"fold", fold, false},
                       {"quantize", quantize, false},    {"reset_pages", reset, true}};

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
