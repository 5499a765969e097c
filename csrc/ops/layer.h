// What ops are given of a layer: its constants, its pool of pages, its maps, and rows of heads.
//
// `layer` is int64 [R + 1, S, kFixed + K] on the CPU, as less.layer.encode makes it: the numbers of
// layer_fields, then each head's slots, repeated without being copied. Its shape is for those who
// trace through an op, who see shapes alone.
#pragma once

#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "ops/check.h"

namespace less::ops {

struct LayerArguments {
  LayerSpec spec;
  Layout layout;
  int64_t kind;      // of the maps; -1: there are none
  DType w_dtype;     // of their matrices
  int64_t E;         // their hidden width
  uint64_t present;  // which tensors it has: bits in the order of less.layer.kinds.ORDER
  int32_t null_page;
  bool has_rule;  // false: the spec's rule is none, and ranks are the caller's

  bool has_space() const { return (present & 1) != 0; }
  // Whether what queries' logits lack in the space is added where they meet the state.
  bool shifted() const { return has_space() && kind >= 0 && !centred(MapKind(kind)); }
};

namespace layer_fields {
enum : int64_t {
  version,
  Q,
  K,
  D,
  k_dtype,
  v_dtype,
  call_dtype,
  hot_sinks,
  hot,
  weights,
  R,
  victim,
  scores,
  dependent,
  null_page,
  has_rule,
  recent,
  sinks,
  by_score,
  per_age,
  rule_capacity,
  scale,
  softcap,
  decay,
  kind,
  w_dtype,
  E,
  map_rank,
  present,
  kFixed
};
}  // namespace layer_fields

// Whether this library's kernels have a format of rows.
constexpr bool has_kernels([[maybe_unused]] DType dtype) {
#ifdef LESS_LAUNCHES
  return true;
#else
  return dtype != DType::fp8;
#endif
}

// The constants of a layer. Whatever the numbers are, what they lead to lies within the pool and
// the maps that are checked against them. `any`: of formats that have no kernels here, too.
inline LayerArguments read_layer(const char* op, const Tensor& layer, bool any = false) {
  using namespace layer_fields;
  // Bytes of a page: no product below overflows, nor does Layout::first.
  constexpr int64_t kMost = int64_t{1} << 37;
  const bool numbers = layer.dim() == 3 && layer.scalar_type() == ScalarType::Long &&
                       layer.device().is_cpu() && layer.numel() > 0 && layer.stride(2) == 1;
  if (!numbers || layer.size(2) <= kFixed) {
    fail(op, ": layer must be what less.layer.encode makes, int64 [R + 1, S, ", int64_t(kFixed),
         " + K] on a CPU, got ", dtype_name(layer.scalar_type()), ' ', shape_text(layer.sizes()));
  }
  const int64_t count = layer.size(2);
  const int64_t* const x = layer.const_data_ptr<int64_t>();
  const auto number = [x](int64_t i) {
    double value;
    std::memcpy(&value, x + i, sizeof value);
    return value;
  };
  const auto within = [op, x](const char* name, int64_t i, int64_t low, int64_t high) {
    if (x[i] < low || x[i] > high) {
      fail(op, ": layer's ", name, " must be in ", low, " .. ", high, ", got ", x[i]);
    }
  };
  if (x[version] != 4) fail(op, ": layer must be of version 4, got ", x[version]);
  within("K", K, 1, kMaxKvHeads);
  within("Q", Q, 1, 1 << 20);
  within("D", D, 1, 1 << 16);
  within("R", R, 0, 1 << 16);
  if (x[Q] % x[K] != 0) fail(op, ": q's heads must be a multiple of ", x[K], ", got ", x[Q]);
  for (const auto& [name, i] : {std::pair{"k_dtype", k_dtype}, std::pair{"v_dtype", v_dtype},
                                std::pair{"call_dtype", call_dtype}}) {
    within(name, i, 0, int64_t(DType::b2));
    if (!any && !has_kernels(DType(x[i]))) fail(op, ": layer's ", name, " has no kernels: ", x[i]);
  }
  const bool few = packed(DType(x[k_dtype])) || packed(DType(x[v_dtype]));
  within("hot_sinks", hot_sinks, 0, few ? 1 << 20 : 0);
  within("hot", hot, few ? 1 : 0, few ? 1 << 20 : 0);
  if (few ? !packed(DType(x[v_dtype])) || packed(DType(x[call_dtype])) || x[D] % 8 != 0
          : x[k_dtype] != x[v_dtype] || x[k_dtype] != x[call_dtype]) {
    fail(op, ": layer's dtypes do not go together: ", x[k_dtype], ", ", x[v_dtype], " and ",
         x[call_dtype], " at head dim ", x[D]);
  }
  within("weights", weights, few ? 0 : 1, 1);
  within("victim", victim, 0, int64_t(kLastVictim));
  if (weighs(Victim(x[victim])) && x[weights] == 0) {
    fail(op, ": victim merge needs slots with log-weights");
  }
  for (const auto& [name, i] : {std::pair{"scores", scores}, std::pair{"dependent", dependent},
                                std::pair{"has_rule", has_rule}, std::pair{"by_score", by_score},
                                std::pair{"per_age", per_age}}) {
    within(name, i, 0, 1);
  }
  within("recent", recent, 0, INT64_MAX);
  within("sinks", sinks, 0, INT64_MAX);
  within("rule's capacity", rule_capacity, 0, INT32_MAX);
  if (x[rule_capacity] > 0) within("recent", recent, 0, INT32_MAX);
  within("kind", kind, -1, int64_t(MapKind::centroid));
  within("dtype of maps", w_dtype, 0, int64_t(DType::i8));
  within("hidden width", E, 0, 1 << 20);
  within("null_page", null_page, INT32_MIN, INT32_MAX);
  if (count != kFixed + x[K]) {
    fail(op, ": layer must list the slots of ", x[K], " kv heads, got ", count - kFixed);
  }
  Layout layout{};
  layout.K = int32_t(x[K]);
  layout.D = int32_t(x[D]);
  layout.R = int32_t(x[R]);
  layout.sinks = int32_t(x[hot_sinks]);
  layout.hot = int32_t(x[hot]);
  layout.weights = x[weights] != 0;
  layout.k_dtype = DType(x[k_dtype]);
  layout.v_dtype = DType(x[v_dtype]);
  layout.call_dtype = DType(x[call_dtype]);
  int64_t bytes = 0;
  for (int64_t h = 0; h < x[K]; ++h) {
    within("slots", kFixed + h, hot_slots(layout) + 1, INT32_MAX / 2);
    bytes += head_offsets(formats(layout), x[D], x[R], x[kFixed + h]).nbytes;
    if (bytes > kMost) fail(op, ": layer's page must have at most ", kMost, " bytes");
  }
  if (!(float(number(scale)) > 0.0F && std::isfinite(float(number(scale))))) {
    fail(op, ": scale must be finite and positive, got ", number(scale));
  }
  check_softcap(op, number(softcap));
  if (!(number(decay) > 0.0 && number(decay) <= 1.0)) {
    fail(op, ": decay must be in (0, 1], got ", number(decay));
  }
  if (x[kind] >= 0 && x[map_rank] != x[R]) {
    fail(op, ": maps must have the state's rank, ", x[R], ", got ", x[map_rank]);
  }
  place_heads(layout, x + kFixed);
  if (layer.size(0) != x[R] + 1 || layer.size(1) != layout.S) {
    fail(op, ": layer's shape must begin with ", x[R] + 1, ", ", layout.S, ", got ",
         shape_text(layer.sizes()));
  }
  return {
      .spec = {.Q = x[Q],
               .K = x[K],
               .D = x[D],
               .scale = float(number(scale)),
               .softcap = float(number(softcap)),
               .decay = float(number(decay)),
               .scores = x[scores] != 0,
               .dependent = x[dependent] != 0,
               .victim = Victim(x[victim]),
               .rule = {.recent = x[recent],
                        .sinks = x[sinks],
                        .by_score = x[by_score] != 0,
                        .per_age = x[per_age] != 0,
                        .capacity = x[rule_capacity]}},
      .layout = layout,
      .kind = x[kind],
      .w_dtype = DType(x[w_dtype]),
      .E = x[E],
      .present = uint64_t(x[present]),
      .null_page = int32_t(x[null_page]),
      .has_rule = x[has_rule] != 0,
  };
}

// Refuses rows for which this library has no kernels yet.
inline void check_rows([[maybe_unused]] const char* op,
                       [[maybe_unused]] const LayerArguments& layer) {
#ifdef LESS_LAUNCHES
  const Layout& layout = layer.layout;
  if (weighs(layer.spec.victim) && layout.R > 0) {
    fail(op, ": victim merge with a low-rank state has no CUDA kernel; use victim fold");
  }
  if ((packed(layout.v_dtype) || layer.shifted()) &&
      (layout.R > 0 || layer.spec.victim == Victim::fold)) {
    fail(op, ": ", packed(layout.v_dtype) ? "packed rows" : "rows in a space",
         " with feature maps have no CUDA kernel yet; use victim forget, without maps");
  }
#endif
}

// Refuses page numbers that the pool has not, and a page that two rows have. On a GPU the numbers
// are not looked at: what the pool has not is no page there.
inline void check_pages([[maybe_unused]] const char* op, [[maybe_unused]] const Pool& pool,
                        [[maybe_unused]] int64_t B) {
#ifndef LESS_CUDA_HALF
  if (pool.pages == nullptr) return;
  static thread_local std::vector<uint64_t> used;  // by page: the last call that used it
  static thread_local uint64_t call = 0;
  ++call;
  if (int64_t(used.size()) < pool.N) used.resize(pool.N, 0);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t index = pool.pages[b];
    if (index < 0 || index == pool.null_page) continue;
    if (index >= pool.N) {
      fail(op, ": pages must be below ", pool.N, ", the pages of the pool, got ", index, " in row ",
           b);
    }
    if (used[index] == call) {
      fail(op, ": pages must differ, got ", index, " for row ", b, " and for one before it");
    }
    used[index] = call;
  }
#endif
}

