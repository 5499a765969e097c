// Checks of a feature map's weights, shared by the ops that evaluate one.
#pragma once

#include "ops/check.h"

namespace less::ops {

// Weights of `heads` maps of head dim D on the device of `first`.
inline FeatureMaps feature_maps(const char* op, const char* first_name, const Tensor& first,
                                int64_t heads, int64_t D, const Tensor& w1, const Tensor& w2,
                                const OptionalTensor& bias, const OptionalTensor& mix,
                                const OptionalTensor& scale, const OptionalTensor& mix_scale,
                                int64_t kind) {
  check_dim(op, "w1", w1, 3, "[heads, D, E]");
  check_dim(op, "w2", w2, 3, "[heads, E, R]");
  const int64_t E = w1.size(2), R = w2.size(2);
  check(op, "w1", w1, ScalarType::Float, {heads, D, E});
  check(op, "w2", w2, ScalarType::Float, {heads, E, R});
  check_device(op, "w1", w1, first_name, first);
  check_device(op, "w2", w2, first_name, first);
  if (kind != int64_t(MapKind::paper) && kind != int64_t(MapKind::exp)) {
    fail(op, ": kind must be 0 (paper) or 1 (exp), got ", kind);
  }
  if (bias && kind != int64_t(MapKind::exp)) fail(op, ": bias belongs to kind 1 (exp) alone");
  if (mix && kind != int64_t(MapKind::paper)) fail(op, ": mix belongs to kind 0 (paper) alone");
  if (bool(mix) != bool(scale) || bool(mix) != bool(mix_scale)) {
    fail(op, ": mix, scale and mix_scale must be given together");
  }
  if (bias) check(op, "bias", *bias, ScalarType::Float, {heads, R});
  if (mix) check(op, "mix", *mix, ScalarType::Float, {heads, R, R});
  if (scale) check(op, "scale", *scale, ScalarType::Float, {heads, R});
  if (mix_scale) check(op, "mix_scale", *mix_scale, ScalarType::Float, {heads, R});
  return FeatureMaps{
      .w1 = w1.const_data_ptr(),
      .w2 = w2.const_data_ptr(),
      .w1_scale = nullptr,
      .w2_scale = nullptr,
      .bias = optional_floats(bias),
      .mix = optional_floats(mix),
      .scale = optional_floats(scale),
      .mix_scale = optional_floats(mix_scale),
      .kind = MapKind(kind),
      .w_dtype = DType::f32,
      .D = D,
      .E = E,
      .R = R,
  };
}

}  // namespace less::ops
