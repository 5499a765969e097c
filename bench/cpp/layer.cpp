#include "layer.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "common/half.h"

namespace less::bench {
namespace {

// Pages of the machine's own size, as a caller's tensors have them.
constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t(2) << 20;

[[noreturn]] void out_of_memory(size_t bytes) {
  std::fprintf(stderr, "bench: out of memory for %zu bytes\n", bytes);
  std::exit(1);
}

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
    case DType::b4:
    case DType::b3:
    case DType::b2:
      break;  // several numbers are a byte: fill()
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
    case DType::b4:
      return "b4";
    case DType::b3:
      return "b3";
    case DType::b2:
      return "b2";
  }
  return "unknown";
}

int64_t slot_bytes(const Shape& s) {
  const int64_t hot = hot_slots(layout_of(s));
  const auto row = [&s](DType dtype) { return row_bytes(dtype, s.D) + scale_bytes(dtype); };
  return 2 * s.B * s.K * (hot * row(DType::i8) + (s.S - hot) * row(s.slots));
}

int64_t step_bytes(const Shape& s) {
  // position and log-weight are read, the score is read and written.
  const int64_t beside = 16 * s.B * s.K * s.S;
  const int64_t state = 8 * s.B * s.K * s.R * (s.D + 1);
  const int64_t maps =
      s.R == 0 ? 0 : (s.Q + s.K) * (bytes_of(s.maps) * (s.D * s.E + s.E * s.R) + 4 * s.R);
  return slot_bytes(s) + beside + state + maps;
}

Layout layout_of(const Shape& s) {
  const std::vector<int64_t> slots(s.K, s.S);
  if (!packed(s.slots)) return make_layout(s.slots, s.K, s.D, s.R, slots.data());
  Layout layout{};
  layout.K = int32_t(s.K);
  layout.D = int32_t(s.D);
  layout.R = int32_t(s.R);
  layout.sinks = 4;
  layout.hot = 16;
  layout.k_dtype = layout.v_dtype = s.slots;
  layout.call_dtype = DType::i8;
  layout.weights = s.weights;
  place_heads(layout, slots.data());
  return layout;
}