// The pool uint8 [N, page] of a layer, and the pages of a call's B rows: int32 [1, B], or [2, B]
// where the second tells which of them begin.
inline Pool read_pool(const Arguments& arguments, const LayerArguments& layer, const Tensor& pool,
                      const OptionalTensor& rows, int64_t B) {
  const char* op = arguments.op;
  const int64_t page = layer.layout.nbytes;
  check_dim(op, "pool", pool, 2, "[N, page]");
  if (pool.scalar_type() != ScalarType::Byte || pool.size(1) != page) {
    fail(op, ": pool must be uint8 [N, ", page, "], got ", dtype_name(pool.scalar_type()), ' ',
         shape_text(pool.sizes()));
  }
  const int64_t N = pool.size(0), stride = N > 1 ? pool.stride(0) : page;
  if (pool.stride(1) != 1 || stride < page || stride % kPageAlign != 0) {
    fail(op, ": pool's pages must be contiguous and begin at multiples of ", kPageAlign,
         " bytes, got strides ", shape_text(pool.strides()));
  }
  arguments.check_device("pool", pool);
  auto* const data = static_cast<unsigned char*>(pool.mutable_data_ptr());
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) {
    fail(op, ": pool must begin at a multiple of 16 bytes");
  }
  if (!rows && N < B) fail(op, ": pool must have a page for each of ", B, " rows, got ", N);
  Pool pages{.data = data,
             .stride = stride,
             .N = N,
             .pages = nullptr,
             .fresh = nullptr,
             .null_page = layer.null_page};
  if (rows) {
    check_dim(op, "rows", *rows, 2, "[1 or 2, B]");
    const int64_t lists = rows->size(0);
    if (lists != 1 && lists != 2) fail(op, ": rows must be [1 or 2, B], got ", lists, " lists");
    arguments.check("rows", *rows, ScalarType::Int, {lists, B});
    pages.pages = rows->const_data_ptr<int32_t>();
    if (lists == 2) pages.fresh = pages.pages + B;
  }
  check_pages(op, pages, B);
  if (N > 0) arguments.note_memory("pool", data, size_t((N - 1) * stride + page), false);
  return pages;
}

