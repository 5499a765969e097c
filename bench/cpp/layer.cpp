#include "layer.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "common/half.h"

namespace less::bench {
namespace {

// Pages of the machine's own size, as a caller's tensors have them.
constexpr size_t kPage = 4096;

void put(void* array, DType dtype, int64_t i, float x) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(array)[i] = x;
      return;
    case DType::bf16:
      static_cast<bf16*>(array)[i] = from_float<bf16>(x);
      return;
    case DType::fp16:
      static_cast<fp16*>(array)[i] = from_float<fp16>(x);
      return;
    case DType::i8:
      static_cast<int8_t*>(array)[i] = int8_t(std::lrint(127.0f * x));
      return;
    case DType::fp8:  // fp16 has the same bits after 8 doublings; the last ones are cut off
      static_cast<uint8_t*>(array)[i] = uint8_t(from_float<fp16>(0x1p-8f * x).bits >> 7 & 0x7f);
      return;
  }
}

}  // namespace

const char* name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::bf16:
      return "bfloat16";
    case DType::fp16:
      return "float16";
    case DType::i8:
      return "int8";
    case DType::fp8:
      return "float8_e4m3fn";
  }
  return "unknown";
}

int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : has_scales(dtype) ? 1 : 2; }

bool has_scales(DType dtype) { return dtype == DType::i8 || dtype == DType::fp8; }

int64_t slot_bytes(const Shape& s) {
  const int64_t scale = has_scales(s.slots) ? 4 : 0;
  return 2 * s.B * s.K * s.S * (s.D * bytes_of(s.slots) + scale);
}

int64_t step_bytes(const Shape& s) {
  // position and log-weight are read, the score is read and written.
  const int64_t beside = 16 * s.B * s.K * s.S;
  const int64_t state = 8 * s.B * s.K * s.R * (s.D + 1);
  const int64_t maps =
      s.R == 0 ? 0 : (s.Q + s.K) * (bytes_of(s.maps) * (s.D * s.E + s.E * s.R) + 4 * s.R);
  return slot_bytes(s) + beside + state + maps;
}

float Layer::uniform() {  // in [-1, 1), by xorshift
  state_ ^= state_ << 13;
  state_ ^= state_ >> 7;
  state_ ^= state_ << 17;
  return float(int32_t(state_ >> 32)) * 0x1p-31f;
}

template <typename T>
T* Layer::make(int64_t count) {
  const size_t bytes =
      (size_t(std::max<int64_t>(count, 1)) * sizeof(T) + kPage - 1) / kPage * kPage;
  void* memory = std::aligned_alloc(kPage, bytes);
  if (memory == nullptr) {
    std::fprintf(stderr, "bench: out of memory for %zu bytes\n", bytes);
    std::exit(1);
  }
  std::memset(memory, 0, bytes);
  held_.emplace_back(static_cast<std::byte*>(memory));
  sizes_.push_back(bytes);
  return static_cast<T*>(memory);
}

void* Layer::values(DType dtype, int64_t count, float scale) {
  std::byte* array = make<std::byte>(count * bytes_of(dtype));
  // A value of 8 bits is a share of its row's scale.
  const float factor = has_scales(dtype) ? 1.0f : scale;
  for (int64_t i = 0; i < count; ++i) put(array, dtype, i, factor * uniform());
  return array;
}

float* Layer::floats(int64_t count, float low, float high) {
  float* array = make<float>(count);
  for (int64_t i = 0; i < count; ++i) array[i] = low + (high - low) * (0.5f + 0.5f * uniform());
  return array;
}

FeatureMaps Layer::maps(int64_t heads, DType dtype) {
  const Shape& s = shape_;
  const float w1 = 1.7f / std::sqrt(float(s.D)), w2 = 1.7f / std::sqrt(float(s.E));
  FeatureMaps maps{};
  maps.w1 = values(dtype, heads * s.D * s.E, w1);
  maps.w2 = values(dtype, heads * s.E * s.R, w2);
  if (dtype == DType::i8) {
    maps.w1_scale = floats(heads * s.E, w1 / 127.0f, w1 / 127.0f);
    maps.w2_scale = floats(heads * s.R, w2 / 127.0f, w2 / 127.0f);
  }
  maps.bias = floats(heads * s.R, -1.0f, 1.0f);
  maps.kind = MapKind::exp;
  maps.w_dtype = dtype;
  maps.D = s.D;
  maps.E = s.E;
  maps.R = s.R;
  return maps;
}

