// A layer of bench/cpp on the GPU: the same params, their arrays copied to device memory. Layers
// that copy the same one hold the same numbers in memory of their own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>

#include "layer.h"
#include "params.h"

namespace less::bench {

// Ends the program with the call's name where it failed.
void require(cudaError_t error, const char* what);

class DeviceLayer {
 public:
  explicit DeviceLayer(const Layer& host);  // which must outlive it
  // The same once more, copied on the device: of a twin that no kernel has written yet.
  DeviceLayer(const Layer& host, const DeviceLayer& twin);
  ~DeviceLayer();
  DeviceLayer(const DeviceLayer&) = delete;
  DeviceLayer& operator=(const DeviceLayer&) = delete;

  DecodeStepParams decode_step(void* workspace) const;
  ChunkAttentionParams chunk_attention(void* workspace) const;
  CompactParams compact(void* workspace) const;
  FeatureMapParams phi() const;
  FoldParams fold() const;
  PromptScoresParams prompt_scores(void* workspace) const;  // of the call's tokens
  QuantizeParams quantize(DType dtype) const;               // of the call's keys

 private:
  DeviceLayer(const Layer& host, const DeviceLayer* twin);
  template <typename T>
  void move(T*& pointer) const;
  void move(HeadRows& rows) const;
  void move(CallRows& call) const;
  void move(FeatureMaps& maps) const;
  void move(Maps& maps) const;

  const Layer& host_;
  std::map<const void*, void*> device_;  // host array -> its copy
  void* eight_ = nullptr;                // what quantize writes
  float* scale_ = nullptr;
  float *lse_ = nullptr, *score_ = nullptr;  // what prompt_scores writes
};

}  // namespace less::bench