// Rows of heads [B, heads, T, D] of a caller's tensor; tokens may lie before heads. `aligned`: a
// GPU's kernel reads them in pieces of 16 bytes.
inline HeadRows head_rows(const Arguments& arguments, const char* name, const Tensor& x,
                          DType dtype, std::initializer_list<int64_t> shape,
                          [[maybe_unused]] bool aligned = true) {
  const char* op = arguments.op;
  arguments.check_shape(name, x, shape);
  arguments.check_device(name, x);
  const int64_t D = x.size(3);
  if (x.numel() > 0 && D > 1 && x.stride(3) != 1) {
    fail(op, ": ", name, "'s rows must be contiguous, got strides ", shape_text(x.strides()));
  }
  int64_t span = D;  // elements from the first to the last
  int64_t stride[3];
  for (int i = 0; i < 3; ++i) {
    stride[i] = x.size(i) > 1 ? x.stride(i) : 0;
    if (stride[i] < 0 || (x.size(i) > 1 && stride[i] < D && x.numel() > 0)) {
      fail(op, ": ", name, "'s rows must not overlap, got strides ", shape_text(x.strides()));
    }
    span += (x.size(i) - 1) * stride[i];
#ifdef LESS_LAUNCHES
    if (aligned && stride[i] * bytes_of(dtype) % 16 != 0) {
      fail(op, ": ", name, "'s rows must begin at multiples of 16 bytes on a GPU, got strides ",
           shape_text(x.strides()));
    }
#endif
  }
  void* const data = x.mutable_data_ptr();
  if (x.numel() > 0) arguments.note_memory(name, data, size_t(span * bytes_of(dtype)), false);
  return {.data = data, .dtype = dtype, .b = stride[0], .h = stride[1], .t = stride[2]};
}

