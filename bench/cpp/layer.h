// A layer of a cache in mid-life, without torch: full slots, a state, maps, a call of T tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "params.h"

namespace less::bench {

struct Shape {
  const char* name;
  int64_t Q;
  int64_t K;
  int64_t D;
  int64_t S;      // slots: tokens kept a head
  int64_t R = 8;  // 0: no state
  int64_t E = 64;
  int64_t T = 1;  // tokens of a call
  int64_t B = 1;
  DType slots = DType::fp16;  // packed: 4 sinks and 16 others are hot, of int8, in a space
  DType maps = DType::f32;
  DType model = DType::fp16;  // of q, k, v and out
  bool huge_pages = true;     // of memory, where the system gives some
  bool weights = true;        // whether slots of packed rows have log-weights

  bool operator==(const Shape&) const = default;
};

const char* name(DType dtype);
// What a decode step must read of k and v: 2 B K S rows and their scales.
int64_t slot_bytes(const Shape& shape);
// The above, scores, positions and log-weights, the state read and written, and the maps once.
int64_t step_bytes(const Shape& shape);

Layout layout_of(const Shape& shape);

// Memory of the pools of so many layers, as less/layer/pool.py allocates it: one piece, zero, at a
// multiple of 2 MiB, for which huge pages are asked, or refused.
class Pools {
 public:
  Pools(const Shape& shape, int64_t layers);
  std::byte* of(int64_t layer) const { return memory_.get() + layer * each_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  int64_t each_;
  std::unique_ptr<std::byte, Free> memory_;
};

class Layer {
 public:
  // `pool`: B pages, zero; what Pools gave, which must outlive this.
  Layer(const Shape& shape, uint64_t seed, std::byte* pool);

  DecodeStepParams decode_step(Victim victim) const;
  ChunkAttentionParams chunk_attention() const;  // in one strip
  CompactParams compact() const;
  FeatureMapParams phi() const;
  FoldParams fold() const;  // of the call's tokens

  // Puts back what compact and fold have changed, and is no part of any timing.
  void rewind();
  // Counts the tokens that a step has taken in.
  void advance();

  const Shape& shape() const { return shape_; }
  // Every array that the params above point to, with its bytes.
  struct Array {
    void* data;
    size_t bytes;
  };
  std::vector<Array> arrays() const;

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  using Bytes = std::unique_ptr<std::byte, Free>;

  template <typename T>
  T* make(int64_t count);
  void* values(DType dtype, int64_t count, float scale);
  void fill(void* array, DType dtype, int64_t count, float scale);
  void fill(float* array, int64_t count, float low, float high);
  float* floats(int64_t count, float low, float high);
  FeatureMaps maps(int64_t heads, DType dtype);
  const uint16_t* halves(int64_t count, float low, float high);
  float uniform();
  HeadRows rows(void* data, DType dtype, int64_t heads) const;
  LayerSpec spec(Victim victim) const;
  CallRows call() const;
  DType token() const;  // of k and v

  Shape shape_;
  Layout layout_;
  Pool pool_;
  uint64_t state_;
  std::vector<Bytes> held_;
  std::vector<size_t> sizes_;  // of held_
  void *q_, *k_, *v_, *out_;
  std::vector<int32_t> position_;      // of one head, for rewind
  float *H_ = nullptr, *z_ = nullptr;  // of the op fold, which knows no pages
  float *phi_q_ = nullptr, *psi_k_ = nullptr;
  float *score_, *share_q_, *received_;
  Maps maps_{};
};

}  // namespace less::bench