Layer::Layer(const Shape& shape, uint64_t seed)
    : shape_(shape), state_(0x9e3779b97f4a7c15u * (seed + 1)) {
  const Shape& s = shape_;
  const int64_t heads = s.B * s.K, rows = heads * s.S, tokens = heads * s.T;
  q_ = values(s.model, s.B * s.Q * s.T * s.D, 1.7f);
  // A chunk comes in the slots' dtype, a step's token in the model's.
  const DType token = s.T == 1 ? s.model : s.slots;
  k_ = values(token, tokens * s.D, 1.7f);
  v_ = values(token, tokens * s.D, 1.7f);
  out_ = values(s.model, s.B * s.Q * s.T * s.D, 1.0f);
  slots_.k = values(s.slots, rows * s.D, 1.7f);
  slots_.v = values(s.slots, rows * s.D, 1.7f);
  const float step = s.slots == DType::i8 ? 0.013f : 1.7f;
  slots_.k_scale = has_scales(s.slots) ? floats(rows, step, 1.08f * step) : nullptr;
  slots_.v_scale = has_scales(s.slots) ? floats(rows, step, 1.08f * step) : nullptr;
  slots_.position = make<int32_t>(rows);
  slots_.score = floats(rows, 0.0f, 1.0f);
  slots_.weight = make<float>(rows);
  slots_.dtype = s.slots;
  slots_.S = s.S;
  seen_ = make<int64_t>(s.B);
  position_.resize(s.S);
  // Slots are taken in the order of eviction: positions come in no order.
  for (int64_t i = 0; i < s.S; ++i) position_[i] = int32_t(i);
  for (int64_t i = s.S - 1; i > 0; --i) {
    std::swap(position_[i], position_[int64_t((0.5f + 0.499f * uniform()) * float(i + 1))]);
  }
  rewind();
  slot_score_ = make<float>(rows);
  chunk_score_ = floats(tokens, 0.0f, 1.0f);
  share_q_ = make<float>(s.B * s.Q * s.T);
  received_ = make<float>(heads * (s.S + s.T));
  if (s.R > 0) {
    H_ = floats(heads * s.R * s.D, -1.0f, 1.0f);
    z_ = floats(heads * s.R, 1.0f, 2.0f);
    share_ = make<double>(heads);
    phi_q_ = floats(s.B * s.Q * s.T * s.R, 0.0f, 1.0f);
    psi_k_ = floats(tokens * s.R, 0.0f, 1.0f);
    phi_ = maps(s.Q, s.maps);
    psi_ = maps(s.K, s.maps);
  }
}

void Layer::rewind() {
  const Shape& s = shape_;
  for (int64_t head = 0; head < s.B * s.K; ++head) {
    std::copy(position_.begin(), position_.end(), slots_.position + head * s.S);
  }
  std::fill(seen_, seen_ + s.B, s.S);
}

void Layer::advance() {
  for (int64_t b = 0; b < shape_.B; ++b) seen_[b] += shape_.T;
}

DecodeStepParams Layer::decode_step(Victim victim) const {
  const Shape& s = shape_;
  const bool alone = victim == Victim::none;
  DecodeStepParams p{};
  p.q = q_;
  p.k = k_;
  p.v = v_;
  p.seen = seen_;
  p.slots = slots_;
  if (!alone && s.R > 0) {
    p.H = H_;
    p.z = z_;
    p.share = share_;
    p.phi = phi_;
    p.psi = psi_;
    p.R = s.R;
  }
  p.out = out_;
  p.rule = {.recent = s.S / 2, .sinks = 0, .by_score = true, .per_age = false};
  p.victim = victim == Victim::fold && s.R == 0 ? Victim::forget : victim;
  p.q_dtype = s.model;
  p.kv_dtype = s.model;
  p.scores = !alone;
  p.scale = 1.0f / std::sqrt(float(s.D));
  p.decay = 0.98f;
  p.B = s.B;
  p.Q = s.Q;
  p.K = s.K;
  p.D = s.D;
  return p;
}

ChunkAttentionParams Layer::chunk_attention() const {
  const Shape& s = shape_;
  ChunkAttentionParams p{};
  p.q = q_;
  p.k = k_;
  p.v = v_;
  p.slots = slots_;
  p.phi_q = phi_q_;
  p.H = H_;
  p.z = z_;
  p.out = out_;
  p.slot_score = slot_score_;
  p.chunk_score = chunk_score_;
  p.share = share_q_;
  p.received = received_;
  p.strips = 1;
  p.q_dtype = s.model;
  p.scores = true;
  p.scale = 1.0f / std::sqrt(float(s.D));
  p.decay = 0.98f;
  p.B = s.B;
  p.Q = s.Q;
  p.K = s.K;
  p.T = s.T;
  p.D = s.D;
  p.R = s.R;
  return p;
}

CompactParams Layer::compact() const {
  const Shape& s = shape_;
  CompactParams p{};
  p.k = k_;
  p.v = v_;
  p.chunk_score = chunk_score_;
  p.slot_score = slots_.score;
  p.slots = slots_;
  p.seen = seen_;
  p.H = H_;
  p.z = z_;
  p.psi = psi_;
  p.rule = {.recent = s.S / 2, .sinks = 0, .by_score = true, .per_age = false};
  p.B = s.B;
  p.K = s.K;
  p.T = s.T;
  p.D = s.D;
  p.R = s.R;
  return p;
}

FeatureMapParams Layer::phi() const {
  const Shape& s = shape_;
  FeatureMapParams p{};
  p.maps = phi_;
  p.x = q_;
  p.y = phi_q_;
  p.x_dtype = s.model;
  p.B = s.B;
  p.heads = s.Q;
  p.T = s.T;
  return p;
}

FoldParams Layer::fold() const {
  const Shape& s = shape_;
  FoldParams p{};
  p.H = H_;
  p.z = z_;
  p.psi_k = psi_k_;
  p.v = v_;
  p.v_dtype = s.T == 1 ? s.model : s.slots;
  p.heads = s.B * s.K;
  p.N = s.T;
  p.R = s.R;
  p.D = s.D;
  return p;
}

std::vector<Layer::Array> Layer::arrays() const {
  std::vector<Array> all;
  for (size_t i = 0; i < held_.size(); ++i) all.push_back({held_[i].get(), sizes_[i]});
  return all;
}

}  // namespace less::bench