// The k, v [B, K, T, D] of a call, of the dtype of the (hot) slots; scales [2, B, K, T], of the
// rows of k and of those of v, belong to rows of 8 bits, and to them alone.
inline CallRows call_rows(const Arguments& arguments, const LayerArguments& layer, const Tensor& k,
                          const Tensor& v, const OptionalTensor& scales, int64_t B, int64_t T) {
  const char* op = arguments.op;
  const int64_t K = layer.spec.K, D = layer.spec.D;
  const DType dtype = layer.layout.call_dtype;
  for (const auto& [name, x] : {std::pair{"k", &k}, std::pair{"v", &v}}) {
    if (row_dtype(op, name, *x) != dtype) {
      fail(op, ": ", name, " must have the slots' dtype, got ", dtype_name(x->scalar_type()));
    }
  }
  if (bool(scales) != has_scale(dtype)) {
    fail(op, ": scales belong to rows of 8 bits, and must be given with them");
  }
  arguments.check("scales", scales, ScalarType::Float, {2, B, K, T});
  const float* const k_scale = optional_floats(scales);
  return {.k = head_rows(arguments, "k", k, dtype, {B, K, T, D}),
          .v = head_rows(arguments, "v", v, dtype, {B, K, T, D}),
          .k_scale = k_scale,
          .v_scale = scales ? k_scale + B * K * T : nullptr};
}

// What each tensor begins at a multiple of, in the one piece that holds a layer's maps and space.
constexpr int64_t kPieceAlign = 128;

