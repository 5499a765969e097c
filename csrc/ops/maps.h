// Checks of a feature map's weights, shared by the ops that evaluate one.
#pragma once

#include "ops/check.h"

namespace less::ops {

// Weights of `heads` maps of head dim D. w1 and w2 share a dtype; those of int8 have a scale per
// column.
inline FeatureMaps feature_maps(const Arguments& arguments, int64_t heads, int64_t D,
                                const Tensor& w1, const Tensor& w2, const OptionalTensor& w1_scale,
                                const OptionalTensor& w2_scale, const OptionalTensor& bias,
                                const OptionalTensor& mix, const OptionalTensor& scale,
                                const OptionalTensor& mix_scale, int64_t kind) {
  const char* op = arguments.op;
  check_dim(op, "w1", w1, 3, "[heads, D, E]");
  check_dim(op, "w2", w2, 3, "[heads, E, R]");
  const int64_t E = w1.size(2), R = w2.size(2);
  const ScalarType type = w1.scalar_type();
  const DType w_dtype = type == ScalarType::Char ? DType::i8 : slot_dtype(op, "w1", w1);
#ifdef LESS_LAUNCHES
  if (E < 1) fail(op, ": w1 must have a hidden column or more on a GPU, got ", E);
  if (R > 64) fail(op, ": w2 must have a rank of at most 64 on a GPU, got ", R);
#endif
  arguments.check("w1", w1, type, {heads, D, E});
  arguments.check("w2", w2, type, {heads, E, R});
  if (bool(w1_scale) != bool(w2_scale) || bool(w1_scale) != (w_dtype == DType::i8)) {
    fail(op, ": w1_scale and w2_scale belong to int8 weights, and must be given with them");
  }
  arguments.check("w1_scale", w1_scale, ScalarType::Float, {heads, E});
  arguments.check("w2_scale", w2_scale, ScalarType::Float, {heads, R});
  if (kind != int64_t(MapKind::paper) && kind != int64_t(MapKind::exp)) {
    fail(op, ": kind must be 0 (paper) or 1 (exp), got ", kind);
  }
  if (bias && kind != int64_t(MapKind::exp)) fail(op, ": bias belongs to kind 1 (exp) alone");
  if (mix && kind != int64_t(MapKind::paper)) fail(op, ": mix belongs to kind 0 (paper) alone");
  if (bool(mix) != bool(scale) || bool(mix) != bool(mix_scale)) {
    fail(op, ": mix, scale and mix_scale must be given together");
  }
  arguments.check("bias", bias, ScalarType::Float, {heads, R});
  arguments.check("mix", mix, ScalarType::Float, {heads, R, R});
  arguments.check("scale", scale, ScalarType::Float, {heads, R});
  arguments.check("mix_scale", mix_scale, ScalarType::Float, {heads, R});
  return FeatureMaps{
      .w1 = w1.const_data_ptr(),
      .w2 = w2.const_data_ptr(),
      .w1_scale = optional_floats(w1_scale),
      .w2_scale = optional_floats(w2_scale),
      .bias = optional_floats(bias),
      .mix = optional_floats(mix),
      .scale = optional_floats(scale),
      .mix_scale = optional_floats(mix_scale),
      .kind = MapKind(kind),
      .w_dtype = w_dtype,
      .D = D,
      .E = E,
      .R = R,
  };
}

}  // namespace less::ops
