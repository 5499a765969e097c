// Checks of a layer's slots, shared by the ops that read or write them.
#pragma once

#include "ops/check.h"

namespace less::ops {

// The slots [B, K, S, D] of a layer; S is what slot_k says. The scales belong to slots of 8 bits,
// and to them alone.
inline Slots check_slots(const Arguments& arguments, int64_t B, int64_t K, int64_t D,
                         const Tensor& slot_k, const Tensor& slot_v, const OptionalTensor& k_scale,
                         const OptionalTensor& v_scale, const Tensor& position, const Tensor& score,
                         const Tensor& weight) {
  const char* op = arguments.op;
  check_dim(op, "slot_k", slot_k, 4, "[B, K, S, D]");
  const int64_t S = slot_k.size(2);
  const ScalarType type = slot_k.scalar_type();
  if (bool(k_scale) != bool(v_scale)) fail(op, ": k_scale and v_scale must be given together");
  if (!k_scale && has_scales(type)) {
    fail(op, ": k_scale and v_scale must be given with ", dtype_name(type), " slots");
  }
  if (k_scale && !has_scales(type)) {
    fail(op, ": k_scale and v_scale belong to int8 and float8_e4m3fn slots alone, got ",
         dtype_name(type));
  }
  const DType dtype = row_dtype(op, "slot_k", slot_k);
  arguments.check("slot_k", slot_k, type, {B, K, S, D});
  arguments.check("slot_v", slot_v, type, {B, K, S, D});
  arguments.check("position", position, ScalarType::Int, {B, K, S});
  arguments.check("score", score, ScalarType::Float, {B, K, S});
  arguments.check("weight", weight, ScalarType::Float, {B, K, S});
  arguments.check("k_scale", k_scale, ScalarType::Float, {B, K, S});
  arguments.check("v_scale", v_scale, ScalarType::Float, {B, K, S});
  return Slots{
      .k = slot_k.mutable_data_ptr(),
      .v = slot_v.mutable_data_ptr(),
      .k_scale = k_scale ? k_scale->mutable_data_ptr<float>() : nullptr,
      .v_scale = v_scale ? v_scale->mutable_data_ptr<float>() : nullptr,
      .position = position.mutable_data_ptr<int32_t>(),
      .score = score.mutable_data_ptr<float>(),
      .weight = weight.mutable_data_ptr<float>(),
      .dtype = dtype,
      .S = S,
  };
}

// The k, v [B, K, T, D] of a call, of the slots' dtype, with the scales of rows of 8 bits.
inline void check_rows(const Arguments& arguments, int64_t B, int64_t K, int64_t T, int64_t D,
                       ScalarType type, const Tensor& k, const Tensor& v,
                       const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  arguments.check("k", k, type, {B, K, T, D});
  arguments.check("v", v, type, {B, K, T, D});
  if (bool(k_scale) != has_scales(type) || bool(v_scale) != has_scales(type)) {
    fail(arguments.op, ": chunk_k_scale and chunk_v_scale belong to slots of 8 bits, and must be ",
         "given with them");
  }
  arguments.check("chunk_k_scale", k_scale, ScalarType::Float, {B, K, T});
  arguments.check("chunk_v_scale", v_scale, ScalarType::Float, {B, K, T});
}

}  // namespace less::ops