// The space and the maps of a layer, uint8 [bytes] as less.layer packs them; none where it has
// none.
inline Maps read_maps(const Arguments& arguments, const LayerArguments& layer,
                      const OptionalTensor& maps) {
  const char* op = arguments.op;
  if (bool(maps) != (layer.kind >= 0 || layer.present != 0)) {
    fail(op, ": maps must be given where the layer has some, and only there");
  }
  if (!maps) return {};
  const int64_t Q = layer.spec.Q, K = layer.spec.K, D = layer.spec.D;
  const MapKind kind = MapKind(layer.kind);
  const bool centroids = layer.kind >= 0 && kind == MapKind::centroid;
#ifdef LESS_LAUNCHES
  if (centroids) {
    fail(op,
         ": kind 2 (centroid) has no CUDA kernel yet; use maps of kind exp, or backend reference");
  }
#endif
  const int64_t R = layer.layout.R, E = centroids ? R : layer.E;
  if (centroids && layer.E != 0) fail(op, ": kind 2 (centroid) has no hidden layer, got ", layer.E);
#ifdef LESS_LAUNCHES
  if (layer.kind >= 0 && E < 1)
    fail(op, ": w1 must have a hidden column or more on a GPU, got ", E);
  if (R > 64) fail(op, ": w2 must have a rank of at most 64 on a GPU, got ", R);
#endif
  check_dim(op, "maps", *maps, 1, "[bytes]");
  const auto* const base = static_cast<const unsigned char*>(maps->const_data_ptr());
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0) {
    fail(op, ": maps must begin at a multiple of 16 bytes");
  }
  int64_t at = 0;
  int bit = 0;
  const auto take = [&](int64_t numbers, int64_t bytes) -> const void* {
    if ((layer.present >> bit++ & 1) == 0) return nullptr;
    const void* const tensor = base + at;
    at += aligned(numbers * bytes, kPieceAlign);
    return tensor;
  };
  const auto floats = [&](int64_t numbers) { return static_cast<const float*>(take(numbers, 4)); };
  const int64_t w = bytes_of(layer.w_dtype);
  const auto side = [&](int64_t heads) {
    FeatureMaps side{};
    side.w1 = take(heads * D * E, w);
    side.w1_scale = floats(heads * E);
    side.w2 = take(heads * E * R, w);
    side.w2_scale = floats(heads * R);
    side.bias = floats(heads * R);
    side.kind = kind;
    side.w_dtype = layer.w_dtype;
    side.D = D;
    side.E = E;
    side.R = R;
    return side;
  };
  Maps read{};
  Space& space = read.space;
  for (const uint16_t** x :
       {&space.key_mean, &space.key_scale, &space.value_mean, &space.value_scale}) {
    *x = static_cast<const uint16_t*>(take(K * D, sizeof **x));
    if (bool(*x) != bool(space.key_mean)) fail(op, ": a space must have all of its tensors");
  }
  if (layer.kind < 0) {
    arguments.check("maps", *maps, ScalarType::Byte, {at});
    return read;
  }
  read.phi = side(Q);
  read.psi = side(K);
  read.psi.mix = floats(K * R * R);
  read.psi.scale = floats(K * R);
  read.psi.mix_scale = floats(K * R);
  const void* const shared = take(K * D * R, w);
  const float* const shared_scale = floats(K * R);
  read.phi.factor = floats(Q);
  read.psi.factor = floats(K);
  read.psi.weight = floats(K * D);
  read.psi.offset = floats(K);
  const bool scaled = layer.w_dtype == DType::i8, paper = kind == MapKind::paper;
  if (centroids) {
    if (!shared || !read.phi.factor || !read.phi.bias || !read.psi.factor || !read.psi.bias ||
        !read.psi.weight || !read.psi.offset) {
      fail(op, ": kind 2 (centroid) must have centroids, factors, biases, weight and offset");
    }
    if (bool(shared_scale) != scaled) {
      fail(op, ": centroids_scale belongs to int8 centroids, and must be given with them");
    }
    for (FeatureMaps* m : {&read.phi, &read.psi}) {
      if (m->w1 || m->w1_scale || m->w2 || m->w2_scale || m->mix || m->scale || m->mix_scale) {
        fail(op, ": kind 2 (centroid) must have no w1, w2 and mix");
      }
      m->w1 = shared;
      m->w1_scale = shared_scale;
    }
    read.phi.group = Q / K;
    arguments.check("maps", *maps, ScalarType::Byte, {at});
    return read;
  }
  if (shared || shared_scale || read.phi.factor || read.psi.factor || read.psi.weight ||
      read.psi.offset) {
    fail(op, ": centroids, factors, weight and offset belong to kind 2 (centroid) alone");
  }
  for (const FeatureMaps* m : {&read.phi, &read.psi}) {
    if (m->w1 == nullptr || m->w2 == nullptr) fail(op, ": maps must have w1 and w2");
    if (bool(m->w1_scale) != scaled || bool(m->w2_scale) != scaled) {
      fail(op, ": w1_scale and w2_scale belong to int8 weights, and must be given with them");
    }
    if (m->bias != nullptr && paper) fail(op, ": bias belongs to kind 1 (exp) alone");
  }
  const bool mix = read.psi.mix != nullptr;
  if (mix && !paper) fail(op, ": mix belongs to kind 0 (paper) alone");
  if (mix != bool(read.psi.scale) || mix != bool(read.psi.mix_scale)) {
    fail(op, ": mix, scale and mix_scale must be given together");
  }
  arguments.check("maps", *maps, ScalarType::Byte, {at});
  return read;
}

}  // namespace less::ops