Pools::Pools(const Shape& shape, int64_t layers) : each_(shape.B * layout_of(shape).nbytes) {
  const size_t bytes = (size_t(layers * each_) + kHugePage - 1) / kHugePage * kHugePage;
  void* const memory = std::aligned_alloc(kHugePage, bytes);
  if (memory == nullptr) out_of_memory(bytes);
  madvise(memory, bytes, shape.huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  std::memset(memory, 0, bytes);
  memory_.reset(static_cast<std::byte*>(memory));
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
  if (memory == nullptr) out_of_memory(bytes);
  std::memset(memory, 0, bytes);
  held_.emplace_back(static_cast<std::byte*>(memory));
  sizes_.push_back(bytes);
  return static_cast<T*>(memory);
}

void Layer::fill(void* array, DType dtype, int64_t count, float scale) {
  if (packed(dtype)) {  // any bytes are codes
    const int64_t bytes = row_bytes(dtype, count);
    for (int64_t i = 0; i < bytes; ++i) {
      static_cast<uint8_t*>(array)[i] = uint8_t(127.0f + 127.0f * uniform());
    }
    return;
  }
  // A value of 8 bits is a share of its row's scale.
  const float factor = has_scale(dtype) ? 1.0f : scale;
  for (int64_t i = 0; i < count; ++i) put(array, dtype, i, factor * uniform());
}

void Layer::fill(float* array, int64_t count, float low, float high) {
  for (int64_t i = 0; i < count; ++i) array[i] = low + (high - low) * (0.5f + 0.5f * uniform());
}

void* Layer::values(DType dtype, int64_t count, float scale) {
  std::byte* array = make<std::byte>(count * bytes_of(dtype));
  fill(array, dtype, count, scale);
  return array;
}

float* Layer::floats(int64_t count, float low, float high) {
  float* array = make<float>(count);
  fill(array, count, low, high);
  return array;
}

const uint16_t* Layer::halves(int64_t count, float low, float high) {
  fp16* array = make<fp16>(count);
  for (int64_t i = 0; i < count; ++i) {
    array[i] = from_float<fp16>(low + (high - low) * (0.5f + 0.5f * uniform()));
  }
  return &array->bits;
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

Layer::Layer(const Shape& shape, uint64_t seed, std::byte* pool)
    : shape_(shape), layout_(layout_of(shape)), state_(0x9e3779b97f4a7c15u * (seed + 1)) {
  const Shape& s = shape_;
  const int64_t heads = s.B * s.K, tokens = heads * s.T;
  q_ = values(s.model, s.B * s.Q * s.T * s.D, 1.7f);
  k_ = values(token(), tokens * s.D, 1.7f);
  v_ = values(token(), tokens * s.D, 1.7f);
  out_ = values(s.model, s.B * s.Q * s.T * s.D, 1.0f);
  pool_ = {.data = reinterpret_cast<unsigned char*>(pool),
           .stride = layout_.nbytes,
           .N = s.B,
           .pages = nullptr,
           .fresh = nullptr,
           .null_page = -1};
  const auto fill_scales = [this](float* array, DType dtype, int64_t count) {
    const float step = dtype == DType::i8 ? 0.013f : 1.7f;
    fill(array, count, step, 1.08f * step);
  };
  for (int64_t i = 0; i < heads; ++i) {
    const auto [slots, state] = head(layout_, page(pool_, i / s.K), i % s.K);
    const int64_t W = slots.W, cold = s.S - W;
    fill(slots.k, s.slots, cold * s.D, 1.7f);
    fill(slots.v, s.slots, cold * s.D, 1.7f);
    if (slots.k_scale != nullptr) {
      fill_scales(slots.k_scale, s.slots, cold);
      fill_scales(slots.v_scale, s.slots, cold);
    }
    for (int64_t n = 0; packed(s.slots) && n < cold; ++n) {
      slots.k_half[n] = from_float<fp16>(1.0f + 0.04f * uniform()).bits;
      slots.v_half[n] = from_float<fp16>(1.0f + 0.04f * uniform()).bits;
    }
    if (W > 0) {
      fill(slots.hot_k, DType::i8, W * s.D, 1.0f);
      fill(slots.hot_v, DType::i8, W * s.D, 1.0f);
      fill_scales(slots.hot_k_scale, DType::i8, W);
      fill_scales(slots.hot_v_scale, DType::i8, W);
    }
    for (int64_t n = 0; n < s.S; ++n) {
      const float score = 0.5f + 0.5f * uniform();
      if (slots.half == nullptr) {
        slots.score[n] = score;
      } else {
        slots.half[n] = from_float<fp16>(score).bits;
      }
      if (slots.count != nullptr) slots.count[n] = 1;
    }
    if (s.R == 0) continue;
    fill(state.H, s.R * s.D, -1.0f, 1.0f);
    fill(state.z, s.R, 1.0f, 2.0f);
  }
  position_.resize(s.S);
  // Hot slots have the first tokens and the last. The others are taken in the order of eviction:
  // positions come in no order.
  const int64_t W = hot_slots(layout_);
  for (int64_t i = 0; i < s.S; ++i) {
    position_[i] = int32_t(i < layout_.sinks ? i : i - layout_.hot);
  }
  for (int64_t i = s.S - 1; i > W; --i) {
    const int64_t j = W + int64_t((0.5f + 0.499f * uniform()) * float(i + 1 - W));
    std::swap(position_[i], position_[j]);
  }
  for (int64_t at = s.S - layout_.hot; at < s.S; ++at) {
    position_[hot_slot(layout_, at)] = int32_t(at);
  }
  rewind();
  score_ = floats(heads * (s.S + s.T), 0.0f, 1.0f);
  share_q_ = make<float>(s.B * s.Q * s.T);
  received_ = make<float>(heads * (s.S + s.T));
  if (packed(s.slots)) {
    const int64_t numbers = s.K * s.D;
    maps_.space = {.key_mean = halves(numbers, -1.0f, 1.0f),
                   .key_scale = halves(numbers, 0.5f, 2.0f),
                   .value_mean = halves(numbers, -1.0f, 1.0f),
                   .value_scale = halves(numbers, 0.5f, 2.0f)};
  }
  if (s.R > 0) {
    H_ = floats(heads * s.R * s.D, -1.0f, 1.0f);
    z_ = floats(heads * s.R, 1.0f, 2.0f);
    phi_q_ = floats(s.B * s.Q * s.T * s.R, 0.0f, 1.0f);
    psi_k_ = floats(tokens * s.R, 0.0f, 1.0f);
    maps_.phi = maps(s.Q, s.maps);
    maps_.psi = maps(s.K, s.maps);
  }
}

void Layer::rewind() {
  const Shape& s = shape_;
  for (int64_t i = 0; i < s.B * s.K; ++i) {
    unsigned char* const own = page(pool_, i / s.K);
    std::copy(position_.begin(), position_.end(), head(layout_, own, i % s.K).slots.position);
    *seen(own) = s.S;
  }
}

void Layer::advance() {
  for (int64_t b = 0; b < shape_.B; ++b) *seen(page(pool_, b)) += shape_.T;
}

// A chunk comes in the slots' dtype, a step's token in the model's.
DType Layer::token() const { return shape_.T == 1 ? shape_.model : shape_.slots; }

HeadRows Layer::rows(void* data, DType dtype, int64_t heads) const {
  return contiguous_rows(data, dtype, heads, shape_.T, shape_.D);
}

LayerSpec Layer::spec(Victim victim) const {
  const Shape& s = shape_;
  return {
      .Q = s.Q,
      .K = s.K,
      .D = s.D,
      .scale = 1.0f / std::sqrt(float(s.D)),
      .softcap = 0.0f,
      .decay = 0.98f,
      .scores = victim != Victim::none,
      .dependent = false,
      .victim = victim == Victim::fold && s.R == 0 ? Victim::forget : victim,
      .rule = {.recent = s.S / 2, .sinks = 0, .by_score = true, .per_age = false, .capacity = 0}};
}

DecodeStepParams Layer::decode_step(Victim victim) const {
  const Shape& s = shape_;
  return {.spec = spec(victim),
          .layout = layout_,
          .pool = pool_,
          .maps = victim == Victim::none ? Maps{.phi = {}, .psi = {}, .space = maps_.space} : maps_,
          .q = rows(q_, s.model, s.Q),
          .k = rows(k_, token(), s.K),
          .v = rows(v_, token(), s.K),
          .out = rows(out_, s.model, s.Q),
          .valid = nullptr,
          .workspace = nullptr,
          .B = s.B};
}

ChunkAttentionParams Layer::chunk_attention() const {
  const Shape& s = shape_;
  return {.spec = spec(Victim::fold),
          .layout = layout_,
          .pool = pool_,
          .q = rows(q_, s.model, s.Q),
          .call = call(),
          .valid = nullptr,
          .phi_q = phi_q_,
          .shifted = false,
          .out = rows(out_, s.model, s.Q),
          .score = score_,
          .share = share_q_,
          .received = received_,
          .workspace = nullptr,
          .strips = 1,
          .B = s.B,
          .T = s.T};
}

CallRows Layer::call() const {
  return {.k = rows(k_, token(), shape_.K),
          .v = rows(v_, token(), shape_.K),
          .k_scale = nullptr,
          .v_scale = nullptr};
}

CompactParams Layer::compact() const {
  return {.spec = spec(Victim::fold),
          .layout = layout_,
          .pool = pool_,
          .maps = maps_,
          .call = call(),
          .valid = nullptr,
          .score = score_,
          .rank = nullptr,
          .workspace = nullptr,
          .B = shape_.B,
          .T = shape_.T};
}

FeatureMapParams Layer::phi() const {
  const Shape& s = shape_;
  return {.maps = maps_.phi,
          .x = rows(q_, s.model, s.Q),
          .y = phi_q_,
          .B = s.B,
          .heads = s.Q,
          .T = s.T};
}

FoldParams Layer::fold() const {
  const Shape& s = shape_;
  FoldParams p{};
  p.H = H_;
  p.z = z_;
  p.psi_k = psi_k_;
  p.v = v_;
  p.v_dtype = token();
  p.heads = s.B * s.K;
  p.N = s.T;
  p.R = s.R;
  p.D = s.D;
  return p;
}

std::vector<Layer::Array> Layer::arrays() const {
  std::vector<Array> all = {{pool_.data, size_t(pool_.N * pool_.stride)}};
  for (size_t i = 0; i < held_.size(); ++i) all.push_back({held_[i].get(), sizes_[i]});
  return all;
}

}  // namespace less::bench
