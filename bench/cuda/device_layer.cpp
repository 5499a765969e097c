#include "device_layer.h"

#include <cstddef>
#include <cstdio>
#include <cstdlib>

namespace less::bench {

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "less_gpu: %s failed: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

namespace {

template <typename T>
T* allocate(int64_t count) {
  void* memory = nullptr;
  require(cudaMalloc(&memory, size_t(count) * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(memory);
}

}  // namespace

DeviceLayer::DeviceLayer(const Layer& host) : DeviceLayer(host, nullptr) {}

DeviceLayer::DeviceLayer(const Layer& host, const DeviceLayer& twin) : DeviceLayer(host, &twin) {}

DeviceLayer::DeviceLayer(const Layer& host, const DeviceLayer* twin) : host_(host) {
  const Shape& s = host_.shape();
  for (const Layer::Array& array : host_.arrays()) {
    void* const copy = allocate<std::byte>(int64_t(array.bytes));
    const void* const from = twin == nullptr ? array.data : twin->device_.at(array.data);
    const auto kind = twin == nullptr ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToDevice;
    require(cudaMemcpy(copy, from, array.bytes, kind), "cudaMemcpy");
    device_[array.data] = copy;
  }
  const int64_t rows = s.B * s.K * s.T;
  eight_ = allocate<uint8_t>(rows * s.D);
  scale_ = allocate<float>(rows);
  lse_ = allocate<float>(s.B * s.Q * s.T);
  score_ = allocate<float>(rows);
}

DeviceLayer::~DeviceLayer() {
  for (const auto& [host, device] : device_) cudaFree(device);
  for (void* memory :
       {eight_, static_cast<void*>(scale_), static_cast<void*>(lse_), static_cast<void*>(score_)}) {
    cudaFree(memory);
  }
}

template <typename T>
void DeviceLayer::move(T*& pointer) const {
  if (pointer != nullptr) pointer = static_cast<T*>(device_.at(pointer));
}

void DeviceLayer::move(HeadRows& rows) const { move(rows.data); }

void DeviceLayer::move(CallRows& call) const {
  move(call.k);
  move(call.v);
}

void DeviceLayer::move(FeatureMaps& maps) const {
  move(maps.w1);
  move(maps.w2);
  move(maps.w1_scale);
  move(maps.w2_scale);
  move(maps.bias);
}

void DeviceLayer::move(Maps& maps) const {
  move(maps.phi);
  move(maps.psi);
}

DecodeStepParams DeviceLayer::decode_step(void* workspace) const {
  DecodeStepParams p = host_.decode_step(Victim::fold);
  move(p.pool.data);
  move(p.maps);
  move(p.q);
  move(p.k);
  move(p.v);
  move(p.out);
  p.workspace = workspace;
  return p;
}

ChunkAttentionParams DeviceLayer::chunk_attention(void* workspace) const {
  ChunkAttentionParams p = host_.chunk_attention();
  move(p.pool.data);
  move(p.q);
  move(p.call);
  move(p.phi_q);
  move(p.out);
  move(p.score);
  move(p.share);
  p.received = nullptr;
  p.workspace = workspace;
  return p;
}

CompactParams DeviceLayer::compact(void* workspace) const {
  CompactParams p = host_.compact();
  move(p.pool.data);
  move(p.maps);
  move(p.call);
  move(p.score);
  p.workspace = workspace;
  return p;
}

FeatureMapParams DeviceLayer::phi() const {
  FeatureMapParams p = host_.phi();
  move(p.maps);
  move(p.x);
  move(p.y);
  return p;
}

FoldParams DeviceLayer::fold() const {
  FoldParams p = host_.fold();
  move(p.H);
  move(p.z);
  move(p.psi_k);
  move(p.v);
  return p;
}

QuantizeParams DeviceLayer::quantize(DType dtype) const {
  const Shape& s = host_.shape();
  QuantizeParams p{};
  p.x = chunk_attention(nullptr).call.k;
  p.eight = eight_;
  p.scale = scale_;
  p.dtype = dtype;
  p.B = s.B;
  p.heads = s.K;
  p.T = s.T;
  p.D = s.D;
  return p;
}

PromptScoresParams DeviceLayer::prompt_scores(void* workspace) const {
  const Shape& s = host_.shape();
  const ChunkAttentionParams chunk = chunk_attention(nullptr);
  PromptScoresParams p{};
  p.q = chunk.q.data;
  p.k = chunk.call.k.data;
  p.lse = lse_;
  p.score = score_;
  p.workspace = workspace;
  p.q_dtype = chunk.q.dtype;
  p.k_dtype = s.slots;
  p.scale = chunk.spec.scale;
  p.decay = chunk.spec.decay;
  p.B = s.B;
  p.Q = s.Q;
  p.K = s.K;
  p.T = s.T;
  p.D = s.D;
  return p;
}

}  // namespace less::bench
